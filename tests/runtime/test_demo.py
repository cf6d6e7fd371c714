"""`hetkv demo`: two real processes over real UCX, and its command line."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from hetkv.cli import main

pytest.importorskip("torch")

FIELDS = {
    "identical", "generated_tokens", "layers", "frames", "payload_bytes", "ttft_ms", "exposed_transfer_ms",
    "transfer_ms", "prefill", "decode", "text",
}  # fmt: skip


def demo(tmp_path: Path, *options: str) -> dict:
    out = tmp_path / "demo.json"
    assert main(["demo", "--json", str(out), *options]) == 0
    return json.loads(out.read_bytes())


def test_default_demo_is_identical_and_draws(tmp_path: Path) -> None:
    plot, trace = tmp_path / "timeline.svg", tmp_path / "timeline.json"
    result = demo(tmp_path, "--plot", str(plot), "--trace", str(trace))
    assert result["identical"] is True
    assert set(result) >= FIELDS
    assert result["generated_tokens"] >= 64
    assert result["text"] == result["reference_text"]
    assert result["prefill"] == {"block_size": 16, "layout": "nhd", "dtype": "bfloat16"}
    assert result["decode"] == {"block_size": 64, "layout": "rocm", "dtype": "bfloat16"}
    # Every byte of every layer travels once: K and V, all heads, 2 bytes an element.
    spec = json.loads((Path(result["model"]) / "config.json").read_text())
    width = spec["num_key_value_heads"] * spec["head_dim"] * 2 * 2
    assert result["payload_bytes"] == result["prompt_tokens"] * width * spec["num_hidden_layers"]
    assert result["layers"] == spec["num_hidden_layers"]
    assert result["ttft_ms"] >= result["prefill_ms"] > 0
    assert ET.parse(plot).getroot().tag.endswith("svg")
    events = json.loads(trace.read_text())["traceEvents"]
    rows = {(event["cat"], event["args"]["layer"]) for event in events if event["ph"] == "X"}
    assert rows == {(row, layer) for row in ("compute", "pack", "wire", "unpack") for layer in range(result["layers"])}


@pytest.mark.parametrize(
    "options",
    [
        ("--rendezvous", "prefill_first", "--prefill-layout", "packed_hnd", "--decode-layout", "hnd"),
        ("--chunk", "7", "--prefill-block", "1", "--decode-block", "128", "--prefill-dtype", "float32",
         "--decode-dtype", "float32"),
    ],
    ids=["prefill_first", "chunked"],
)  # fmt: skip
def test_other_pools_and_orders(tmp_path: Path, options: tuple[str, ...]) -> None:
    assert demo(tmp_path, "--tokens", "24", *options)["identical"] is True


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--model", "/nonexistent"), "/nonexistent"),
        (("--prefill-dtype", "float9"), "float9"),
        (("--decode-block", "0"), "block size 0"),
        (("--prefill-block", "0"), "block size 0"),
        (("--threads", "0"), "0 threads"),
        (("--compute-dtype", "int8"), "int8"),
        (("--decode-dtype", "int8"), "int8"),
        (("--json", "/nonexistent/x.json"), "/nonexistent"),
        (("--trace", "/nonexistent/x.json"), "/nonexistent"),
        (("--tokens", "0"), "0 new tokens"),
        (("--shape", "llama-9"), "known are llama-2-7b, llama-3-70b, qwen3-32b"),
        (("--shape", "llama-2-7b", "--layers", "33"), "33 layers of llama-2-7b: it has 32"),
        (("--shape", "llama-2-7b", "--layers", "0"), "0 layers of llama-2-7b"),
        (("--shape", "llama-2-7b", "--prompt-tokens", "0"), "0 prompt tokens"),
        (("--shape", "llama-2-7b", "--prompt-tokens", "32768"), "the context of llama-2-7b is 32768"),
        (("--shape", "llama-2-7b", "--compute-dtype", "int8"), "compute dtype int8"),
        (("--shape", "llama-2-7b", "--prefill", "TP2"), "--prefill does not go with --shape"),
        (("--shape", "llama-2-7b", "--prompt", "so"), "--prompt does not go with --shape"),
        (("--layers", "1"), "--layers goes with --shape"),
        (("--prompt-tokens", "1"), "--prompt-tokens goes with --shape"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    options: tuple[str, ...], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *options]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("hetkv")]
    assert len(lines) == 1
    assert said in lines[0]
