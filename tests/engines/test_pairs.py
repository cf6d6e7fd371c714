"""Prefill in one engine, decode in another: the greedy tokens are those of the decode engine alone."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from hetkv.errors import ContentError
from hetkv.integrations.pairs import Pairs
from hetkv.integrations.process import EngineProcess
from tests.engines.conftest import installed

NEW_TOKENS = 64
LENGTHS = (5, 6, 7, 9, 13, 16, 17, 24, 31, 32, 33, 40, 48, 63, 65, 90, 127, 129, 256, 800)
"""Tokens of the prompts; at the edges of blocks, of chunks and of MLX's steps among them."""
FEW = (5, 33, 800)
"""Of those, for the run in CI."""
ENGINES = list(installed())


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    draw = random.Random(2)
    return [[draw.randrange(3, 3000) for _ in range(length)] for length in LENGTHS]


@pytest.fixture(scope="module")
def pairs(processes: dict[str, EngineProcess]) -> Pairs:
    return Pairs(processes, NEW_TOKENS, distributions=1)


@pytest.mark.parametrize("lengths", [FEW, pytest.param(LENGTHS, marks=pytest.mark.slow)], ids=["few", "all"])
@pytest.mark.parametrize("decode", ENGINES)
@pytest.mark.parametrize("prefill", ENGINES)
def test_tokens(pairs: Pairs, prompts: list[list[int]], prefill: str, decode: str, lengths: tuple[int, ...]) -> None:
    """Prompts of 5 to 800 tokens x 64 tokens, float32, half of them in each of the two ways to meet."""
    chosen = [prompt for prompt in prompts if len(prompt) in lengths]
    assert len(chosen) == len(lengths)
    half = (len(chosen) + 1) // 2
    for mode, some in (("concurrent", chosen[:half]), ("prefill_first", chosen[half:])):
        result = pairs.run(prefill, decode, some, mode)  # type: ignore[arg-type]
        different = {r.prompt_tokens: r.first_difference for r in result.requests if r.first_difference is not None}
        assert not different, f"{mode}: first differing token by prompt length"


@pytest.mark.parametrize("engine", ENGINES)
def test_kv_decides_on_the_tokens(pairs: Pairs, prompts: list[list[int]], engine: str) -> None:
    """Otherwise equal tokens would say nothing: prompts that end alike are continued differently."""
    tails = [pairs.alone(engine, [*prompt[:-3], 7, 8, 9]).tokens for prompt in prompts[:4]]
    assert len({tuple(tokens) for tokens in tails}) == len(tails)


def test_another_prompt_is_rejected(processes: Mapping[str, EngineProcess], pairs: Pairs) -> None:
    """One id for two prompts: an error on both sides, in every engine that names requests itself."""
    for name in ENGINES:
        other = "reference" if name != "reference" else "transformers"
        pairs.run(name, other, [[3, 4, 5]])
        source, destination = processes[name], processes[other]
        accept = {"source": name, "tokens": [5, 4, 3, 2], "max_new_tokens": 4}
        destination.call("accept", request_id=f"{name}-mixed-up", **accept)
        source.call("prefill", request_id=f"{name}-mixed-up", tokens=[3, 4, 5, 6])
        with pytest.raises(ContentError):
            destination.call("decode", request_id=f"{name}-mixed-up", max_new_tokens=4)
        with pytest.raises(ContentError):
            source.call("finish", request_id=f"{name}-mixed-up")
