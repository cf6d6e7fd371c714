"""Zeroed memory for a dense layout: `allocate`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from hetkv.errors import InputError
from hetkv.kv.layout import KVLayout


def allocate(layout: KVLayout, num_blocks: int, device: Any = "cpu", framework: str | None = None) -> dict[str, Any]:
    """One byte array per base of a layout whose outermost axis is the block.

    `framework`: `torch` or `numpy`; by default PyTorch where it is installed. Raises `InputError`.
    """
    framework = framework or next((name for name in ("torch", "numpy") if find_spec(name)), None)
    if framework not in ("torch", "numpy"):
        raise InputError("a pool is allocated by torch or numpy: install one, or give memory to KVPool.from_tensors")
    if framework == "numpy" and str(device) != "cpu":
        raise InputError(f"NumPy has no memory on {device}: install torch")

    def zeros(size: int) -> Any:
        if framework == "torch":
            import torch

            return torch.zeros(size, dtype=torch.uint8, device=device)
        import numpy as np

        return np.zeros(size, np.uint8)

    sizes = {name: part.block_stride * num_blocks for name, part in layout.segments.items()}
    one = zeros(max(sizes.values())) if layout.shared else None
    arrays = {name: zeros(size) if one is None else one for name, size in sizes.items()}
    for name, part in layout.segments.items():
        if part.scale is not None and part.scale.separate:
            arrays[f"{name}.scale"] = zeros(part.scales.extent(layout.block_size, num_blocks))
    return arrays
