"""transformers' continuous batching over a pool: its `PagedAttentionCache` is sent from and received into."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hetkv.errors import InputError, PoolFullError
from hetkv.integrations.instance import EngineInstance
from hetkv.integrations.names import wire_name
from hetkv.integrations.sampling import Sampling
from hetkv.transport.content import content_digest
from tests.integrations.checkpoints import llama

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.generation.continuous_batching")
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus  # noqa: E402

from hetkv.integrations.transformers import batching  # noqa: E402
from hetkv.integrations.transformers.batching import BatchingEngine  # noqa: E402
from hetkv.integrations.transformers.engine import TransformersEngine  # noqa: E402
from hetkv.integrations.transformers.paged import PagedMemory  # noqa: E402

PROMPT = list(range(3, 60))
TOKENS = 12
NAMES = ("paged", "small-blocks", "transformers")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("checkpoints") / "gqa", heads=4, kv_heads=2, layers=3)


@pytest.fixture(scope="module")
def instances(checkpoint: Path) -> Iterator[dict[str, EngineInstance]]:
    room: dict[str, Any] = {"slots": 2, "capacity": 200}
    engines = (
        BatchingEngine(str(checkpoint), chunk=20, block_size=16, **room),
        BatchingEngine(str(checkpoint), block_size=4, **room),
        TransformersEngine(str(checkpoint), **room),
    )
    made = {name: EngineInstance(engine, instance=name) for name, engine in zip(NAMES, engines, strict=True)}
    for one in made.values():
        for other in made.values():
            other.connect(one.instance, [one.listen()])
    yield made
    for one in made.values():
        one.close()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9, top_k=20, seed=7)])
@pytest.mark.parametrize("prefill", NAMES)
@pytest.mark.parametrize("decode", NAMES)
def test_pairs(instances: dict[str, EngineInstance], prefill: str, decode: str, sampling: Sampling) -> None:
    """The tokens of the decode engine alone, at the edges of blocks and chunks and within them."""
    source, destination = instances[prefill], instances[decode]
    for length in (1, 15, 16, 17, 40, 57):
        prompt = PROMPT[:length]
        alone = destination.generate(prompt, TOKENS, sampling)
        destination.accept("request", prefill, prompt, TOKENS)
        source.prefill("request", prompt, sampling)
        made = destination.decode("request", TOKENS, distributions=3)
        source.finish("request")
        assert made.tokens == alone.tokens
        assert made.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_as_transformers_itself(instances: dict[str, EngineInstance], checkpoint: Path) -> None:
    """`generate_batch` with a manager and a cache of its own."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    config = transformers.GenerationConfig(do_sample=False, max_new_tokens=TOKENS, eos_token_id=-1)
    outputs = model.generate_batch(
        [PROMPT, PROMPT[:20]], generation_config=config, continuous_batching_config=batching._config(16, 20, 64),
        progress_bar=False,
    )  # fmt: skip
    expected = {len(output.prompt_ids): list(output.generated_tokens) for output in outputs.values()}
    for length, tokens in expected.items():
        assert instances["paged"].generate(PROMPT[:length], TOKENS).tokens == tokens


def test_what_has_arrived_goes_on_in_a_batch(instances: dict[str, EngineInstance]) -> None:
    """Requests that transformers' scheduler puts into one batch: two whose KV was received, and one it computes."""
    source, destination = instances["transformers"], instances["paged"]
    engine = destination.engine
    assert isinstance(engine, BatchingEngine)
    prompts = {"a": PROMPT, "b": PROMPT[10:50], "c": PROMPT[5:9]}
    alone = {name: destination.generate(prompt, TOKENS).tokens for name, prompt in prompts.items()}
    states = {}
    for name, prompt in prompts.items():
        states[name] = state = RequestState(
            request_id=name, initial_tokens=prompt, max_new_tokens=TOKENS, eos_token_id=-1
        )
        if name == "c":
            engine.processor.scheduler.add_waiting_request(state)
            continue
        engine.memory.allocate(state, len(prompt) + TOKENS)
        source.prefill(name, prompt)
        node = destination.nodes.receiver
        blocks, content = engine.memory.blocks_of(name), content_digest(prompt)
        node.receive(wire_name(name), blocks, len(prompt), src_instance="transformers", content=content).wait(30)
        source.finish(name)
        # All but the last token's KV is used: the batch computes that one again and chooses the first token.
        state.remaining_prefill_tokens, state.position_offset = prompt[-1:], len(prompt) - 1
        state.status = RequestStatus.PREFILLING
        engine.processor.scheduler.active_requests[name] = state
    sizes = []
    while engine.processor.prepare_next_batch():
        sizes.append(len(engine.processor.inputs_and_outputs.requests_in_batch))
        engine.manager._generation_step()
        engine.processor.update_batch()
    assert max(sizes) == len(prompts)
    assert {name: list(state.generated_tokens) for name, state in states.items()} == alone


def test_all_blocks_come_back(instances: dict[str, EngineInstance]) -> None:
    engine = instances["paged"].engine
    assert isinstance(engine, BatchingEngine)
    whole = [engine.open(200) for _ in range(2)]
    with pytest.raises(PoolFullError):
        engine.open(200)
    for sequence in whole:
        sequence.close()
    with pytest.raises(PoolFullError, match="room for 200"):
        engine.open(201)
    assert instances["paged"].generate(PROMPT, 2).tokens


def test_shared_blocks_are_rejected(instances: dict[str, EngineInstance]) -> None:
    engine = instances["paged"].engine
    assert isinstance(engine, BatchingEngine)
    cache = engine.processor.cache
    cache.allow_block_sharing = True
    try:
        with pytest.raises(InputError, match="allow_block_sharing=False"):
            PagedMemory(cache, engine.pool.spec)
    finally:
        cache.allow_block_sharing = False


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="no CUDA device")
def test_devices(checkpoint: Path, instances: dict[str, EngineInstance]) -> None:
    """Prefill on a GPU, decode on the last one and on the CPU."""
    last = f"cuda:{torch.cuda.device_count() - 1}"
    room: dict[str, Any] = {"slots": 2, "capacity": 200, "block_size": 16}
    first = EngineInstance(BatchingEngine(str(checkpoint), chunk=20, device="cuda:0", **room), instance="cuda")
    second = EngineInstance(BatchingEngine(str(checkpoint), device=last, **room), instance="cuda-last")
    try:
        for destination in (second, instances["paged"]):
            destination.connect("cuda", [first.listen()])
            alone = destination.generate(PROMPT, TOKENS)
            destination.accept("request", "cuda", PROMPT, TOKENS)
            first.prefill("request", PROMPT)
            made = destination.decode("request", TOKENS)
            first.finish("request")
            assert made.tokens == alone.tokens
    finally:
        second.close()
        first.close()
