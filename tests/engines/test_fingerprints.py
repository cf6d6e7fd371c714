"""Engines whose models differ where their geometry does not: rejected at the handshake, by name, on both sides."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from hetkv.errors import IncompatibleError
from hetkv.integrations.pairs import Side, engines
from tests.engines.conftest import HEADS, ROOM, installed
from tests.integrations.checkpoints import llama, with_config, with_vocabulary

ENGINES = list(installed())
SECRET = b"shared by the right and the wrong ones"


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
    checkpoints: dict[str, Path],
    others: dict[str, Path],
    sides: Mapping[str, Side],
    engine: str,
    fields: tuple[str, ...],
) -> None:
    """An engine with each of them, as the side that connects and as the side that listens."""
    right = "reference" if engine != "reference" else "transformers"
    with engines(str(checkpoints["gqa"]), sides, [(right, right)], ROOM, SECRET) as running:
        address = running[right].call("listen")
        for field in fields:
            other = others[field]
            with engines(str(other), sides, [(engine, engine)], ROOM, SECRET) as wrong:
                for connecting, listening, at in (
                    (wrong[engine], running[right], address),
                    (running[right], wrong[engine], wrong[engine].call("listen")),
                ):
                    with pytest.raises(IncompatibleError) as error:
                        connecting.call("connect", source=listening.start.instance, addresses=[at])
                    assert error.value.field == f"fingerprint.{field}"
                    until_warned(listening, f"fingerprint.{field}")


def until_warned(process: object, text: str) -> None:
    """Wait until a process has logged it."""
    deadline = time.monotonic() + 30
    while not any(text in line for line in process.call("warned")):  # type: ignore[attr-defined]
        assert time.monotonic() < deadline, f"no warning with {text}"
        time.sleep(0.05)
