"""How an engine may hold a pool's memory: PyTorch, NumPy, DLPack, `__cuda_array_interface__`, an address."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import numpy as np
import torch

from hetkv.kv.dtypes import DType
from hetkv.kv.memory import Memory
from hetkv.kv.pool import KVPool


class Exported:
    """What speaks DLPack and nothing else."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._tensor.__dlpack_device__()

    def __dlpack__(self, **options: object) -> object:
        return self._tensor.__dlpack__(**options)


class Interface:
    """Memory of a GPU, taking turns among those there are, that speaks `__cuda_array_interface__` and nothing else."""

    made = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.to(f"cuda:{Interface.made % torch.cuda.device_count()}")

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        return self.tensor.__cuda_array_interface__


def mapped(size: int) -> torch.Tensor:
    """Bytes of a file."""
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        return torch.from_numpy(np.memmap(file, np.uint8, "r+", shape=size))


KINDS: dict[str, Callable[[torch.Tensor], object]] = {
    "torch": lambda tensor: tensor,
    "numpy": lambda tensor: tensor.numpy(),
    "memory-mapped": lambda tensor: tensor.numpy(),
    "dlpack": Exported,
    "raw": lambda tensor: Memory(tensor.data_ptr(), tuple(tensor.shape), DType.UINT8, owner=tensor),
    "cuda-array-interface": Interface,
}
"""How an engine may hold its memory."""

ON_HOST = sorted(set(KINDS) - {"cuda-array-interface"})
ON_GPU = ["cuda-array-interface"]


def given(pool: KVPool, kind: str) -> KVPool:
    """The pool over the same memory, held otherwise."""
    every = {id(tensor): tensor for at in pool.layers.values() for tensor in at.tensors.values()}
    Interface.made += 1  # one pool is on one GPU
    held = {number: KINDS[kind](tensor) for number, tensor in every.items()}
    layers = {
        layer: at._replace(tensors={name: held[id(tensor)] for name, tensor in at.tensors.items()})
        for layer, at in pool.layers.items()
    }
    return KVPool(pool.spec, pool.shard, layers)


def tensors_of(pool: KVPool, held: KVPool) -> list[tuple[torch.Tensor, object]]:
    """Each tensor of a pool, and what holds its memory in the other one."""
    pairs = [
        (at.tensors[name], held.layers[index].tensors[name]) for index, at in pool.layers.items() for name in at.tensors
    ]
    return list({id(mine): (mine, theirs) for mine, theirs in pairs}.values())
