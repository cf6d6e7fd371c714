"""Engines whose models differ where their geometry does not: rejected at the handshake, by name, on both sides."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from hetkv.errors import IncompatibleError
from hetkv.integrations.pairs import Side, engines
from hetkv.integrations.process import EngineProcess
from tests.engines.conftest import HEADS, ROOM, SECRET, Running, installed
from tests.integrations.checkpoints import llama, with_config, with_vocabulary

ENGINES = list(installed())


@pytest.fixture(scope="module")
def others(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By field: a checkpoint that differs from the first one in it alone."""
    folder, base = tmp_path_factory.mktemp("others"), checkpoints["gqa"]
    heads, kv_heads = HEADS["gqa"]
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}
    return {
        "weights": llama(folder / "weights", heads=heads, kv_heads=kv_heads, seed=1),
        "vocabulary": with_vocabulary(base, folder / "vocabulary"),
        "rope": with_config(base, folder / "rope", **rope),
    }


@pytest.mark.parametrize(
    "fields", [("weights",), pytest.param(("vocabulary", "rope"), marks=pytest.mark.slow)], ids="-".join
)
@pytest.mark.parametrize("engine", ENGINES)
def test_another_model(
    running: Running,
    others: dict[str, Path],
    sides: Mapping[str, Side],
    engine: str,
    fields: tuple[str, ...],
) -> None:
    """An engine with each of them, as the side that connects and as the side that listens."""
    right = running.of("gqa")["reference" if engine != "reference" else "transformers"]
    address = right.call("listen")
    for field in fields:
        named = {f"wrong-{field}": msgspec.structs.replace(sides[engine], engine=engine)}
        with engines(str(others[field]), named, [(name, name) for name in named], ROOM, SECRET) as started:
            (wrong,) = started.values()
            for connecting, listening, at in ((wrong, right, address), (right, wrong, wrong.call("listen"))):
                before = warnings_of(listening, f"fingerprint.{field}")
                with pytest.raises(IncompatibleError) as error:
                    connecting.call("connect", source=listening.start.instance, addresses=[at])
                assert error.value.field == f"fingerprint.{field}"
                deadline = time.monotonic() + 30
                while warnings_of(listening, f"fingerprint.{field}") == before:
                    assert time.monotonic() < deadline, "the side that listens did not warn"
                    time.sleep(0.05)


def warnings_of(process: EngineProcess, text: str) -> int:
    """How many warnings with this text a process has logged."""
    return sum(text in line for line in process.call("warned"))
