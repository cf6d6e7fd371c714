"""SGLang's cache as a pool, from what its `KVArgs` say: no SGLang needed."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hetkv.control.payloads import as_payload
from hetkv.errors import BuildError, InputError
from hetkv.integrations.sglang import backend
from hetkv.integrations.sglang.pool import MOST_AUX_BYTES, check, pool_of, read_aux, write_aux
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender

LAYERS, HEADS, DIM, TOKENS = 3, 4, 8, 128
SECRET = b"a secret of this test alone."
WAIT_S = 20.0


class Cache:
    """Buffers as SGLang's `MHATokenToKVPool` has them, and what it says of them."""

    def __init__(self, page: int, heads: int = HEADS, dtype: Any = np.float32, v_dim: int = DIM, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        shape = [(TOKENS + page, heads, dim) for dim in (DIM, v_dim)]
        self.k, self.v = ([draw.random(each).astype(dtype) for _ in range(LAYERS)] for each in shape)
        buffers = self.k + self.v
        self.args = SimpleNamespace(
            kv_data_ptrs=[each.ctypes.data for each in buffers], kv_data_lens=[each.nbytes for each in buffers],
            kv_item_lens=[each[0].nbytes * page for each in buffers], page_size=page, kv_head_num=heads,
            total_kv_head_num=HEADS, state_types=[], num_draft_entries=0, kv_layout=None, aux_item_lens=[8, 4],
        )  # fmt: skip

    def rows(self, pages: list[int]) -> np.ndarray:
        """Token rows of some pages."""
        page = self.args.page_size
        return np.concatenate([np.arange(at * page, (at + 1) * page) for at in pages])


PARALLEL = SimpleNamespace(pp_size=1, attn_cp_size=1, attn_dcp_size=1, attn_dp_size=1)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("v_dim", [DIM, 2 * DIM])
def test_the_pool_has_every_element_at_its_place(dtype: str, v_dim: int) -> None:
    cache = Cache(4, dtype={"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}[dtype], v_dim=v_dim)
    pool = pool_of(cache.args, dtype, "cpu", tp=1, tp_rank=0)
    assert (pool.block_size_of(0), len(pool.layers), pool.spec.layers[0].segments[0].heads) == (4, LAYERS, HEADS)
    for layer in range(LAYERS):
        for name, buffer in (("k", cache.k[layer]), ("v", cache.v[layer])):
            assert pool.base(layer, name) == buffer.ctypes.data


@pytest.mark.parametrize("tp", [1, 2])
def test_pages_of_a_request_arrive_in_other_pages(tp: int) -> None:
    """From a prefill with whole layers to ranks that have a part of the heads each."""
    here = Cache(16)
    there = [Cache(16, HEADS // tp, seed=1 + rank) for rank in range(tp)]
    before = [[array.copy() for array in cache.k + cache.v] for cache in there]
    sender = Sender(pool_of(here.args, "float32", "cpu", 1, 0), instance="p", secret=SECRET)
    receivers = [
        Receiver(pool_of(cache.args, "float32", "cpu", tp, rank), instance="d", rank=rank, tp=tp, secret=SECRET)
        for rank, cache in enumerate(there)
    ]
    try:
        for receiver in receivers:
            sender.connect(receiver.listen())
        source, target = [5, 1, 7], [2, 6, 3]
        deadline = time.monotonic() + WAIT_S
        while not all(receiver.peers for receiver in receivers):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        waits = [receiver.receive("r", target, 48) for receiver in receivers]
        tx = sender.send("r", [], 48)
        for at, page in enumerate(source):
            tx.extend([page])
            sender.batch([(tx, (at * 16, at * 16 + 16))]).send_layers()
        for wait in waits:
            wait.wait(WAIT_S)
        for rank, cache in enumerate(there):
            heads = slice(rank * HEADS // tp, (rank + 1) * HEADS // tp)
            rows, others = cache.rows(target), np.setdiff1d(np.arange(TOKENS + 16), cache.rows(target))
            for mine, theirs, then in zip(here.k + here.v, cache.k + cache.v, before[rank], strict=True):
                assert np.array_equal(theirs[rows], mine[here.rows(source), heads])
                assert np.array_equal(theirs[others], then[others])
    finally:
        for node in (sender, *receivers):
            node.close()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"kv_head_num": 3}, "are not K and V of 3 heads"),
        ({"kv_data_ptrs": [0] * 5}, "5 buffers"),
        ({"kv_item_lens": [256] * 3 + [256, 256, 512]}, "not of one size"),
    ],
)
def test_buffers_that_are_no_keys_and_values(changes: dict[str, Any], text: str) -> None:
    args = SimpleNamespace(**{**vars(Cache(2).args), **changes})
    with pytest.raises(InputError, match=text):
        pool_of(args, "float32", "cpu", 1, 0)


@pytest.mark.parametrize(
    ("changes", "parallel", "policy", "mla", "text"),
    [
        ({}, {}, "early", True, "models with MLA"),
        ({"is_hybrid_mla_backend": True}, {}, "early", False, "models with MLA"),
        ({"state_types": ["mamba"]}, {}, "early", False, "layers that keep a state"),
        ({"num_draft_entries": 2}, {}, "early", False, "draft models"),
        ({"kv_layout": "page_first"}, {}, "early", False, "KV layout page_first"),
        ({}, {"pp_size": 2}, "early", False, "pipeline parallelism"),
        ({}, {"attn_cp_size": 2}, "early", False, "context parallelism"),
        ({}, {"attn_dcp_size": 2}, "early", False, "context parallelism"),
        ({}, {"attn_dp_size": 2}, "early", False, "data-parallel attention"),
        ({}, {}, "prefill_complete", False, "allocation policy prefill_complete"),
        ({"aux_item_lens": [65536, 1]}, {}, "early", False, "65537 bytes"),
    ],
)
def test_what_is_not_served_is_rejected_by_name(
    changes: dict[str, Any], parallel: dict[str, int], policy: str, mla: bool, text: str
) -> None:
    args = SimpleNamespace(**{**vars(Cache(2).args), **changes})
    check(Cache(2).args, PARALLEL, "early", False)
    with pytest.raises(InputError, match=text):
        check(args, SimpleNamespace(**{**vars(PARALLEL), **parallel}), policy, mla)


def test_metadata_crosses_row_by_row() -> None:
    here, there = (
        [np.arange(start, start + 16, dtype=np.int64).reshape(8, 2), np.arange(start, start + 8, dtype=np.int32)]
        for start in (100, 0)
    )
    args = [
        SimpleNamespace(aux_data_ptrs=[each.ctypes.data for each in rows], aux_item_lens=[16, 4])
        for rows in (here, there)
    ]
    write_aux(args[1], 5, read_aux(args[0], 2))
    assert there[0].tolist() == [[2 * at, 2 * at + 1] if at != 5 else [104, 105] for at in range(8)]
    assert there[1].tolist() == [0, 1, 2, 3, 4, 102, 6, 7]
    with pytest.raises(InputError, match="has 19 bytes, the decode's 20"):
        write_aux(args[1], 5, bytes(19))


def test_metadata_of_the_largest_size_fits_into_a_payload() -> None:
    check(SimpleNamespace(**{**vars(Cache(2).args), "aux_item_lens": [MOST_AUX_BYTES]}), PARALLEL, "early", False)
    assert len(as_payload(bytes(MOST_AUX_BYTES))) == MOST_AUX_BYTES
    with pytest.raises(InputError):
        as_payload(bytes(MOST_AUX_BYTES + 1))


@pytest.mark.parametrize("found", ["0.4.9", "0.5.22.post1", "0.5.24", "0.6.0"])
def test_another_version_of_sglang_is_rejected(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "version", lambda name: found)
    with pytest.raises(BuildError, match=f"supports SGLang >=0.5.23,<0.5.24, this is SGLang {found}"):
        backend.register()
