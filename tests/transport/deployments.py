"""Random deployments: a spec, two sides with their own parallelism and pools, and the truth of what must arrive."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec
import torch
from hypothesis import strategies as st

from hetkv.control.conversion import Conversion, segment_conversion
from hetkv.kv.allocate import allocate
from hetkv.kv.dtypes import DType
from hetkv.kv.layer import LayerMemory
from hetkv.kv.layout import KVLayout
from hetkv.kv.pool import KVPool
from hetkv.kv.reshard import routes
from hetkv.kv.scale import SCALED, ScaleLayout
from hetkv.kv.segment import SegmentLayout
from hetkv.kv.spec import Interval, KVSpec, LayerSpec, Shard
from hetkv.reference import remap as reference
from tests.transport.memory_kinds import ON_GPU, Interface, given, mapped, tensors_of

LAYOUTS = ["nhd", "hnd", "nhd_interleaved", "hnd_interleaved", "packed_nhd", "packed_hnd", "rocm"]
FLOATS = [dtype for dtype in DType if dtype not in (DType.INT8, DType.UINT8)]
STATIC = ["none", "tensor", "head"]
IN_MEMORY = ["token_head", "group", "token"]
BLOCK_SIZES = [1, 3, 16, 64]
GROUP = 16
"""Channels of one scale where `Values.scale` is `group`; divides all that are drawn."""
FILL = 0x5A


class Side(NamedTuple):
    """One instance: its shards, and one pool a rank."""

    shards: list[Shard]
    pools: list[KVPool]
    blocks: list[list[list[int]]]
    """Block ids of each request per cache group; the same for all ranks, as in an engine."""
    given: list[KVPool]
    """The memory as engines have it, of one of `KINDS`: what the nodes get. The same as that of `pools`, but for
    `Interface`, which is a copy on a GPU."""

    def copy_to_gpu(self) -> None:
        """What `pools` hold now is what the nodes find."""
        for pool, held in zip(self.pools, self.given, strict=True):
            for mine, theirs in tensors_of(pool, held):
                if isinstance(theirs, Interface):
                    theirs.tensor.copy_(mine)
                    torch.cuda.synchronize(theirs.tensor.device)

    def copy_from_gpu(self) -> None:
        """What the nodes have written is in `pools`."""
        for pool, held in zip(self.pools, self.given, strict=True):
            for mine, theirs in tensors_of(pool, held):
                if isinstance(theirs, Interface):
                    mine.copy_(theirs.tensor)


class Deployment(NamedTuple):
    spec: KVSpec
    requests: int
    """How many are under way at once; all of the same tokens, in blocks and with values of their own."""
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
                    LayerSpec.kv(heads, dim, draw(st.sampled_from([None, 16, 64])), group=group, sliding_window=window)
                )
    if draw(st.booleans()) and layers[-1].kind == "kv":
        layers.append(LayerSpec.kv(1, 16, group=layers[-1].group, shares=len(layers) - 1))
    return KVSpec(tuple(layers))


class Values(NamedTuple):
    """What a side's pools hold: element type, and kind and values of scales."""

    dtype: DType
    scale: str
    seed: int = 0

    def layout(self, name: str, layer: LayerSpec, held: Interval, block_size: int) -> KVLayout:
        """A layer's layout for the global heads `held`."""
        made = KVLayout.preset(name, layer, held.size, block_size, self.dtype)
        if self.scale == "none":
            return made
        if self.scale in IN_MEMORY:
            return made.with_scales("token" if self.scale == "token" else "token_head", GROUP * (self.scale == "group"))
        rng = random.Random(self.seed)
        values = [0.25 * 2 ** (4 * rng.random()) for _ in range(8)]
        parts = {}
        for part in made.segments:
            heads = made.segments[part].heads
            static = values[held.start : held.start + heads] if self.scale == "head" else values[:1]
            parts[part] = msgspec.structs.replace(made.segments[part], scale=ScaleLayout(tuple(static)))
        return msgspec.structs.replace(made, segments=parts)


@st.composite
def values(draw: st.DrawFn, in_memory: bool) -> tuple[Values, Values]:
    """Of both sides, such that one can become the other. `in_memory`: scales may be in the blocks."""
    static = st.tuples(st.sampled_from(FLOATS), st.sampled_from(STATIC))
    any_ = st.one_of(static, st.tuples(st.sampled_from(SCALED), st.sampled_from(IN_MEMORY))) if in_memory else static
    source = Values(*draw(any_), draw(st.integers(0, 99)))
    destination = Values(*draw(any_), draw(st.integers(0, 99)))
    if destination.dtype is DType.INT8 and source.scale == "none" and draw(st.booleans()):
        source = source._replace(dtype=DType.INT8)  # a static int8 takes a scale of 1 for each token
    return source, destination


