"""`hetkv demo --shape`: random weights of a named shape through two real processes, and shapes that cannot run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from hetkv.cli import main  # noqa: E402
from hetkv.runtime.synthetic import SHAPES, _shape, shape, weight_bytes  # noqa: E402

SMALL = _shape("Qwen3ForCausalLM", 199, 256, 384, 3, 4, 2, 1e4)


def test_a_shape_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(SHAPES, "small", SMALL)
    out, trace = tmp_path / "times.json", tmp_path / "trace.json"
    argv = ["--layers", "2", "--prompt-tokens", "70", "--tokens", "3", "--requests", "3", "--json", str(out)]
    assert main(["demo", "--shape", "small", *argv, "--trace", str(trace)]) == 0
    result = json.loads(out.read_bytes())
    assert result["layers"] == 2
    assert result["weight_bytes"] == weight_bytes(shape("small", 2), torch.bfloat16)
    assert len(result["requests"]) == 3
    # K and V of 2 heads x 128 channels, 2 bytes each, of the timed requests alone.
    assert result["payload_bytes"] == 3 * 70 * 2 * (2 * 2 * 128 * 2)
    assert result["ttft_ms"] >= result["prefill_ms"] > 0
    assert result["transfer_ms"] >= result["exposed_transfer_ms"] >= 0
    assert result["tpot_ms"] > 0
    assert result["devices"] == ["cpu", "cpu"]
    assert {event["cat"] for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"} == {
        "compute", "pack", "wire", "unpack",
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "2 layers of small" in said
    assert "3 of 70 tokens and 3 new ones; times are medians" in said


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU, and PyTorch built for it")
def test_a_shape_is_timed_on_gpus(tmp_path: Path) -> None:
    """Between two GPUs where there are two; and one that does not fit is one line."""
    out, last = tmp_path / "times.json", f"cuda:{min(1, torch.cuda.device_count() - 1)}"
    where = ["--prefill-device", "cuda:0", "--decode-device", last]
    assert main(["demo", "--shape", "llama-2-7b", "--layers", "4", *where, "--json", str(out)]) == 0
    result = json.loads(out.read_bytes())
    assert result["devices"] == ["cuda:0", last]
    assert result["payload_bytes"] == 5 * 1024 * 4 * (2 * 32 * 128 * 2)
    assert result["ttft_ms"] >= result["prefill_ms"] > 0
    assert main(["demo", "--shape", "llama-3-70b", "--compute-dtype", "float32", *where]) == 2


def test_the_weights_are_those_of_the_named_models() -> None:
    """Parameters as the models' cards round them: 6.7, 70.6 and 32.8 thousand million."""
    sizes = {name: weight_bytes(config, torch.bfloat16) / 2e9 for name, config in SHAPES.items()}
    assert sizes == {
        "llama-2-7b": pytest.approx(6.74, abs=0.01),
        "llama-3-70b": pytest.approx(70.55, abs=0.01),
        "qwen3-32b": pytest.approx(32.76, abs=0.01),
    }


def test_a_shape_that_does_not_fit_is_rejected_before_any_start(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hetkv.runtime.timing._memory", lambda device: 100 * 10**9)
    assert main(["demo", "--shape", "llama-3-70b"]) == 2
    words = r"weights \(bfloat16\) and KV of 80 layers of llama-3-70b need 28\d\.\d GB on cpu, which has 100\.0 GB"
    assert re.search(words, capfd.readouterr().err)
