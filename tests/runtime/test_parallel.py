"""Parts of a model: they cover it, each rank reads its slices alone, and every architecture is the same when split."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from hetkv.errors import InputError, PoolFullError
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import Shard, head_interval
from hetkv.runtime import BlockAllocator, Decoder, Pages, ParallelGroup, Part, read_checkpoint
from hetkv.runtime.part import query_heads
from hetkv.runtime.plan import InstancePlan
from hetkv.runtime.tensors import expected_tensors
from hetkv.runtime.weights import load_weights
from tests.runtime.deployment_cases import POOLS, moved
from tests.runtime.test_runtime import DEMO, RANDOM_MODELS, SMALL, reference, save_random


@given(kv_heads=st.integers(1, 12), group=st.integers(1, 8), data=st.data())
def test_query_heads_are_split_once_and_are_where_their_kv_head_is(
    kv_heads: int, group: int, data: st.DataObject
) -> None:
    tp = data.draw(st.integers(1, kv_heads * group))
    seen = []
    for rank in range(tp):
        heads, held = query_heads(kv_heads * group, kv_heads, tp, rank), head_interval(kv_heads, tp, rank)
        assert heads.size >= 1
        assert heads.size % held.size == 0
        assert all(held.start <= head // group < held.stop for head in range(*heads))
        seen += range(*heads)
    assert seen == list(range(kv_heads * group))


def test_uneven_heads_and_stages() -> None:
    config = read_checkpoint(DEMO)  # 6 layers, 6 query heads on 3 KV heads
    parts = [Part.of(config, 2, rank, 3, stage, (1, 3, 2)) for stage, rank in product(range(3), range(2))]
    assert [tuple(part.heads) for part in parts[:2]] == [(0, 2), (2, 6)]
    assert [tuple(part.kv_heads) for part in parts[:2]] == [(0, 1), (1, 3)]
    assert [tuple(part.shard.layers) for part in parts[::2]] == [(0, 1), (1, 4), (4, 6)]
    assert [(part.first, part.last) for part in parts[::2]] == [(True, False), (False, False), (False, True)]
    replicas = [Part.of(config, 5, rank) for rank in range(5)]
    assert [part.kv_heads.start for part in replicas] == [0, 0, 1, 1, 2]
    assert [tuple(part.heads) for part in replicas] == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 6)]
    assert replicas[3].shard == Shard.of(config.kv_spec(), 5, 3)


@pytest.mark.parametrize(
    ("tp", "pp", "stages", "message"),
    [
        (7, 1, None, "TP 7: the model has 6 query heads"),
        (1, 7, None, "PP 7: the model has 6 layers"),
        (0, 1, None, "TP 0, PP 1"),
        (1, 2, (3, 2), r"stages 3\+2 do not split 6 layers over PP 2"),
        (1, 2, (6, 0), r"stages 6\+0"),
        (1, 2, (2, 2, 2), r"stages 2\+2\+2"),
    ],
)
def test_impossible_splits_are_rejected(tp: int, pp: int, stages: tuple[int, ...] | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Part.of(read_checkpoint(DEMO), tp, 0, pp, 0, stages)


@pytest.mark.parametrize("name", RANDOM_MODELS)
@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (2, 1), (3, 2)])
def test_a_rank_reads_its_slices_and_nothing_else(name: str, tp: int, pp: int, tmp_path: Path) -> None:
    save_random(name, tmp_path)
    config, whole = read_checkpoint(tmp_path), load_file(tmp_path / "model.safetensors")
    covered = {key: torch.zeros(spec.shape, dtype=torch.bool) for key, spec in expected_tensors(config).items()}
    for stage, rank in product(range(pp), range(tp)):
        part = Part.of(config, tp, rank, pp, stage)
        for key, tensor in load_weights(tmp_path, config, torch.float32, part=part).items():
            spec = expected_tensors(config)[key]
            pieces = [whole[key].narrow(spec.axis, start, stop - start) for start, stop in spec.cut(part)]
            assert torch.equal(tensor, torch.cat(pieces, spec.axis))
            assert tensor.untyped_storage().nbytes() == tensor.numel() * 4, "more than the slice is in memory"
            for start, stop in spec.cut(part):
                covered[key].narrow(spec.axis, start, stop - start).fill_(True)
            if key.startswith("model.layers."):
                assert int(key.split(".")[2]) in range(*part.shard.layers)
    assert all(seen.all() for seen in covered.values())


SPLITS = {
    "llama": ((3, 2), (2, 1)),  # 3 KV heads over TP 2; biases of summed products
    "llama-3-rope": ((3, 1), (1, 2)),  # one KV head, replicated
    "llama-linear-rope": ((1, 2), (2, 1)),
    "mistral-sliding": ((2, 1), (4, 1)),
    "qwen2": ((1, 2), (3, 1)),  # tied embeddings at both ends of the pipeline
    "qwen2-mixed-windows": ((1, 2), (2, 2)),  # a stage has layers of one cache group alone
    "qwen3": ((2, 2), (5, 1)),  # norms of queries and keys
}


@pytest.mark.parametrize("name", SPLITS)
def test_every_architecture_split_equals_transformers(name: str, tmp_path: Path) -> None:
    theirs = save_random(name, tmp_path)
    prompts = [torch.randint(SMALL["vocab_size"], (n,), generator=torch.Generator().manual_seed(n)) for n in (3, 50)]
    wanted = [reference(theirs, prompt.tolist(), 16) for prompt in prompts]
    plans = [
        InstancePlan(name=role, role=role, tp=tp, pp=pp, pool=POOLS[role])
        for role, (tp, pp) in zip(("prefill", "decode"), SPLITS[name], strict=True)
    ]
    assert moved(plans, tmp_path, [prompt.tolist() for prompt in prompts], 16) == wanted


def test_a_pool_of_another_rank_is_rejected() -> None:
    model = Decoder.load(DEMO)
    pool = KVPool.allocate(model.kv_spec, 4, shard=Shard.of(model.kv_spec, 2, 0))
    with pytest.raises(InputError, match="another rank"):
        model.prefill([1, 2], 0, Pages(pool, [[0]]))


def test_a_group_of_another_stage_takes_no_blocks(tmp_path: Path) -> None:
    save_random("qwen2-mixed-windows", tmp_path)
    spec = Decoder.load(tmp_path).kv_spec
    allocator = BlockAllocator(KVPool.allocate(spec, 3, shard=Shard.of(spec, pp=2, pp_rank=1)))
    assert allocator.allocate(33) == [[], [0, 1, 2]]
    with pytest.raises(PoolFullError, match="1 tokens need 1 blocks of 16 in cache group 1, 0 are free"):
        allocator.allocate(1)


def test_a_rank_alone_needs_no_process_group() -> None:
    group, x = ParallelGroup(), torch.randn(3, 4)
    assert group.sum(x) is x
    assert group.concat(x, [4]) is x
    assert group.agree(7) == 7
    group.leave()