@st.composite
def sides(
    draw: st.DrawFn, spec: KVSpec, requests: int, tokens: int, values: Values, tps: list[int], kinds: Sequence[str]
) -> Side:
    """Random TP, PP with uneven stages, layout and block sizes."""
    tp = draw(st.sampled_from(tps))
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
    kind = draw(st.sampled_from(kinds))
    pools = [make_pool(spec, shard, layout, sizes, [requests * n + 3 for n in need], values, kind) for shard in shards]
    rng = random.Random(draw(st.integers(0, 2**16)))
    ids = [rng.sample(range(requests * n + 3), requests * n) for n in need]
    blocks = [[all_[r * n : (r + 1) * n] for all_, n in zip(ids, need, strict=True)] for r in range(requests)]
    return Side(shards, pools, blocks, [given(pool, kind) for pool in pools])


def make_pool(
    spec: KVSpec, shard: Shard, name: str, sizes: list[int], blocks: list[int], values: Values, kind: str
) -> KVPool:
    """One rank's pool, every byte of it `FILL`."""
    layers = {}
    for index in range(*shard.layers):
        layer = spec.layers[index]
        if layer.shares is not None:
            continue
        if layer.kind == "state":
            layout = KVLayout.preset("state", layer, shard.heads[index].size, 1, DType.UINT8)
        else:
            preset = name if layer.kind == "kv" else layer.kind
            layout = values.layout(preset, layer, shard.heads[index], sizes[layer.group])
        tensors = allocate(layout, blocks[layer.group], "cpu", "torch")
        if kind == "memory-mapped":
            files = {id(tensor): mapped(tensor.numel()) for tensor in tensors.values()}
            tensors = {part: files[id(tensor)] for part, tensor in tensors.items()}
        for tensor in tensors.values():
            tensor.fill_(FILL)
        layers[index] = LayerMemory(layout, blocks[layer.group], tensors)
    return KVPool(spec, shard, layers)


@st.composite
def deployments(draw: st.DrawFn, sources: Sequence[str], destinations: Sequence[str]) -> Deployment:
    """Two sides of one spec, requests with a prefix that is held, and the chunks in which they are computed.

    `sources`, `destinations`: of `KINDS`, what either side's memory may be. Pools on GPUs have no scales in memory.
    """
    spec = draw(specs())
    requests = draw(st.sampled_from([1, 1, 2, 3, 5]))
    tokens = draw(st.integers(1, 90))
    held = draw(st.one_of(st.just(0), st.integers(0, tokens)))
    cuts = sorted({0, tokens, *draw(st.lists(st.integers(0, tokens), max_size=3))})
    source, destination = draw(values(in_memory=not {*sources, *destinations} & {*ON_GPU}))
    # Scales that heads share need all of the rank's heads from one sender.
    alone = destination.scale == "token"
    return Deployment(
        spec,
        requests,
        tokens,
        held,
        [(a, b) for a, b in pairwise(cuts)],
        draw(sides(spec, requests, tokens, source, [1] if alone else [1, 1, 2, 3, 4], sources)),
        draw(sides(spec, requests, tokens, destination, [1, 1, 2, 3, 4], destinations)),
        draw(st.integers(0, 2**16)),
    )


class Truth(NamedTuple):
    """One segment's whole cache: codes `[tokens, all heads, channels]` in the source's dtype, as integers.

    `scales` `[tokens, all heads, groups]` where the source has some in memory.
    """

    codes: torch.Tensor
    scales: torch.Tensor | None = None


def truth_of(case: Deployment, request: int) -> dict[tuple[int, str], Truth]:
    """Random values per layer and segment."""
    generator = torch.Generator().manual_seed(case.seed + request)
    truth = {}
    for index, layer in enumerate(case.spec.layers):
        if layer.shares is not None:
            continue
        for segment in layer.segments:
            count = 1 if layer.kind == "state" else case.tokens
            shape = (count, segment.heads, segment.channels)
            if layer.kind == "state":
                codes = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
                truth[index, segment.name] = Truth(codes)
                continue
            pool = next(pool for pool in case.source.pools if index in pool.layers)
            part = pool.layers[index].layout.segments[segment.name]
            codes = reference.encode(torch.randn(shape, generator=generator) * 4, part.dtype)[0]
            scales = None
            if part.scale_groups:
                shape = (count, segment.heads, part.scale_groups)
                scales = torch.exp2(torch.rand(shape, generator=generator) * 8 - 4)
                if part.scale is not None and part.scale.head_stride == 0:
                    scales = scales[:, :1].expand(shape).contiguous()
            truth[index, segment.name] = Truth(codes, scales)
    return truth


