"""Host memory for engines that keep their cache to themselves: `HostSlots`, one block for each sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hetkv.integrations.engine import Slots, check_plain
from hetkv.kv.dtypes import DType
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec

Array = npt.NDArray[Any]


class HostSlots(Slots):
    """KV of up to `count` sequences of up to `capacity` tokens, in arrays `[slots, heads, capacity, channels]`."""

    def __init__(self, spec: KVSpec, count: int, capacity: int, dtype: DType) -> None:
        super().__init__(count, capacity)
        check_plain(spec)
        self.arrays: list[tuple[Array, Array]] = []
        for layer in spec.layers:
            k, v = (
                np.zeros((count, segment.heads, capacity, segment.channels), _plain(dtype))
                for segment in layer.segments
            )
            self.arrays.append((k, v))
        self.pool = KVPool.from_tensors(spec, self.arrays, "block head token channel", dtype=dtype.value)


def _plain(dtype: DType) -> np.dtype[Any]:
    """What NumPy itself knows: bfloat16 is kept in `uint16`."""
    return np.dtype(np.uint16) if dtype is DType.BFLOAT16 else dtype.numpy
