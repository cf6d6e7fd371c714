"""Tests of engines in interpreters of their own: `make test-engines`, which says where they are in `HETKV_ENGINES`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path

import msgspec
import pytest

from hetkv.errors import HetkvError
from hetkv.integrations.pairs import Side, engines
from hetkv.integrations.process import EngineProcess
from tests.integrations.checkpoints import llama

ROOM = {"capacity": 1024, "slots": 2}
"""Options of all engines."""
SECRET = b"shared by the right and the wrong ones"
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


class Running:
    """All engines with one of the checkpoints at a time, in float32: started once for all tests that use them."""

    def __init__(self, checkpoints: Mapping[str, Path], sides: Mapping[str, Side]) -> None:
        self._checkpoints, self._sides = checkpoints, sides
        self._name, self._stack = "", ExitStack()
        self._failed: HetkvError | None = None
        self._processes: dict[str, EngineProcess] = {}

    def of(self, name: str) -> dict[str, EngineProcess]:
        """Those of a checkpoint; others end."""
        if self._failed is not None:  # starting them again for each test would take long
            raise self._failed
        if name != self._name:
            self.close()
            pairs = [(side, side) for side in self._sides]
            started = engines(str(self._checkpoints[name]), self._sides, pairs, ROOM, SECRET)
            try:
                self._processes = self._stack.enter_context(started)
            except HetkvError as error:
                self._failed = error
                raise
            self._name = name
        return self._processes

    def close(self) -> None:
        self._name = ""
        self._stack.close()


@pytest.fixture(scope="session")
def running(checkpoints: dict[str, Path], sides: Mapping[str, Side]) -> Iterator[Running]:
    with closing(Running(checkpoints, sides)) as started:
        yield started


@pytest.fixture(scope="module", params=["gqa", pytest.param("mha", marks=pytest.mark.slow)])
def processes(request: pytest.FixtureRequest, running: Running) -> dict[str, EngineProcess]:
    return running.of(request.param)