def place(
    pool: KVPool, blocks: list[list[int]], layer: int, view: torch.Tensor, values: torch.Tensor, at: tuple[int, int]
) -> None:
    """Write `[tokens, heads, ...]` into a view of the pool, from token and local head `at` on."""
    size = pool.layers[layer].layout.block_size
    view = view.view(torch.int8) if view.dtype == torch.uint8 else reference.bits(view)
    tokens = torch.arange(at[0], at[0] + len(values))
    table = torch.tensor(blocks[pool.spec.group_of(layer)])
    for head in range(values.shape[1]):
        target = view[:, :, at[1] + head]
        target[table[tokens // size], tokens % size] = reference.bits(values[:, head]).reshape(-1, *view.shape[3:])


def fill_source(case: Deployment, truth: dict[tuple[int, str], Truth], request: int) -> None:
    """Write a request's truth into every source rank's pool."""
    blocks = case.source.blocks[request]
    for pool in case.source.pools:
        for layer, memory in pool.layers.items():
            for name, part in memory.layout.segments.items():
                first = pool.shard.heads[layer].start
                heads = slice(first, first + part.heads)
                value = truth[layer, name]
                place(pool, blocks, layer, pool.view(layer, name), value.codes[:, heads], (0, 0))
                if value.scales is not None:
                    view = pool.scale_view(layer, name)
                    place(pool, blocks, layer, view, value.scales[:, heads], (0, 0))


def expected(case: Deployment, truths: list[dict[tuple[int, str], Truth]], rank: int, want: list[range]) -> KVPool:
    """What the destination rank's pool must be afterwards, byte for byte, by the oracle's conversions: `truths` has
    each request's."""
    pool = case.destination.pools[rank]
    layers = {
        layer: memory._replace(tensors={name: tensor.clone() for name, tensor in memory.tensors.items()})
        for layer, memory in pool.layers.items()
    }
    for layer, memory in layers.items():
        if memory.layout.shared:
            one = memory.tensors[next(iter(memory.layout.segments))]
            shared = {**memory.tensors, **dict.fromkeys(memory.layout.segments, one)}
            layers[layer] = memory._replace(tensors=shared)
    copy = KVPool(pool.spec, pool.shard, layers)
    for route in routes(case.spec, case.source.shards, case.destination.shards):
        if route.destination != rank:
            continue
        source = case.source.pools[route.source]
        for layer in range(*route.layers):
            span = want[pool.spec.group_of(layer)]
            for name in copy.layers[layer].layout.segments if span else ():
                for truth, blocks in zip(truths, case.destination.blocks, strict=True):
                    write(blocks, copy, source, layer, name, route.heads, truth[layer, name], span)
    return copy


def write(
    blocks: list[list[int]],
    pool: KVPool,
    source: KVPool,
    layer: int,
    name: str,
    heads: Interval,
    truth: Truth,
    span: range,
) -> None:
    """One segment of one route of one request into the pool."""
    here, there = (side.layers[layer].layout.segments[name] for side in (source, pool))
    held = pool.shard.heads[layer]
    how = segment_conversion(here, there, heads, source.shard.heads[layer], held)
    chosen = slice(span.start, span.stop), slice(heads.start, heads.stop)
    codes = truth.codes[chosen].transpose(0, 1).contiguous()
    scales = truth.scales[chosen].transpose(0, 1).contiguous() if truth.scales is not None else None
    codes, scales = travel(codes, scales, here, there, how)
    at = (span.start, heads.start - held.start)
    place(pool, blocks, layer, pool.view(layer, name), codes.transpose(0, 1), at)
    if scales is not None:
        place(pool, blocks, layer, pool.scale_view(layer, name), scales.transpose(0, 1), at)


def travel(
    codes: torch.Tensor, scales: torch.Tensor | None, here: SegmentLayout, there: SegmentLayout, how: Conversion
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Codes and scales `[heads, tokens, ...]` of a source as the destination must hold them."""
    if how.pack_scales == "quantise":
        packed = reference.rescale(
            codes, here.dtype, how.wire, multipliers=how.pack, groups=how.scale_groups, joint=how.joint,
            largest=how.largest,
        )  # fmt: skip
        codes, scales = packed.codes, packed.scales
    else:
        codes = step(codes, here.dtype, how.wire, how.pack)
    assert (scales is not None) == (how.scale_groups > 0)
    match how.unpack_scales:
        case "apply" | "quantise":
            joint = how.joint and how.unpack_scales == "quantise"
            made = reference.rescale(
                codes,
                how.wire,
                there.dtype,
                scales=scales,
                multipliers=how.unpack,
                groups=there.scale_groups,
                joint=joint,
            )
            return made.codes, made.scales
        case "fill":
            shape = (*codes.shape[:2], there.scale_groups)
            scales = torch.tensor(how.fill)[:, None, None].expand(shape).contiguous()
        case "keep":
            assert scales is not None
            scales = scales * how.factor
    return step(codes, how.wire, there.dtype, how.unpack), scales


def step(codes: torch.Tensor, src: DType, dst: DType, multipliers: tuple[float, ...] | None) -> torch.Tensor:
    """One conversion without scales; bits where nothing changes."""
    if src is dst and multipliers is None:
        return codes
    return reference.rescale(codes, src, dst, multipliers=multipliers).codes
