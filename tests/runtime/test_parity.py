"""Prefill in one pool, move, decode in another: the tokens are those of `transformers`, for every pair of layouts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from hetkv.kv.pool import KVPool
from hetkv.runtime import Decoder, Pages, decode, generate, greedy, prefill
from hetkv.transport.config import TransferConfig
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender

LAYOUTS = ["nhd", "hnd", "nhd_interleaved", "hnd_interleaved", "packed_nhd", "packed_hnd", "rocm"]
BLOCK_SIZES = [1, 16, 64, 128]
NEW_TOKENS = 200
SECRET = b"a secret of tests"


def make_model(path: Path, kv_heads: int, head_dim: int, layers: int = 2) -> tuple[Decoder, LlamaForCausalLM]:
    """A random Llama of 2 query heads a KV head, in ours and in the reference implementation."""
    torch.manual_seed(kv_heads * 1000 + head_dim)
    config = LlamaConfig(
        vocab_size=199,
        hidden_size=24 * kv_heads,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2 * kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=512,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=None,
    )
    reference = LlamaForCausalLM(config).eval()
    reference.save_pretrained(path)
    return Decoder.load(path), reference


def reference_tokens(reference: LlamaForCausalLM, prompt: list[int], count: int) -> list[int]:
    inputs = torch.tensor([prompt])
    with torch.inference_mode():
        out = reference.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),  # a prompt may hold token 0, which is no padding
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()


@contextmanager
def linked(src: KVPool, dst: KVPool, config: TransferConfig) -> Iterator[tuple[Sender, Receiver]]:
    with (
        Sender(src, secret=SECRET, instance="prefill", config=config) as sender,
        Receiver(dst, secret=SECRET, instance="decode", config=config) as receiver,
    ):
        receiver.connect(sender.listen())
        yield sender, receiver


def moved_tokens(
    model: Decoder, prompt: list[int], count: int, src: KVPool, dst: KVPool, nodes: tuple[Sender, Receiver], seed: int
) -> list[int]:
    """Greedy tokens where `src` prefills and `dst` decodes, in shuffled blocks; layers leave as they are computed."""
    rng = random.Random(seed)
    sender, receiver = nodes
    blocks = []
    for pool, tokens in ((src, len(prompt)), (dst, len(prompt) + count)):
        size, num_blocks = pool.cache_groups[0]
        blocks.append(rng.sample(range(num_blocks), -(-tokens // size)))
    name = f"request-{seed}"
    receiving = receiver.receive(name, blocks[1], len(prompt))
    sending = sender.send(name, blocks[0], len(prompt))
    logits = prefill(
        model,
        prompt,
        Pages(src, [blocks[0]]),
        chunk=rng.choice([None, 7]),
        on_layer=lambda layer, start, stop: sending.send_layer(layer, (start, stop)),
    )
    receiving.wait(20)
    sending.wait(20)
    return list(decode(model, greedy(logits), len(prompt), Pages(dst, [blocks[1]]), count))


def pool_for(model: Decoder, tokens: int, layout: str, block_size: int) -> KVPool:
    blocks = -(-tokens // block_size)
    return KVPool.allocate(model.kv_spec, blocks + 3, layout=layout, block_size=block_size, dtype="float32")


PAIRS = list(product(LAYOUTS, LAYOUTS))
SIZES = list(product(BLOCK_SIZES, BLOCK_SIZES))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, list[tuple[list[int], list[int]]]]:
    """A model, and prompts with the tokens of the reference."""
    model, reference = make_model(tmp_path_factory.mktemp("small"), kv_heads=3, head_dim=64)
    rng = random.Random(7)
    prompts = [[rng.randrange(199) for _ in range(length)] for length in (5, 64, 131)]
    return model, [(prompt, reference_tokens(reference, prompt, NEW_TOKENS)) for prompt in prompts]


@pytest.mark.parametrize("index", range(len(PAIRS)), ids=["->".join(pair) for pair in PAIRS])
def test_every_pair_of_layouts(index: int, small: tuple[Decoder, list[tuple[list[int], list[int]]]]) -> None:
    """Each pair with one pair of block sizes (all 16 occur three times or more) and one prompt, 200 tokens."""
    model, cases = small
    prompt, expected = cases[index % len(cases)]
    sizes = SIZES[index % len(SIZES)]
    src = pool_for(model, len(prompt), PAIRS[index][0], sizes[0])
    dst = pool_for(model, len(prompt) + NEW_TOKENS, PAIRS[index][1], sizes[1])
    with linked(src, dst, TransferConfig(slot_bytes=1 << 14)) as nodes:
        assert moved_tokens(model, prompt, NEW_TOKENS, src, dst, nodes, index) == expected


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=["->".join(pair) for pair in PAIRS])
def test_every_pair_of_layouts_and_block_sizes(
    pair: tuple[str, str], small: tuple[Decoder, list[tuple[list[int], list[int]]]]
) -> None:
    model, cases = small
    for index, sizes in enumerate(SIZES):
        prompt, expected = cases[index % len(cases)]
        src = pool_for(model, len(prompt), pair[0], sizes[0])
        dst = pool_for(model, len(prompt) + NEW_TOKENS, pair[1], sizes[1])
        with linked(src, dst, TransferConfig(direct=index % 2 == 0)) as nodes:
            assert moved_tokens(model, prompt, NEW_TOKENS, src, dst, nodes, index) == expected


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kv_heads=st.sampled_from([1, 3, 5, 7]),
    head_dim=st.sampled_from([64, 80, 96, 128, 192, 576]),
    length=st.integers(1, 150),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    sizes=st.tuples(st.sampled_from(BLOCK_SIZES), st.sampled_from(BLOCK_SIZES)),
    direct=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_random_geometry(
    tmp_path_factory: pytest.TempPathFactory,
    kv_heads: int,
    head_dim: int,
    length: int,
    layouts: tuple[str, str],
    sizes: tuple[int, int],
    direct: bool,
    seed: int,
) -> None:
    """Odd head counts and head dims, lengths that fill no block, shuffled blocks: as one process, as the reference."""
    model, reference = make_model(tmp_path_factory.mktemp("random"), kv_heads, head_dim, layers=1)
    prompt = [random.Random(seed).randrange(199) for _ in range(length)]
    expected = reference_tokens(reference, prompt, 8)
    src = pool_for(model, length, layouts[0], sizes[0])
    dst = pool_for(model, length + 8, layouts[1], sizes[1])
    with linked(src, dst, TransferConfig(direct=direct)) as nodes:
        assert moved_tokens(model, prompt, 8, src, dst, nodes, seed) == expected
    assert generate(model, prompt, 8, pool_for(model, length + 8, layouts[0], sizes[0])) == expected
