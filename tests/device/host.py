"""Devices that are threads of this host (tests/cpp/host_backend.cpp), for tests of everything above the kernels."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec
from hetkv.transport.config import TransferConfig
from hetkv.transport.device import PoolDevice
from tests.transport.peers import randomise

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tests" / "cpp" / "host_backend.cpp"
INCLUDES = [f"-I{ROOT / 'csrc'}", f"-I{SOURCE.parent}"]
SPEC = KVSpec.uniform(3, 2, 32)
SMALL = TransferConfig(slot_bytes=4096, window_bytes=4 * 4096, staging_slots=2, trace=True)


@cache
def library_path() -> str:
    """The backend, compiled once for this process; skips where there is no compiler."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is needed to build the host backend")
    path = Path(os.environ.get("HETKV_HOST_BACKEND_LIBRARY", "") or Path(tempfile.mkdtemp()) / "libhetkv_host.so")
    if not path.exists():
        flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"]
        subprocess.run(["g++", *flags, *INCLUDES, str(SOURCE), "-o", str(path)], check=True)
    return str(path)


@cache
def library() -> Any:
    lib = ctypes.CDLL(library_path())
    lib.host_stream.restype = ctypes.c_void_p
    lib.host_blocks_in_use.restype = ctypes.c_size_t
    return lib


def device(index: int = 0) -> PoolDevice:
    from hetkv.core import core

    return PoolDevice(core.open_test_device(library_path(), index), None)


@contextlib.contextmanager
def options(text: str = "") -> Iterator[None]:
    """What the backend does differently meanwhile: the words of the source's head."""
    library().host_options(text.encode())
    try:
        yield
    finally:
        library().host_options(b"")


def on_device(monkeypatch: pytest.MonkeyPatch, source: bool = True, destination: bool = True) -> None:
    """Pools of NHD are on device 0 and all others on device 1, where the side has one; the backend has no options."""
    library().host_options(b"")

    def place(pool: KVPool) -> object:
        first = pool.layers[0].layout.segments["k"].token_stride > pool.layers[0].layout.segments["k"].head_stride
        return device(int(not first)) if (source if first else destination) else None

    monkeypatch.setattr("hetkv.transport.node.device_of", place)


def pools(blocks: int = 24, **settings: object) -> tuple[KVPool, KVPool]:
    made = [
        randomise(KVPool.allocate(SPEC, blocks, layout=layout, block_size=size, **settings), index)  # type: ignore[arg-type]
        for index, (layout, size) in enumerate([("nhd", 16), ("hnd", 32)])
    ]
    return made[0], made[1]


class HostStream:
    """A stream of the caller's, as a framework would have one."""

    def __init__(self, index: int = 0) -> None:
        self.number = int(library().host_stream(index))

    def delay(self, microseconds: int) -> None:
        library().host_stream_delay(ctypes.c_void_p(self.number), microseconds)

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        pointers = (ctypes.c_void_p(at.data_ptr()) for at in (to, source))
        library().host_stream_copy(ctypes.c_void_p(self.number), *pointers, ctypes.c_size_t(to.nbytes))

    def capture(self, on: bool) -> None:
        library().host_stream_capture(ctypes.c_void_p(self.number), int(on))

    def wait(self) -> None:
        library().host_stream_wait(ctypes.c_void_p(self.number))

    def close(self) -> None:
        library().host_stream_free(ctypes.c_void_p(self.number))
