"""Next to vLLM's NixlConnector on the same checkpoint. Their times are compared by `bench/vllm/pd.py`, not here."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.vllm.engines import Engine, Output, Pair, checkpoint

TOKENS = 8
TRIES = 3
NIXL = {"connector": "NixlConnector", "module": None, "extra": {}, "kv_buffer_device": "cpu"}


def first_try(pair: Pair, prompt: list[int]) -> Output:
    """The first request connects. On a busy machine NIXL's handshake may run out of time; then it is asked again."""
    for _ in range(TRIES):
        output = pair.prefill_first(prompt, TOKENS)
        if output.finish_reason == "length":
            break
    return output


@pytest.mark.slow
def test_same_tokens_as_nixl(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """128 to 128, the only pair that both serve."""
    pytest.importorskip("nixl", reason="NIXL is not installed")
    model, draw = checkpoint(models), random.Random(1)
    prompts = [[draw.randrange(5, 1000) for _ in range(length)] for length in (1000, 129, 40)]
    sides = []
    for role, port in (("kv_producer", "18601"), ("kv_consumer", "18602")):
        monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", port)
        sides.append(Engine(model, role, 128, **NIXL))
    theirs = Pair(*sides)
    ours = Pair(Engine(model, "kv_producer", 128), Engine(model, "kv_consumer", 128))
    for prompt in prompts:
        output, other = ours.prefill_first(prompt, TOKENS), first_try(theirs, prompt)
        assert (output.tokens, output.computed) == (other.tokens, other.computed)
    ours.settled()
    ours.close()
    for engine in sides:
        engine.kill()  # NIXL takes long to say goodbye
