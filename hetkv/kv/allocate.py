"""Zeroed memory for a dense layout: `allocate`."""

from __future__ import annotations

import mmap
from importlib.util import find_spec
from typing import Any

from hetkv.errors import InputError
from hetkv.kv.layout import KVLayout

_HUGE = 2 << 20
"""Bytes of a huge page."""


def allocate(layout: KVLayout, num_blocks: int, device: Any = "cpu", framework: str | None = None) -> dict[str, Any]:
    """One byte array per base of a layout whose outermost axis is the block.

    `framework`: `torch` or `numpy`; by default PyTorch where it is installed. Arrays of 2 MiB or more in host memory
    ask the kernel for huge pages: blocks of few KiB in any order need an entry of the TLB each otherwise. Raises
    `InputError`.
    """
    framework = framework or next((name for name in ("torch", "numpy") if find_spec(name)), None)
    if framework not in ("torch", "numpy"):
        raise InputError("a pool is allocated by torch or numpy: install one, or give memory to KVPool.from_tensors")
    if framework == "numpy" and str(device) != "cpu":
        raise InputError(f"NumPy has no memory on {device}: install torch")

    def zeros(size: int) -> Any:
        huge = _huge_pages(size) if str(device) == "cpu" else None
        if framework == "torch":
            import torch

            if huge is not None:
                return torch.frombuffer(huge, dtype=torch.uint8).zero_()  # written to, so that it is there
            return torch.zeros(size, dtype=torch.uint8, device=device)
        import numpy as np

        return np.zeros(size, np.uint8) if huge is None else np.frombuffer(huge, np.uint8)

    sizes = {name: part.block_stride * num_blocks for name, part in layout.segments.items()}
    one = zeros(max(sizes.values())) if layout.shared else None
    arrays = {name: zeros(size) if one is None else one for name, size in sizes.items()}
    for name, part in layout.segments.items():
        if part.scale is not None and part.scale.separate:
            arrays[f"{name}.scale"] = zeros(part.scales.extent(layout.block_size, num_blocks))
    return arrays


def _huge_pages(size: int) -> memoryview | None:
    """Zeroed memory of its own that begins at a huge page and has as many as fit; `None` where there are none."""
    if size < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    import ctypes

    try:
        memory = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % _HUGE
        memory.madvise(mmap.MADV_HUGEPAGE, start, size // _HUGE * _HUGE)
    except OSError:  # a kernel without them
        return None
    return memoryview(memory)[start : start + size]
