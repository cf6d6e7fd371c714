"""Instances whose models differ where their geometry does not: rejected at the handshake, with a name on both sides."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from tests.vllm.engines import Engine, Pair, checkpoint, until

PROMPT, TOKENS = list(range(5, 305)), 8


def with_vocabulary(model: str, folder: Path, first: str) -> str:
    """A copy of a checkpoint with a tokenizer."""
    shutil.copytree(model, folder)
    Tokenizer(WordLevel({first: 0, "b": 1}, unk_token="b")).save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.fixture(scope="module")
def model(models: Path) -> str:
    return with_vocabulary(checkpoint(models), models / "with-vocabulary", "a")


@pytest.fixture(scope="module")
def producer(model: str) -> Iterator[Engine]:
    engine = Engine(model, "kv_producer", 32)
    yield engine
    engine.close()


def other_of(name: str, model: str, models: Path) -> tuple[str, dict[str, Any]]:
    """A model of the same geometry that differs in one thing."""
    if name == "weights":
        return checkpoint(models, seed=1), {}
    if name == "vocabulary":
        return with_vocabulary(checkpoint(models), models / "another-vocabulary", "c"), {}
    config = json.loads((Path(model) / "config.json").read_text())
    rope = {**(config.get("rope_parameters") or {"rope_type": "default"}), "rope_theta": 20000.0}
    return model, {"hf_overrides": {"rope_parameters": rope}}


@pytest.mark.parametrize("name", ["weights", "vocabulary", "rope"])
def test_another_model(producer: Engine, model: str, models: Path, name: str) -> None:
    """Nothing is loaded: the consumer computes its prompt, and both sides have said what differs."""
    path, options = other_of(name, model, models)
    consumer = Engine(path, "kv_consumer", 128, policy="recompute", **options)
    output = Pair(producer, consumer).prefill_first(PROMPT, TOKENS)
    assert output.computed == len(PROMPT) + TOKENS - 1
    for engine in (producer, consumer):
        until(lambda engine=engine: any(f"fingerprint.{name}: this side has" in text for text in engine.call("warned")))
    consumer.close()


def test_the_same_model(producer: Engine, model: str) -> None:
    consumer = Engine(model, "kv_consumer", 128, policy="fail")
    assert Pair(producer, consumer).prefill_first(PROMPT, TOKENS).computed == TOKENS
    consumer.close()
