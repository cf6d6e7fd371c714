"""A cache of transformers in a pool: what a model writes is sent, what arrives is read; `DynamicCache` in and out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hetkv.errors import IncompatibleError, InputError, PoolFullError
from hetkv.integrations.instance import EngineInstance
from hetkv.integrations.sampling import Sampling
from hetkv.kv.spec import KVSpec, LayerSpec
from hetkv.transport.exchange import Exchange
from tests.integrations.checkpoints import llama

transformers = pytest.importorskip("transformers")
from hetkv.integrations.reference.engine import ReferenceEngine  # noqa: E402
from hetkv.integrations.transformers.cache import CacheMemory, PooledCache, cache_keyword  # noqa: E402
from hetkv.integrations.transformers.engine import TransformersEngine  # noqa: E402

PROMPT = list(range(3, 60))
TOKENS = 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("checkpoints") / "gqa", heads=4, kv_heads=2)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def greedy(model: Any, cache: Any, ids: list[int], count: int) -> list[int]:
    """transformers' own generation, over a cache that holds all of `ids` but the last."""
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, cache_keyword(model): cache}
    out = model.generate(torch.tensor([ids]), **options)
    return list(out[0, len(ids) :].tolist())


def test_what_the_model_writes_is_in_the_pool(model: Any) -> None:
    """The same KV as in a `DynamicCache`, reported layer by layer, in chunks."""
    memory = CacheMemory.of(model, slots=2, capacity=64)
    memory.take()
    cache, plain = memory.take(), transformers.DynamicCache()
    seen: list[tuple[int, int, int]] = []
    cache.on_write = lambda *what: seen.append(what)
    with torch.inference_mode():
        for part in (PROMPT[:40], PROMPT[40:]):
            for each in (cache, plain):
                model(torch.tensor([part]), **{cache_keyword(model): each})
    assert seen == [(0, 0, 40), (1, 0, 40), (0, 40, 57), (1, 40, 57)]
    for layer in range(2):
        for segment, tensor in (("k", plain.layers[layer].keys), ("v", plain.layers[layer].values)):
            stored = memory.pool.view(layer, segment)[cache.blocks[0][0], : len(PROMPT)].swapaxes(0, 1)
            torch.testing.assert_close(stored, tensor[0], rtol=0, atol=1e-6)


def test_generate_over_what_has_arrived(model: Any) -> None:
    """Two pools, one transfer, and transformers' own `generate` on both kinds of cache after it."""
    expected = greedy(model, transformers.DynamicCache(), PROMPT, TOKENS)
    filled = transformers.DynamicCache()
    with torch.inference_mode():
        model(torch.tensor([PROMPT[:-1]]), **{cache_keyword(model): filled})
    source, destination = (CacheMemory.of(model, slots=3, capacity=size) for size in (64, 100))
    with Exchange(source.pool, instance="p") as p, Exchange(destination.pool, instance="d") as d:
        d.receiver.connect(p.sender.listen())
        out, arrived = source.take(), destination.take()
        out.store(filled)
        request = p.sender.send("request", out.blocks, len(PROMPT) - 1)
        request.send_layers()
        d.receiver.receive("request", arrived.blocks, len(PROMPT) - 1).wait(30)
        request.wait(30)
    arrived.fill(len(PROMPT) - 1)
    copy = arrived.dynamic()
    assert greedy(model, arrived, PROMPT, TOKENS) == expected
    out.close()
    arrived.close()
    assert greedy(model, copy, PROMPT, TOKENS) == expected


def test_beams_leave_the_pool(model: Any) -> None:
    memory = CacheMemory.of(model, slots=1, capacity=100)
    cache = memory.take()
    options = {"max_new_tokens": TOKENS, "num_beams": 2, "do_sample": False, "eos_token_id": None}
    ids = torch.tensor([PROMPT])
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options, **{cache_keyword(model): cache}), expected)


def test_a_full_cache_is_an_error(model: Any) -> None:
    memory = CacheMemory.of(model, slots=1, capacity=20)
    cache = memory.take(20)
    with pytest.raises(PoolFullError, match="room for 20"), torch.inference_mode():
        model(torch.tensor([PROMPT]), **{cache_keyword(model): cache})
    with pytest.raises(PoolFullError, match="in use"):
        memory.take()
    cache.close()
    with pytest.raises(PoolFullError, match="room for 20"):
        memory.take(21)
    assert isinstance(memory.take(), PooledCache)


def test_layers_that_are_not_plain_are_rejected() -> None:
    for layer in (LayerSpec.kv(2, 8, sliding_window=4), LayerSpec.latent(8, 4)):
        with pytest.raises(InputError, match="layer 1"):
            CacheMemory(KVSpec((LayerSpec.kv(2, 8), layer)), slots=1, capacity=8, dtype=torch.float32)


@pytest.fixture(scope="module")
def instances(checkpoint: Path) -> Iterator[dict[str, EngineInstance]]:
    made = {
        "transformers": EngineInstance(TransformersEngine(str(checkpoint), chunk=20), instance="transformers"),
        "reference": EngineInstance(ReferenceEngine(str(checkpoint)), instance="reference"),
    }
    for one in made.values():
        for other in made.values():
            other.connect(one.instance, [one.listen()])
    yield made
    for one in made.values():
        one.close()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9, top_k=20, seed=7)])
@pytest.mark.parametrize("prefill", ["transformers", "reference"])
@pytest.mark.parametrize("decode", ["transformers", "reference"])
def test_pairs(instances: dict[str, EngineInstance], prefill: str, decode: str, sampling: Sampling) -> None:
    """The tokens of the decode engine alone, also where it goes on with the prefill engine's sampling."""
    source, destination = instances[prefill], instances[decode]
    alone = destination.generate(PROMPT, TOKENS, sampling)
    destination.accept("request", prefill, PROMPT, TOKENS)
    source.prefill("request", PROMPT, sampling)
    made = destination.decode("request", TOKENS, distributions=3)
    source.finish("request")
    assert made.tokens == alone.tokens
    assert made.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
    assert [kept is None for kept in made.distributions] == [True, False, False]


def test_another_model_is_rejected(tmp_path: Path, instances: dict[str, EngineInstance]) -> None:
    other = llama(tmp_path / "other", heads=4, kv_heads=2, seed=1)
    address = instances["reference"].listen()
    one = EngineInstance(TransformersEngine(str(other)), instance="other")
    with pytest.raises(IncompatibleError, match=r"fingerprint\.weights"):
        one.connect("reference", [address])
    one.close()
