"""Backends to run kernels on: the emulated one, which any machine has, and real ones; and a move checked on them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from hetkv.core import core as _core
from tests.remap.cases import Side, expected, move

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "build" / "emulated"
TABLE = ["backend.cu", "status.cu", "devices.cu", "allocations.cu", "streams.cu", "remaps.cu", "plan.cpp"]
SOURCES = [*(f"csrc/backend/gpu/{name}" for name in TABLE), "tests/cpp/emulated/start.cpp"]


def emulated_backend() -> str:
    """The path of the emulated backend, built from the kernels' sources."""
    library = BUILT / "libhetkv_emulated.so"
    used = [*ROOT.glob("csrc/backend/**/*"), *ROOT.glob("csrc/remap/*.h"), *ROOT.glob("tests/cpp/emulated/*")]
    used += [ROOT / "csrc/map.h", ROOT / "csrc/convert.h"]
    newest = max(path.stat().st_mtime for path in used)
    if not library.exists() or library.stat().st_mtime < newest:
        BUILT.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CXX", "c++")
        made = BUILT / f"libhetkv_emulated.{os.getpid()}"
        subprocess.run(
            [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-DHETKV_EMULATED", "-Icsrc", "-Itests/cpp/emulated",
             "-fPIC", "-shared", "-x", "c++", *SOURCES, "-o", str(made)],
            cwd=ROOT, check=True,
        )  # fmt: skip
        made.rename(library)
    return str(library)


def device_of(backend: str) -> torch.device:
    """Where tensors for device 0 of that backend (a name, or the path of the emulated one) live."""
    return torch.device("cpu" if "/" in backend else "cuda:0")


def check_on(
    backend: str,
    source: Side,
    destination: Side,
    tokens: int,
    heads: int,
    channels: int,
    *,
    multipliers: Sequence[float] | None = None,
    seed: int = 0,
    max_blocks: int = 0,
) -> None:
    """Runs the move on the backend's device 0 and compares all memory, the sum and the count with the oracle's."""
    want, checksum, saturated = expected(source, destination, tokens, heads, channels, multipliers, seed)
    count = tokens * heads * channels * destination.dtype.itemsize
    if destination.layout is None and source.layout is not None and count % 8:
        want.body[count : count + 8 - count % 8] = 0  # the kernel clears a wire part's padding
    device = device_of(backend)
    there = replace(source, memory=source.memory.clone().to(device))
    got = replace(destination, memory=destination.memory.clone().to(device))
    job = move(there, got, tokens, heads, channels, multipliers)
    stream = torch.cuda.current_stream().cuda_stream if device.type == "cuda" else 0
    run = _core.DeviceRemap(backend, 0, [job])
    for _ in range(2):  # the second shows that the first left its slot as it found it
        run.launch(stream, seed, max_blocks)
        assert run.result() == (checksum, saturated)
    assert torch.equal(got.memory.cpu(), want.memory)
    assert torch.equal(there.memory.cpu(), source.memory)
