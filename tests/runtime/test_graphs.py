"""Steps of fixed shape, which CUDA graphs record, compute and write what ragged ones do."""

from __future__ import annotations

import gc
import random
import weakref

import pytest
import torch

from hetkv.kv.pool import KVPool
from hetkv.models import ModelConfig, Rope
from hetkv.runtime import Decoder
from hetkv.runtime.batch import Batch, Span
from hetkv.runtime.graphs import FixedBatch, fixed_inputs, fixed_shape
from hetkv.runtime.paged import BlockAllocator, Pages
from hetkv.runtime.synthetic import random_decoder

PLAIN = ModelConfig(
    family="llama", vocab_size=97, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2,
    head_dim=8, max_context=4096, rope=Rope(theta=1e4), sliding_windows=(None,) * 3,
)  # fmt: skip
WINDOWS = ModelConfig(
    family="mistral", vocab_size=97, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=1,
    head_dim=8, max_context=4096, rope=Rope(theta=1e4), sliding_windows=(19, 19, 19),
)  # fmt: skip
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and PyTorch built for it")


def pool_of(model: Decoder, block_size: int, layout: str = "nhd", dtype: str = "float32") -> KVPool:
    return KVPool.allocate(
        model.kv_spec, 4096 // block_size, block_size=block_size, layout=layout, dtype=dtype, device=model.device
    )


def fill(pool: KVPool, seed: int) -> None:
    generator = torch.Generator(pool.device).manual_seed(seed)
    for layer in pool.layers:
        for name, _, _ in pool.spec.layers[layer].segments:
            view = pool.view(layer, name)
            view.copy_(torch.randn(view.shape, generator=generator, device=view.device))


def spans_of(pool: KVPool, lengths: list[int], seed: int) -> list[Span]:
    draw, blocks = random.Random(seed), BlockAllocator(pool)
    return [
        Span(Pages(pool, blocks.allocate(length)), length - 1, (draw.randrange(PLAIN.vocab_size),))
        for length in lengths
    ]


def contents(pool: KVPool) -> list[torch.Tensor]:
    return [pool.view(layer, name).clone() for layer in pool.layers for name, _, _ in pool.spec.layers[layer].segments]


@pytest.mark.parametrize("config", [PLAIN, WINDOWS], ids=["plain", "windows"])
@pytest.mark.parametrize(
    ("block_size", "layout", "dtype"), [(16, "nhd", "float32"), (64, "hnd", "bfloat16"), (1, "rocm", "float32")]
)
def test_logits_and_pool_equal_those_of_a_ragged_batch(
    config: ModelConfig, block_size: int, layout: str, dtype: str
) -> None:
    model = random_decoder(config, torch.float32)
    for seed, lengths in enumerate([[1], [16, 17, 130], [5, 512, 300, 19, 20], [600, 31, 64]]):
        results = []
        for fixed in (False, True):
            pool = pool_of(model, block_size, layout, dtype)
            fill(pool, seed)
            spans = spans_of(pool, lengths, seed)
            batch: Batch | FixedBatch = Batch(spans)
            if fixed:
                shape = fixed_shape(spans)
                assert shape is not None
                batch = FixedBatch(pool, torch.from_numpy(fixed_inputs(pool, spans, *shape)), shape[1])
            with torch.inference_mode():
                logits = model._compute(batch)
            assert logits is not None
            results.append((logits[: len(spans)], contents(pool)))
        (expected, before), (got, after) = results
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
        for mine, theirs in zip(after, before, strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=8e-3)


def test_blocks_of_later_tokens_are_not_read() -> None:
    """What others left in them may be no number, which a mask does not keep out of a sum."""
    model = random_decoder(PLAIN, torch.float32)
    pool = pool_of(model, 16)
    fill(pool, 1)
    blocks = BlockAllocator(pool).allocate(600)
    for layer in pool.layers:
        for name, _, _ in pool.spec.layers[layer].segments:
            pool.view(layer, name)[blocks[0][2:]] = float("nan")
    spans = [Span(Pages(pool, blocks), 31, (3,))]
    shape = fixed_shape(spans)
    assert shape is not None
    with torch.inference_mode():
        logits = model._compute(FixedBatch(pool, torch.from_numpy(fixed_inputs(pool, spans, *shape)), shape[1]))
        expected = model._compute(Batch(spans))
    assert logits is not None
    assert expected is not None
    torch.testing.assert_close(logits[:1], expected, atol=2e-5, rtol=2e-5)


def test_a_model_ends_with_the_last_reference_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are GPU memory, for which no garbage collector is called in time."""
    monkeypatch.setattr(Decoder, "_records", True)
    gc.disable()
    try:
        model = random_decoder(PLAIN, torch.float32)
        assert model._graphs is not None
        there = weakref.ref(model)
        del model
        assert there() is None
    finally:
        gc.enable()


def test_what_no_graph_fits() -> None:
    model = random_decoder(PLAIN, torch.float32)
    pool, other = pool_of(model, 16), pool_of(model, 16)
    one = spans_of(pool, [40, 90, 3], 0)
    assert fixed_shape(one) == (3, 512)
    assert fixed_shape(spans_of(pool_of(model, 16), [600, 30, 30, 30, 30], 0)) == (6, 768)
    assert fixed_shape([*one, *spans_of(other, [3], 0)]) is None, "two pools"
    assert fixed_shape([one[0], Span(one[1].pages, 0, (1, 2))]) is None, "a chunk of a prompt"
    assert fixed_shape(spans_of(pool_of(model, 16), [2100] + [20] * 10, 0)) is None, "most tokens read were padding"


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("config", [PLAIN, WINDOWS], ids=["plain", "windows"])
@pytest.mark.parametrize("dtype", ["float32", "float8_e4m3fn"])
def test_recorded_steps_equal_those_that_are_launched_one_by_one(config: ModelConfig, dtype: str) -> None:
    """Sequences come and go, so graphs are recorded and replayed in turn; every pool of the model has its own."""
    model = random_decoder(config, torch.float32, "cuda")
    steps: list[list[list[int]]] = []
    for graphs in (True, False):
        recorder, model._graphs = model._graphs, model._graphs if graphs else None
        for _ in range(2):
            pool = pool_of(model, 16, dtype=dtype)
            steps.append(grow(model, pool))
            if graphs:
                assert recorder is not None
                assert len(recorder._recorded[pool]) >= 3
        model._graphs = recorder
    assert steps[0] == steps[1] == steps[2] == steps[3]
    del pool
    assert recorder is not None
    assert len(recorder._recorded) <= 1


def grow(model: Decoder, pool: KVPool) -> list[list[int]]:
    """Greedy tokens of one to five sequences at once, the longest past two shapes of a graph."""
    for memory in pool.layers.values():
        for tensor in memory.tensors.values():
            tensor.zero_()
    allocator, draw = BlockAllocator(pool), random.Random(5)
    prompts = [[draw.randrange(97) for _ in range(count)] for count in (500, 20, 33, 7, 100)]
    pages = [Pages(pool, allocator.allocate(len(prompt) + 40)) for prompt in prompts]
    texts = [list(prompt) for prompt in prompts]
    for text, mine in zip(texts, pages, strict=True):
        logits = model.prefill(text, 0, mine)
        assert logits is not None
        text.append(int(logits.argmax()))
    for step in range(36):
        running = range(5 if step < 20 else 2)
        logits = model.forward([Span(pages[i], len(texts[i]) - 1, (texts[i][-1],)) for i in running])
        assert logits is not None
        for i, token in zip(running, logits.argmax(-1).tolist(), strict=True):
            texts[i].append(token)
    return texts
