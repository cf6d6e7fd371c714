"""fp8 and int4 on the wire, without a wire: the pack, the unpack and the coding of parts that links of them run."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from hetkv.bench.kv_samples import Sample
from hetkv.control.codec import INT4_VALUES, Make, fp8_conversion, int4_conversion
from hetkv.control.conversion import segment_conversion
from hetkv.core import core
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import Interval, KVSpec
from hetkv.transport.link_plan import layer_plan

BLOCK = 16
PART_BYTES = 64 << 10
"""Of a payload, coded at once: `kCodedPartBytes` of csrc/transport/streams.cpp."""
MAKE: dict[str, Make] = {"none": segment_conversion, "fp8": fp8_conversion, "int4": int4_conversion}


class LossyStage:
    """A sample's values in a pool of blocks of 16 tokens, packed and unpacked into a pool like it."""

    def __init__(self, sample: Sample, codec: Literal["none", "fp8", "int4"]) -> None:
        parts, heads, self.tokens, channels = sample.values.shape
        spec, dtype = KVSpec.uniform(parts // 2, heads, channels), sample.values.dtype
        self.blocks = list(range(-(-self.tokens // BLOCK)))
        self.pools = [KVPool.allocate(spec, len(self.blocks), dtype=dtype, block_size=BLOCK) for _ in range(2)]
        whole = Interval(0, heads)
        make, self._coded = MAKE[codec], codec == "int4"
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
        self._parts: list[list[bytes]] = []
        self.pack()

    @property
    def wire_bytes(self) -> int:
        """Of what was packed last."""
        if self._coded:
            return sum(len(part) for parts in self._parts for part in parts)
        return sum(len(payload) for payload in self.payloads)

    def pack(self) -> None:
        """Every layer into its payload, and that into coded parts."""
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

        if self._coded:
            self._parts = [[_coded(part) for part in _cut(payload)] for payload in self.payloads]

    def unpack(self) -> None:
        """Every payload into the second pool."""
        if self._coded:
            for payload, parts in zip(self.payloads, self._parts, strict=True):
                for to, part in zip(_cut(payload), parts, strict=True):
                    to[:] = np.frombuffer(core.decode_part(part, PART_BYTES) if len(part) < len(to) else part, np.uint8)
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


def _cut(payload: np.ndarray[Any, np.dtype[np.uint8]]) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    return [payload[at : at + PART_BYTES] for at in range(0, len(payload), PART_BYTES)]


def _coded(part: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """A part that would not become smaller is sent as it is."""
    coded = core.encode_part(part, INT4_VALUES)
    return part.tobytes() if coded is None else coded
