"""Pages over every layout: what is written is what is read, and nothing else changes; the block allocator."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetkv.errors import InputError, PoolFullError
from hetkv.kv.pool import KVPool
from hetkv.kv.scale import ScaleLayout
from hetkv.kv.spec import KVSpec, LayerSpec, Shard
from hetkv.runtime import BlockAllocator, Decoder, ModelConfig, Pages, prefill
from hetkv.runtime.tensors import expected_tensors

LAYOUTS = ["nhd", "hnd", "nhd_interleaved", "hnd_interleaved", "packed_nhd", "packed_hnd", "rocm"]


@settings(max_examples=60, deadline=None)
@given(
    heads=st.sampled_from([1, 2, 3, 5, 7]),
    dim=st.sampled_from([64, 80, 96, 128, 192, 576]),
    layout=st.sampled_from(LAYOUTS),
    block_size=st.sampled_from([1, 3, 16, 64, 128]),
    dtype=st.sampled_from(["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"]),
    length=st.integers(1, 150),
    data=st.data(),
)
def test_pages_keep_what_was_written(
    heads: int, dim: int, layout: str, block_size: int, dtype: str, length: int, data: st.DataObject
) -> None:
    spec = KVSpec.uniform(2, heads, dim)
    need = -(-length // block_size)
    pool = KVPool.allocate(spec, need + 2, layout=layout, block_size=block_size, dtype=dtype)
    blocks = data.draw(st.permutations(range(need + 2)))[:need]
    cuts = sorted({0, length, *data.draw(st.lists(st.integers(0, length), max_size=4))})
    generator = torch.Generator().manual_seed(length)
    k, v = (torch.randn(length, heads, dim, generator=generator) for _ in range(2))
    pages = Pages(pool, [blocks])
    for start, stop in pairwise(cuts):
        pages.write(1, start, k[start:stop], v[start:stop])

    start = data.draw(st.integers(0, length - 1))
    for segment, values, read in zip(("k", "v"), (k, v), pages.read(1, length, torch.float32, start), strict=True):
        stored = values.to(getattr(torch, dtype))
        assert torch.equal(read, stored[start:].float())
        view = pool.view(1, segment).float().reshape(need + 2, block_size, heads, dim)
        for token in range(length):
            assert torch.equal(view[blocks[token // block_size], token % block_size], stored[token].float())
            view[blocks[token // block_size], token % block_size] = 0
        assert not view.any(), "bytes outside the sequence's tokens changed"
        assert not pool.view(0, segment).float().any(), "another layer changed"


@settings(max_examples=25, deadline=None)
@given(
    kv_heads=st.sampled_from([1, 2, 3, 5]),
    group=st.integers(1, 3),
    dim=st.sampled_from([64, 80, 96, 128]),
    window=st.sampled_from([None, 1, 9, 40]),
    qk_norm=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    block_size=st.sampled_from([1, 5, 16, 64]),
    length=st.integers(1, 70),
    data=st.data(),
)
def test_chunks_layouts_and_block_ids_do_not_change_logits(
    kv_heads: int, group: int, dim: int, window: int | None, qk_norm: bool, layout: str, block_size: int, length: int,
    data: st.DataObject,
) -> None:  # fmt: skip
    config = ModelConfig(
        family="qwen3", vocab_size=50, hidden_size=24, intermediate_size=36, num_layers=2,
        num_heads=kv_heads * group, num_kv_heads=kv_heads, head_dim=dim, norm_eps=1e-5, max_context=128,
        tied_embeddings=True, qkv_bias=True, qk_norm="head" if qk_norm else "none", sliding_windows=(None, window),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(length)
    specs = expected_tensors(config).items()
    model = Decoder(config, {name: torch.randn(spec.shape, generator=generator) * 0.3 for name, spec in specs})
    tokens = data.draw(st.lists(st.integers(0, 49), min_size=length, max_size=length))
    groups = model.kv_spec.num_groups

    plain = KVPool.allocate(model.kv_spec, 1, block_size=128, dtype="float32")
    whole = prefill(model, tokens, Pages(plain, [[0]] * groups))

    count = -(-length // block_size) + 2
    other = KVPool.allocate(model.kv_spec, count, layout=layout, block_size=block_size, dtype="float32")
    blocks = [data.draw(st.permutations(range(count))) for _ in range(groups)]
    chunk = data.draw(st.integers(1, length))
    torch.testing.assert_close(prefill(model, tokens, Pages(other, blocks), chunk=chunk), whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("values", [(0.02,), (0.01, 0.5, 2.0)])
@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"])
def test_fp8_with_static_scales(name: str, values: tuple[float, ...]) -> None:
    dtype = getattr(torch, name)
    limit = torch.finfo(dtype).max
    pool = KVPool.allocate(KVSpec.uniform(1, 3, 64), 4, layout="rocm", dtype=name, scale=ScaleLayout(values=values))
    pages = Pages(pool, [[3, 1]])
    k, v = torch.randn(20, 3, 64), torch.randn(20, 3, 64) * 1e6
    pages.write(0, 0, k, v)
    scale = torch.tensor(values)[:, None]
    for read, values_in in zip(pages.read(0, 20, torch.float32), (k, v), strict=True):
        codes = (values_in / scale).clamp(-limit, limit).to(dtype)
        assert torch.equal(read, codes.float() * scale)
        assert read.isfinite().all(), "too large a value saturates"


def test_pages_reject_what_they_cannot_use() -> None:
    spec = KVSpec.uniform(1, 2, 64)
    pool = KVPool.allocate(spec, 4)
    for blocks, message in (
        ([[4]], "block id 4 is out of range"),
        ([[-1]], "block id -1"),
        ([[1, 1]], "given twice"),
        ([[0], [1]], "1 cache groups, got block ids for 2"),
    ):
        with pytest.raises(InputError, match=message):
            Pages(pool, blocks)
    assert Pages(KVPool.allocate(spec, 4, shard=Shard.of(spec, tp=2)), [[0]]).capacity == 16
    with pytest.raises(InputError, match="int8"):
        Pages(KVPool.allocate(spec, 4, dtype="int8"), [[0]])


def test_allocator_hands_out_each_block_once() -> None:
    mixed = KVSpec((LayerSpec.kv(1, 64), LayerSpec.kv(1, 64, sliding_window=8, group=1)))
    allocator = BlockAllocator(KVPool.allocate(mixed, [6, 4], block_size=[16, 32]))
    first, second = allocator.allocate(40), allocator.allocate(33)
    assert [len(ids) for ids in first] == [3, 2]
    assert [len(ids) for ids in second] == [3, 2]
    for group, count in enumerate((6, 4)):
        assert sorted(first[group] + second[group]) == list(range(count))
    with pytest.raises(PoolFullError, match="1 tokens need 1 blocks of 16 in cache group 0, 0 are free"):
        allocator.allocate(1)
    allocator.free(first)
    assert (allocator.free_blocks(0), allocator.free_blocks(1)) == (3, 2)
    with pytest.raises(InputError, match="is not allocated"):
        allocator.free(first)
    with pytest.raises(InputError, match="given back twice"):
        allocator.free([[second[0][0], second[0][0]], []])
    with pytest.raises(PoolFullError):
        allocator.allocate(49)
    assert (allocator.free_blocks(0), allocator.free_blocks(1)) == (3, 2), "a rejected allocation takes nothing"
    allocator.allocate(48)
