"""A thousand prompts in lists, with several choices each, through two servers: `pytest -m slow`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.engines import checkpoint
from tests.vllm.lists import batches, check_counts, counted, wrong_choices
from tests.vllm.servers import MODES, Process, cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]
PROMPTS = int(os.environ.get("HETKV_LIST_PROMPTS", "1000"))


@pytest.fixture(scope="module")
def model(models: Path) -> str:
    return checkpoint(models)


@pytest.fixture(scope="module")
def servers(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Process]]:
    with cluster(model, tmp_path_factory.mktemp("servers"), "fail") as started:
        yield started


@pytest.mark.parametrize("mode", MODES)
def test_lists(servers: dict[str, Process], model: str, mode: str) -> None:
    """No wrong token and no failed send; each prompt is loaded once, whatever its choices."""
    before = counted(servers)
    wrong = [wrong_choices(servers, model, mode, batch) for batch in batches(PROMPTS, seed=MODES.index(mode))]
    assert sum(wrong) == 0
    check_counts(servers, before, PROMPTS)
