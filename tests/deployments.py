"""Random deployments: a spec, two sides with their own parallelism and pools, and the truth of what must arrive."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import NamedTuple

import torch
from hypothesis import strategies as st

from hetkv import reference
from hetkv.conversion import segment_conversion
from hetkv.dtypes import DType
from hetkv.link import overlap
from hetkv.pool import KVPool
from hetkv.spec import KVSpec, LayerSpec, Shard

LAYOUTS = ["nhd", "hnd", "nhd_interleaved", "hnd_interleaved", "packed_nhd", "packed_hnd", "rocm"]
DTYPES = [DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16, DType.FLOAT8_E4M3FN, DType.FLOAT8_E4M3FNUZ, DType.FLOAT8_E5M2]
BLOCK_SIZES = [1, 3, 16, 64]
FILL = 0x5A


class Side(NamedTuple):
    """One instance: its shards, and one pool a rank."""

    shards: list[Shard]
    pools: list[KVPool]
    blocks: list[list[int]]
    """Block ids per cache group; the same for all ranks, as in an engine."""


class Deployment(NamedTuple):
    spec: KVSpec
    tokens: int
    held: int
    chunks: list[tuple[int, int]]
    source: Side
    destination: Side
    seed: int


@st.composite
def specs(draw: st.DrawFn) -> KVSpec:
    """One to five layers of mixed kinds in up to three cache groups."""
    layers: list[LayerSpec] = []
    for group in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["kv", "kv", "kv", "window", "latent", "state"]))
        for _ in range(draw(st.integers(1, 2))):
            heads, dim = draw(st.integers(1, 8)), draw(st.sampled_from([16, 32, 48]))
            if kind == "latent":
                layers.append(LayerSpec.latent(dim, 16, group=group))
            elif kind == "state":
                layers.append(LayerSpec.state(heads, draw(st.sampled_from([8, 40, 120])), group=group))
            else:
                window = 9 if kind == "window" else None
                layers.append(
                    LayerSpec.kv(heads, dim, draw(st.sampled_from([None, 16, 64])), group=group, window=window)
                )
    if draw(st.booleans()) and layers[-1].kind == "kv":
        layers.append(LayerSpec.kv(1, 16, group=layers[-1].group, shares=len(layers) - 1))
    return KVSpec(tuple(layers))


@st.composite
def sides(draw: st.DrawFn, spec: KVSpec, tokens: int, dtype: DType) -> Side:
    """Random TP, PP with uneven stages, layout and block sizes."""
    tp = draw(st.sampled_from([1, 1, 2, 3, 4]))
    owners = [index for index, layer in enumerate(spec.layers) if layer.shares is None]
    pp = draw(st.integers(1, min(2, len(owners))))
    cut = draw(st.integers(1, len(owners) - 1)) if pp == 2 else 0
    stages = [cut, len(spec.layers) - cut] if pp == 2 else [len(spec.layers)]
    shards = [Shard.of(spec, tp, t, pp, p, stages) for p in range(pp) for t in range(tp)]
    sizes = [draw(st.sampled_from(BLOCK_SIZES)) for _ in range(spec.num_groups)]
    for layer in spec.layers:
        if layer.kind == "state":
            sizes[layer.group] = 1
    state = [any(at.kind == "state" for at in spec.layers if at.group == g) for g in range(spec.num_groups)]
    need = [1 if state[g] else -(-tokens // sizes[g]) for g in range(spec.num_groups)]
    layout = draw(st.sampled_from(LAYOUTS))
    pools = []
    for shard in shards:
        pool = KVPool.allocate(
            spec, [n + 3 for n in need], layout=layout, block_size=sizes, dtype=dtype, shard=shard
        )  # fmt: skip
        for memory in pool.layers.values():
            for tensor in memory.tensors.values():
                tensor.fill_(FILL)
        pools.append(pool)
    rng = random.Random(draw(st.integers(0, 2**16)))
    return Side(shards, pools, [rng.sample(range(n + 3), n) for n in need])


@st.composite
def deployments(draw: st.DrawFn) -> Deployment:
    """Two sides of one spec, a request with a prefix that is held, and the chunks in which it is computed."""
    spec = draw(specs())
    tokens = draw(st.integers(1, 90))
    held = draw(st.one_of(st.just(0), st.integers(0, tokens)))
    cuts = sorted({0, tokens, *draw(st.lists(st.integers(0, tokens), max_size=3))})
    dtypes = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    return Deployment(
        spec,
        tokens,
        held,
        [(a, b) for a, b in pairwise(cuts)],
        draw(sides(spec, tokens, dtypes[0])),
        draw(sides(spec, tokens, dtypes[1])),
        draw(st.integers(0, 2**16)),
    )


def codes_of(case: Deployment) -> dict[tuple[int, str], torch.Tensor]:
    """Per layer and segment: random codes `[tokens, all heads, channels]` in the source's dtype, as integers."""
    generator = torch.Generator().manual_seed(case.seed)
    codes = {}
    for index, layer in enumerate(case.spec.layers):
        if layer.shares is not None:
            continue
        for segment in layer.segments:
            count = 1 if layer.kind == "state" else case.tokens
            shape = (count, segment.heads, segment.channels)
            if layer.kind == "state":
                codes[index, segment.name] = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
                continue
            dtype = next(pool for pool in case.source.pools if index in pool.layers).layers[index].layout.dtype
            codes[index, segment.name] = reference.encode(torch.randn(shape, generator=generator) * 4, dtype)[0]
    return codes


