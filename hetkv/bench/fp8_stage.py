"""fp8 on the wire, without a wire: the pack and the unpack that links of `TransferConfig(codec="fp8")` run."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hetkv.bench.kv_samples import Sample
from hetkv.control.codec import fp8_conversion
from hetkv.control.conversion import Conversion, segment_conversion
from hetkv.core import core
from hetkv.kv.pool import KVPool
from hetkv.kv.segment import SegmentLayout
from hetkv.kv.spec import Interval, KVSpec
from hetkv.transport.link_plan import layer_plan

BLOCK = 16


class Fp8Stage:
    """A sample's values in a pool of blocks of 16 tokens, packed and unpacked into a pool like it."""

    def __init__(self, sample: Sample, codec: bool = True) -> None:
        parts, heads, self.tokens, channels = sample.values.shape
        spec, dtype = KVSpec.uniform(parts // 2, heads, channels), sample.values.dtype
        self.blocks = list(range(-(-self.tokens // BLOCK)))
        self.pools = [KVPool.allocate(spec, len(self.blocks), dtype=dtype, block_size=BLOCK) for _ in range(2)]
        whole = Interval(0, heads)
        make: Callable[[SegmentLayout, SegmentLayout, Interval, Interval, Interval], Conversion]
        make = fp8_conversion if codec else segment_conversion
        self.plans = []
        for layer in range(parts // 2):
            for index, name in enumerate("kv"):
                view = self.pools[0].view(layer, name).flatten(0, 1)
                view[: self.tokens] = sample.values[2 * layer + index].transpose(0, 1)
            sides = [pool.layers[layer].layout.segments for pool in self.pools]
            found = {name: make(part, sides[1][name], whole, whole, whole) for name, part in sides[0].items()}
            self.plans.append(
                [layer_plan(pool, layer, whole, found, sends=not side) for side, pool in enumerate(self.pools)]
            )
        self.payloads = [np.zeros(plan.payload_bytes(self.tokens), np.uint8) for plan, _ in self.plans]
        self.pool_bytes = sample.values.numel() * sample.values.element_size()
        self.payload_bytes = sum(len(payload) for payload in self.payloads)

    def pack(self) -> None:
        """Every layer into its payload."""
        for (plan, _), payload in zip(self.plans, self.payloads, strict=True):
            core.pack_frame(
                plan,
                self.blocks,
                request_id=b"a sample of KV..",
                sequence=0,
                key=bytes(16),
                token_start=0,
                token_stop=self.tokens,
                pool_token=0,
                payload=payload,
            )

    def unpack(self) -> None:
        """Every payload into the second pool."""
        for (_, plan), payload in zip(self.plans, self.payloads, strict=True):
            core.unpack_frame(plan, self.blocks, tokens=self.tokens, pool_token=0, payload=payload)

    def relative_error(self) -> float:
        """Root mean square of what is lost, over that of the values."""
        lost = size = 0.0
        for layer in self.pools[0].layers:
            for name in "kv":
                there, here = (
                    pool.view(layer, name).flatten(0, 1)[: self.tokens].double() for pool in reversed(self.pools)
                )
                lost += float((there - here).square().sum())
                size += float(here.square().sum())
        return float((lost / size) ** 0.5)
