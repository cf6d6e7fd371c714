"""Tests of the vLLM connector with real vLLM engines on CPU: `make test-vllm`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

pytest.importorskip("vllm.config", reason="vLLM is not installed: run `make test-vllm`")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the checkpoints of this run are."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """50 prompts of 5 to 1,500 tokens, the edges of blocks among them."""
    draw = random.Random(1)
    lengths = [5, 31, 32, 33, 64, 127, 128, 129, 256, 257, 1000, 1500]
    lengths += [draw.randint(5, 1500) if i % 4 == 0 else draw.randint(5, 300) for i in range(50 - len(lengths))]
    return [[draw.randrange(5, 1000) for _ in range(length)] for length in lengths]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Limits are for what hangs: engines start within a minute, and within several while other work runs."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(1800))