def place(pool: KVPool, blocks: list[list[int]], layer: int, segment: str, codes: torch.Tensor, start: int) -> None:
    """Write `codes` `[tokens, local heads, channels]` of tokens from `start` on into a pool."""
    memory = pool.layers[layer]
    size = memory.layout.block_size
    view = pool.view(layer, segment)
    view = reference.bits(view) if view.dtype != torch.uint8 else view.view(torch.int8)
    at = torch.arange(start, start + len(codes))
    table = torch.tensor(blocks[pool.spec.group_of(layer)])
    view[table[at // size], at % size] = codes.reshape(len(codes), *view.shape[2:]).to(view.dtype)


def local(pool: KVPool, layer: int, codes: torch.Tensor) -> torch.Tensor:
    """The heads of `[tokens, all heads, channels]` that the pool's rank holds."""
    heads = pool.shard.heads[layer]
    return codes[:, heads.start : heads.start + min(heads.size, codes.shape[1])]


def fill_source(case: Deployment, codes: dict[tuple[int, str], torch.Tensor]) -> None:
    """Write the truth into every source rank's pool."""
    for pool in case.source.pools:
        for layer, memory in pool.layers.items():
            for segment in memory.layout.segments:
                place(pool, case.source.blocks, layer, segment, local(pool, layer, codes[layer, segment]), 0)


def expected(case: Deployment, codes: dict[tuple[int, str], torch.Tensor], rank: int, want: list[range]) -> KVPool:
    """What the destination rank's pool must be afterwards, byte for byte, by the oracle's conversions."""
    pool = case.destination.pools[rank]
    layers = {
        layer: memory._replace(tensors={name: tensor.clone() for name, tensor in memory.tensors.items()})
        for layer, memory in pool.layers.items()
    }
    for layer, memory in layers.items():
        if memory.layout.shared:
            one = next(iter(memory.tensors.values()))
            layers[layer] = memory._replace(tensors=dict.fromkeys(memory.tensors, one))
    copy = KVPool(pool.spec, pool.shard, layers)
    for layer, memory in copy.layers.items():
        span = want[pool.spec.group_of(layer)]
        if not span:
            continue
        source = next(p for p in case.source.pools if layer in p.layers)
        for name, there in memory.layout.segments.items():
            here = source.layers[layer].layout.segments[name]
            _, common = next(item for item in overlap(case.spec, source.shard, source.shard) if item[0] == layer)
            conversion = segment_conversion(here, there, common, common, common)
            moved = local(pool, layer, codes[layer, name])[span.start : span.stop]
            moved = convert(moved, here.dtype, conversion.wire, conversion.pack)
            moved = convert(moved, conversion.wire, there.dtype, conversion.unpack)
            place(copy, case.destination.blocks, layer, name, moved, span.start)
    return copy


def convert(codes: torch.Tensor, src: DType, dst: DType, multipliers: tuple[float, ...] | None) -> torch.Tensor:
    """One conversion step of equal multipliers; bits where nothing changes."""
    if src is dst and multipliers is None:
        return codes
    values = codes.contiguous().view(src.torch).float()
    return reference.encode(values * (multipliers[0] if multipliers else 1.0), dst)[0]
