"""Scales in memory through real transfers: vLLM's records by name, what is copied bit for bit, what is counted."""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

import msgspec
import pytest
import torch

from hetkv.errors import IncompatibleError, InputError
from hetkv.kv.allocate import allocate
from hetkv.kv.dtypes import DType
from hetkv.kv.layer import LayerMemory
from hetkv.kv.layout import KVLayout
from hetkv.kv.pool import KVPool
from hetkv.kv.scale import SCALED, ScaleLayout
from hetkv.kv.spec import KVSpec, LayerSpec, Shard
from hetkv.reference import remap as reference
from hetkv.transport.config import TransferConfig
from tests.transport.peers import WAIT_S, connected

FN, FNUZ, E5, E5FNUZ, INT8 = SCALED
BF16 = DType.BFLOAT16
CONFIG = TransferConfig(slot_bytes=1 << 16, window_bytes=1 << 18)
TOKENS, HEADS, DIM = 83, 3, 64
KV = KVSpec.uniform(1, HEADS, DIM)
MLA = KVSpec((LayerSpec.latent(512, 64),))


class Cache(NamedTuple):
    """A pool and the blocks of one request in it."""

    pool: KVPool
    blocks: list[int]

    def rows(self, view: torch.Tensor) -> torch.Tensor:
        """`[tokens, head, ...]` of the request in a view of the pool."""
        return view[self.blocks].flatten(0, 1)[:TOKENS]

    def codes(self, segment: str = "k") -> torch.Tensor:
        return self.rows(self.pool.view(0, segment))

    def scales(self, segment: str = "k") -> torch.Tensor:
        return self.rows(self.pool.scale_view(0, segment))

    def values(self, segment: str = "k") -> torch.Tensor:
        """Elements as float64: code times scale."""
        part = self.pool.layers[0].layout.segments[segment]
        codes = self.codes(segment).double()
        if part.scale_groups:
            return codes * self.scales(segment).double().repeat_interleave(part.channels // part.scale_groups, dim=2)
        return codes * (part.scale.values[0] if part.scale is not None else 1.0)


def cache(pool: KVPool, seed: int) -> Cache:
    size, count = pool.cache_groups[0]
    return Cache(pool, random.Random(seed).sample(range(count), -(-TOKENS // size)))


def place(spec: KVSpec, layout: KVLayout, blocks: int = 0) -> KVPool:
    """A zeroed pool of one layer."""
    count = blocks or -(-TOKENS // layout.block_size) + 2
    return KVPool(spec, Shard.whole(spec), {0: LayerMemory(layout, count, allocate(layout, count, "cpu"))})


def kv_layout(dtype: DType, kind: str, block_size: int = 16, name: str = "nhd") -> KVLayout:
    """A layout with static scale 0.5, or with scales in memory."""
    made = KVLayout.preset(name, KV.layers[0], HEADS, block_size, dtype)
    if kind == "static":
        return KVLayout.preset(name, KV.layers[0], HEADS, block_size, dtype, ScaleLayout((0.5,)))
    if kind == "none":
        return made
    return made.with_scales("token", 0) if kind == "token" else made.with_scales("token_head", 16 * (kind == "group"))


def fill(mine: Cache, seed: int = 1) -> None:
    """Random values in the request's blocks; scales are those that a quantiser would have found."""
    generator = torch.Generator().manual_seed(seed)
    for name, part in mine.pool.layers[0].layout.segments.items():
        values = torch.randn((part.heads, TOKENS, part.channels), generator=generator) * 4
        static = part.scale.values[0] if part.scale is not None and part.scale.values else 1.0
        bits = reference.bits(values)
        joint = part.shares_scales
        made = reference.rescale(
            bits,
            DType.FLOAT32,
            part.dtype,
            multipliers=[1 / static] * part.heads,
            groups=part.scale_groups,
            joint=joint,
        )
        size = mine.pool.cache_groups[0][0]
        at = torch.arange(TOKENS)
        index = torch.tensor(mine.blocks)[at // size], at % size
        view = reference.bits(mine.pool.view(0, name))
        view[index] = made.codes.transpose(0, 1).reshape(TOKENS, part.heads, *view.shape[3:])
        if made.scales is not None:
            scales = mine.pool.scale_view(0, name)
            for head in range(part.heads):
                scales[..., head, :][index] = made.scales[head]


def transfer(source: Cache, destination: Cache) -> int:
    """One request over a real link; returns what the receiver counted as saturated."""
    with connected([source.pool], [destination.pool], CONFIG) as ([sender], [receiver]):
        rx = receiver.receive("r", destination.blocks, TOKENS)
        sender.send("r", source.blocks, TOKENS).send_layers()
        rx.wait(WAIT_S)
        return int(receiver.engine.stats()["saturated"])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(reference.bits(a.contiguous()), reference.bits(b.contiguous()))


# vLLM's `fp8_ds_mla`.


def mla(layout: str, block_size: int, dtype: DType = FN) -> Cache:
    made = KVLayout.preset(layout, MLA.layers[0], 1, block_size, dtype)
    return cache(place(MLA, made), block_size)


def test_a_record_of_fp8_ds_mla_is_656_bytes() -> None:
    layout = KVLayout.preset("fp8_ds_mla", MLA.layers[0], 1, 64, FN)
    latent, rope = layout.segments["latent"], layout.segments["rope"]
    assert (latent.token_stride, rope.token_stride, latent.block_stride) == (656, 656, 64 * 656)
    assert (latent.offset, latent.scales.offset, rope.offset) == (0, 512, 528)
    assert (latent.scale_groups, latent.scales.inner_stride, rope.dtype) == (4, 4, BF16)
    assert layout.shared


def test_the_record_reads_like_vllm_s() -> None:
    """By hand from the bytes of one token: 512 fp8, 4 float32, 64 bfloat16."""
    mine = mla("fp8_ds_mla", 16)
    fill(mine)
    memory = next(iter(mine.pool.layers[0].tensors.values()))
    token = 37
    start = (mine.blocks[token // 16] * 16 + token % 16) * 656
    record = memory[start : start + 656]
    values = record[:512].view(torch.float8_e4m3fn).double().reshape(4, 128)
    values = (values * record[512:528].view(torch.float32).double()[:, None]).flatten()
    assert torch.equal(mine.values("latent")[token, 0], values)
    assert same_bits(mine.codes("rope")[token, 0], record[528:].view(torch.bfloat16))


@pytest.mark.parametrize(("ours", "theirs"), [(64, 64), (64, 16), (1, 64), (16, 3)])
def test_fp8_ds_mla_moves_bit_for_bit(ours: int, theirs: int) -> None:
    source, destination = mla("fp8_ds_mla", ours), mla("fp8_ds_mla", theirs)
    for tensor in source.pool.layers[0].tensors.values():
        tensor.copy_(torch.randint(0, 256, tensor.shape, dtype=torch.uint8))  # any bytes: NaN codes, NaN scales
    assert transfer(source, destination) == 0
    for name in ("latent", "rope"):
        assert same_bits(source.codes(name), destination.codes(name))
    assert same_bits(source.scales("latent"), destination.scales("latent"))


def test_fp8_ds_mla_to_and_from_a_plain_latent() -> None:
    plain, packed, again = mla("latent", 16, BF16), mla("fp8_ds_mla", 64), mla("latent", 1, BF16)
    fill(plain)
    assert transfer(plain, packed) == 0
    latent = plain.codes("latent").float().reshape(TOKENS, 1, 4, 128)
    scale = (latent.abs().amax(dim=3) / 448).clamp(min=torch.finfo(torch.float32).smallest_normal)
    assert torch.equal(packed.scales("latent"), scale)
    codes = (latent * (1 / scale)[..., None]).to(torch.float8_e4m3fn).double().flatten(2)
    step = (packed.codes("latent").double() - codes).abs() / codes.abs().clamp(min=2.0**-6)
    assert step.max() <= 2**-3
    assert (step > 0).float().mean() < 1e-3  # a product with 1 / scale is not quite the quotient
    error = (packed.values("latent") - plain.values("latent")).abs().reshape(TOKENS, 1, 4, 128)
    bound = torch.maximum(latent.abs().double() * 2.0**-4, scale.double()[..., None] * 2.0**-10)
    assert bool((error <= bound * 1.0001).all())
    assert same_bits(plain.codes("rope"), packed.codes("rope"))
    assert transfer(packed, again) == 0
    assert torch.equal(again.codes("latent"), packed.values("latent").float().to(torch.bfloat16))
    assert same_bits(again.codes("rope"), packed.codes("rope"))


def test_fp8_ds_mla_needs_its_geometry() -> None:
    with pytest.raises(InputError, match="a scale for each 128 channels"):
        KVLayout.preset("fp8_ds_mla", LayerSpec.latent(500, 64), 1, 64, FN)
    with pytest.raises(InputError, match="holds a latent of fp8"):
        KVLayout.preset("fp8_ds_mla", MLA.layers[0], 1, 64, BF16)
    with pytest.raises(InputError, match="holds a latent of fp8"):
        KVLayout.preset("fp8_ds_mla", KV.layers[0], HEADS, 64, FN)


# vLLM's `int8_per_token_head` and `fp8_per_token_head`.


def vllm_pool(kind: str, block_size: int, dtype: torch.dtype = torch.int8) -> Cache:
    """Pools over tensors of the shapes that vLLM's attention backends allocate, or with separate scales."""
    blocks = -(-TOKENS // block_size) + 2
    if kind == "inline":
        tensor = torch.zeros((blocks, 2, block_size, HEADS, DIM + 4), dtype=dtype)
        made = KVPool.from_tensors(KV, {0: tensor}, "block segment token head channel", scale="inline")
    elif kind == "packed":
        tensor = torch.zeros((blocks, HEADS, block_size, 2 * (DIM + 4)), dtype=dtype)
        made = KVPool.from_tensors(KV, {0: tensor}, "block head token channels", scale="inline")
    else:
        tensor = torch.zeros((blocks, 2, block_size, HEADS, DIM), dtype=dtype)
        scales = {name: torch.zeros((blocks, block_size, HEADS)) for name in "kv"}
        made = KVPool.from_tensors(KV, {0: tensor}, "block segment token head channel", scales={0: scales})
    return cache(made, block_size)


def test_inline_scales_are_where_vllm_looks_for_them() -> None:
    """Each head's last four bytes, as `_ensure_scale_caches` takes them: of K, V and in the packed form."""
    for kind, at in (("inline", (0, 1)), ("packed", (0, 1))):
        mine = vllm_pool(kind, 16)
        fill(mine)
        tensor = mine.pool.layers[0].tensors["k"]
        for part, name in zip(at, "kv", strict=True):
            rows = (
                tensor[:, part]
                if kind == "inline"
                else tensor.unflatten(3, (2, DIM + 4))[:, :, :, part].transpose(1, 2)
            )
            scales = rows[..., DIM:].contiguous().view(torch.float32)[..., 0]
            assert torch.equal(mine.pool.scale_view(0, name)[..., 0], scales)
            assert torch.equal(mine.pool.view(0, name), rows[..., :DIM])
            assert bool((mine.scales(name) > 0).all())


@pytest.mark.parametrize(("ours", "theirs"), list(itertools.product(["inline", "packed", "separate"], repeat=2)))
def test_int8_per_token_head_moves_bit_for_bit(ours: str, theirs: str) -> None:
    source, destination = vllm_pool(ours, 16), vllm_pool(theirs, 48)
    fill(source)
    assert transfer(source, destination) == 0
    for name in "kv":
        assert same_bits(source.codes(name), destination.codes(name))
        assert same_bits(source.scales(name), destination.scales(name))


def test_int8_per_token_head_to_and_from_bfloat16() -> None:
    plain, packed = cache(place(KV, kv_layout(BF16, "none", 32)), 3), vllm_pool("inline", 16)
    fill(plain)
    assert transfer(plain, packed) == 0
    for name in "kv":
        amax = plain.codes(name).float().abs().amax(dim=2, keepdim=True)
        assert torch.equal(packed.scales(name), amax / 127)
        assert int(packed.codes(name).abs().max()) == 127
        assert bool(((packed.values(name) - plain.values(name)).abs() <= 0.5001 * packed.scales(name).double()).all())
    back = cache(place(KV, kv_layout(BF16, "none", 3)), 4)
    assert transfer(packed, back) == 0
    assert torch.equal(back.codes("k"), packed.values("k").float().to(torch.bfloat16))


# Every pair of kinds.

KINDS = [
    ("static", "static"),
    ("static", "token_head"),
    ("token_head", "static"),
    ("token", "group"),
    ("group", "token"),
]
"""Of the sender and the receiver; tests/transport/test_deployments.py draws all pairs."""


@pytest.mark.parametrize("dst", [*SCALED, BF16], ids=lambda d: d.value)
@pytest.mark.parametrize("src", [*SCALED, BF16], ids=lambda d: d.value)
def test_every_dtype_and_kind_keeps_its_values(src: DType, dst: DType) -> None:
    """Each pair of kinds is rejected by name, or every value is within the roundings that its conversion has."""
    for ours, theirs in KINDS:
        if any(dtype is BF16 and kind != "static" for dtype, kind in ((src, ours), (dst, theirs))):
            continue
        source = cache(place(KV, kv_layout(src, ours)), 1)
        destination = cache(place(KV, kv_layout(dst, theirs, 32, "hnd")), 2)
        fill(source)
        if rejected(src, ours, dst, theirs):
            with pytest.raises(IncompatibleError, match=r"layers\[0\].k.(scale|dtype)"):
                transfer(source, destination)
            continue
        saturated = transfer(source, destination)
        # Static e4m3fnuz travels as e4m3fn at half the scale, in which its largest code is 224 and not 240.
        assert saturated == 0 or src is FNUZ or theirs == "static"
        want, got = source.values(), destination.values()
        row = want.abs().amax(dim=(1, 2), keepdim=True)
        error = (got - want).abs()
        coarse = sum(2.0**-3 if "e5m2" in d.value else 2.0**-4 for d in (src, dst) if d not in (INT8, BF16))
        assert bool((error <= coarse * want.abs() + row / 60).all()), (ours, theirs)


def rejected(src: DType, ours: str, dst: DType, theirs: str) -> bool:
    """int8 whose scale is static holds and gives nothing but its own."""
    static = (src is INT8 and ours == "static", dst is INT8 and theirs == "static")
    if static[0]:
        return dst is not INT8
    return static[1]


def all_codes(source: Cache) -> None:
    """The 256 codes in the first tokens of K, with the scale 1.5."""
    view = source.pool.view(0, "k")
    codes = torch.arange(256, dtype=torch.uint8).view(4, DIM).view(view.dtype)
    view[source.blocks[0], :4, 0] = codes
    if source.pool.layers[0].layout.segments["k"].scale_groups:
        source.pool.scale_view(0, "k")[source.blocks[0], :4, 0] = 1.5


@pytest.mark.parametrize(("src", "dst"), [(FN, FNUZ), (FNUZ, FN), (E5, E5FNUZ), (E5FNUZ, E5)])
def test_twins_with_scales_in_memory(src: DType, dst: DType) -> None:
    """All 256 codes: e4m3fn keeps its codes at twice the scale; elsewhere values are kept, only infinity saturates."""
    source = cache(place(KV, kv_layout(src, "token_head")), 1)
    destination = cache(place(KV, kv_layout(dst, "token_head")), 2)
    all_codes(source)
    saturated = transfer(source, destination)
    got = destination.codes()[:4, 0].flatten()
    codes = got.view(torch.uint8).tolist()
    special = {0x80: 0x00, 0x7F: 0x80, 0xFF: 0x80}
    if src is FN:
        assert codes == [special.get(code, code) for code in range(256)]
    assert destination.scales()[:4, 0].tolist() == [[3.0 if src is FN else 1.5]] * 4
    want = source.codes()[:4, 0].flatten().double()
    finite = want.isfinite()
    limit = torch.finfo(src.torch).smallest_normal * (0.25 if "e5m2" in src.value else 0.125)  # the smallest subnormal
    value = got.double() * (2.0 if src is FN else 1.0)
    assert bool(((value - want).abs() <= limit)[finite].all())
    assert torch.equal(value.isnan(), want.isnan())
    assert saturated == int(want.isinf().sum()) == (2 if src is E5 else 0)


@pytest.mark.parametrize("dtype", SCALED, ids=lambda d: d.value)
def test_a_static_scale_becomes_one_for_each_token(dtype: DType) -> None:
    """Same dtype: all 256 codes move, and each token and head gets the static scale."""
    source = cache(place(KV, kv_layout(dtype, "static")), 1)
    destination = cache(place(KV, kv_layout(dtype, "group")), 2)
    all_codes(source)
    transfer(source, destination)
    assert same_bits(source.codes(), destination.codes())
    assert bool((destination.scales() == 0.5).all())


def test_saturations_of_a_requantisation_are_counted() -> None:
    """fp8 with a scale for each token to a static scale that is too small for some of them."""
    source = cache(place(KV, kv_layout(FN, "token_head")), 1)
    layout = KVLayout.preset("nhd", KV.layers[0], HEADS, 16, FN, ScaleLayout((2.0**-6,)))
    destination = cache(place(KV, layout), 2)
    fill(source)
    saturated = transfer(source, destination)
    beyond = sum(int((source.values(name).abs() > 464 * 2.0**-6).sum()) for name in "kv")
    assert saturated == beyond > 0


def test_nothing_but_the_request_changes() -> None:
    """Codes and scales of blocks that the ticket does not name keep every byte."""
    source, destination = vllm_pool("separate", 16), vllm_pool("packed", 16)
    fill(source)
    for tensor in destination.pool.layers[0].tensors.values():
        tensor.fill_(0x5A)
    free = sorted(set(range(destination.pool.cache_groups[0][1])) - set(destination.blocks))
    before = destination.pool.layers[0].tensors["k"][free].clone()
    transfer(source, destination)
    assert torch.equal(destination.pool.layers[0].tensors["k"][free], before)
    last = destination.pool.scale_view(0, "k")[destination.blocks[-1]][TOKENS % 16 :]
    assert bool((last.contiguous().view(torch.uint8) == 0x5A).all())


def test_layouts_of_scales_that_cannot_be() -> None:
    layout = KVLayout.preset("nhd", KV.layers[0], HEADS, 16, INT8)
    part = layout.segments["k"]

    def with_scale(dtype: DType = INT8, **fields: int) -> KVLayout:
        changed = msgspec.structs.replace(part, dtype=dtype, scale=ScaleLayout(**fields))
        return msgspec.structs.replace(layout, segments={"k": changed})

    good = {"block_stride": 64 * HEADS, "token_stride": 4 * HEADS, "head_stride": 4}
    assert with_scale(**good).segments["k"].scale_groups == 1
    with pytest.raises(InputError, match="uint8 has no scales in memory"):
        with_scale(DType.UINT8, **good)
    with pytest.raises(InputError, match="64 channels with a scale for each 48"):
        with_scale(channels_per_scale=48, **good)
    with pytest.raises(InputError, match="token stride is 0"):
        with_scale(block_stride=4)
    with pytest.raises(InputError, match="4 scales a head, but their group stride is 0"):
        with_scale(channels_per_scale=16, **good)
    with pytest.raises(InputError, match="multiples of 4 bytes"):
        with_scale(token_stride=2)
    with pytest.raises(InputError, match="static scales have no place"):
        ScaleLayout((1.0,), token_stride=4)
    made = layout.with_scales()
    tensors = {name: tensor for name, tensor in allocate(made, 4, "cpu").items() if "." not in name}
    with pytest.raises(InputError, match=r"there is no tensor 'k\.scale'"):
        KVPool(KV, Shard.whole(KV), {0: LayerMemory(made, 4, tensors)})
    split = torch.zeros((4, HEADS, DIM // 8, 16, 8), dtype=torch.int8)
    with pytest.raises(InputError, match="inline scales must follow contiguous channels"):
        KVLayout.from_tensor({"k": split}, "block head outer token inner", scale="inline")
    with pytest.raises(InputError, match="do not name the 2 axes of scales"):
        ScaleLayout.from_tensor(torch.zeros(3, 4), "block head")
