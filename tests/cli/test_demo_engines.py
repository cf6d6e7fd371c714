"""`hetkv demo` with two engines, each in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hetkv.cli import main

PAIR = ["demo", "--prefill-engine", "reference", "--decode-engine", "transformers"]


def test_a_pair(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    prompts = ["--prompt", "And it came to pass", "--prompt", "In the beginning God created the heaven and"]
    assert main([*PAIR, *prompts, "--tokens", "12", "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert [found[role]["engine"] for role in ("prefill", "decode")] == ["reference", "transformers"]
    assert found["identical"] == len(found["requests"]) == 2
    for request in found["requests"]:
        assert request["tokens"] == request["alone"]
        assert len(request["tokens"]) == 12
        assert request["kl"] < 1e-6
    assert capfd.readouterr().out.count("identical") == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "--prefill-engine", "mlx"], "go together"),
        (["demo", "--prefill-python", "python3"], "--prefill-python goes with --prefill-engine"),
        (["demo", "--decode-python", "python3"], "--decode-python goes with --decode-engine"),
        ([*PAIR, "--shape", "llama-2-7b"], "--shape does not go with"),
        ([*PAIR[:-1], "tensorrt"], "engine 'tensorrt' is not known"),
        ([*PAIR, "--chat", "--prompt", "x"], "prompts that are texts"),
    ],
)
def test_what_cannot_be(arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert said in capfd.readouterr().err
