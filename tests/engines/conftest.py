"""Tests of engines in interpreters of their own: `make test-engines`, which says where they are in `HETKV_ENGINES`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import pytest

from hetkv.integrations.pairs import Side, engines
from hetkv.integrations.process import EngineProcess
from tests.integrations.checkpoints import llama

ROOM = {"capacity": 1024, "slots": 2}
"""Options of all engines."""
HEADS = {"gqa": (4, 2), "mha": (2, 2)}
"""Query heads and KV heads of the checkpoints."""


def installed() -> dict[str, Side]:
    """The engines that these tests run, each with its interpreter: `{"mlx": {"python": "..."}}` in the environment."""
    given = msgspec.json.decode(os.environ.get("HETKV_ENGINES", "{}"), type=dict[str, Side])
    names = ("reference", "transformers", "transformers-paged")
    own = {name: Side(python=sys.executable) for name in names}
    return {**own, **given}


@pytest.fixture(scope="session")
def sides() -> Mapping[str, Side]:
    return installed()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama with grouped queries and one without."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: llama(folder / name, heads=heads, kv_heads=kv) for name, (heads, kv) in HEADS.items()}


@pytest.fixture(scope="module", params=["gqa", pytest.param("mha", marks=pytest.mark.slow)])
def processes(
    request: pytest.FixtureRequest, checkpoints: dict[str, Path], sides: Mapping[str, Side]
) -> Iterator[dict[str, EngineProcess]]:
    """All engines with one of the checkpoints, in float32."""
    pairs = [(name, name) for name in sides]
    with engines(str(checkpoints[request.param]), sides, pairs, ROOM) as running:
        yield running
