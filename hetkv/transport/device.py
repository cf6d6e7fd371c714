"""The device that a pool is on: its backend, its streams, and what its driver says of the pool's memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from hetkv.errors import InputError

if TYPE_CHECKING:
    import torch

    import hetkv._core as _core
    from hetkv.kv.pool import KVPool

_NOT_DEVICE = {"host": "pageable host memory", "pinned": "pinned host memory", "managed": "managed memory"}


class PoolDevice:
    """One GPU as a `Sender` or `Receiver` uses it."""

    def __init__(self, core_device: _core.Device, torch_device: torch.device | None) -> None:
        self.core = core_device
        self.torch = torch_device
        self.info: dict[str, Any] = core_device.info
        self.backend: str = self.info["backend"]
        self.index: int = self.info["index"]

    def stream(self, stream: Any) -> int | None:
        """A stream as the extension takes it: from an integer (`cudaStream_t`), or from an object of PyTorch's.

        `None` is PyTorch's current stream on this device. Raises `InputError` for a stream of another device.
        """
        if stream is None:
            return None if self.torch is None else _current_stream()(self.index)
        if isinstance(stream, int):
            return stream
        number, device = getattr(stream, "cuda_stream", None), getattr(stream, "device", None)
        if not isinstance(number, int):
            raise InputError(f"a stream is an integer or a torch.cuda.Stream, not {type(stream).__name__}")
        if device is not None and device.index != self.index:
            raise InputError(f"the stream is one of {device}, the pool is on {self}")
        return number

    def check(self, pool: KVPool) -> None:
        """Raise `InputError` where the driver sees the pool's memory elsewhere. Any device memory will do, PyTorch's
        expandable segments too: peers store into windows of hetkv's own and never into the pool."""
        for (layer, name), address in pool.addresses().items():
            found = self.core.pointer_info(address)
            if found["kind"] != "device":
                raise InputError(f"layer {layer}, segment {name!r}: the memory is {_NOT_DEVICE[found['kind']]}")
            if found["device"] != self.index:
                raise InputError(
                    f"layer {layer}, segment {name!r}: the memory is on device {found['device']}, not on {self}"
                )

    def __str__(self) -> str:
        return f"{self.backend}:{self.index}"


DEVICE_SCALES = False
"""Whether pools on devices take part in links on which scales of tokens and heads travel, those of `fp8` and `int4`
among them. The kernels are there and pass their tests in the emulation (tests/remap/test_scaled_gpu.py); true once
`pytest -m gpu tests/device`, which sets it, has passed on a GPU.
"""


@cache
def _current_stream() -> Callable[[int], int]:
    """PyTorch's current stream on a device, by the device's index. Asked for once a layer, so without an object."""
    import torch

    def slow(index: int) -> int:
        return int(torch.cuda.current_stream(index).cuda_stream)

    found: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", slow)
    return found


def device_of(pool: KVPool) -> PoolDevice | None:
    """The device of a pool; `None` in host memory.

    Raises `InputError` for a device without a backend, or memory that its driver sees elsewhere, `UnsupportedError`
    where the backend cannot be used here (with the reason), `DeviceError` where the driver rejects.
    """
    name, _, number = pool.device.partition(":")
    if name == "cpu":
        return None
    if name not in ("cuda", "hip"):
        raise InputError(f"a pool on {pool.device}: pools are in host memory or on a CUDA or HIP device")
    from hetkv.core import core
    from hetkv.transport.backends import backends, folder

    if number:
        index = int(number)
    else:
        backends()  # the driver is asked through one that is loaded
        index = core.pointer_info(name, next(iter(pool.addresses().values())))["device"]
    torch = sys.modules.get("torch")
    has_streams = torch is not None and torch.cuda.is_available()
    device = PoolDevice(
        core.open_device(folder(), name, index), torch.device("cuda", index) if torch and has_streams else None
    )
    device.check(pool)
    return device
