"""`vllm bench serve`, unchanged, against `hetkv serve`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import hetkv.runtime
from tests.vllm.servers import Process

MODEL = Path(hetkv.runtime.__file__).parent / "data" / "demo"
BENCH = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""What the command `vllm bench serve` does: the entry point itself asks for a package of that name, which the build for
CPUs does not have."""


@pytest.mark.slow
def test_all_requests_succeed(tmp_path: Path) -> None:
    server = Process(tmp_path / "log", ["hetkv", "serve", "--served-name", "demo", "--kv-tokens", "16384"])
    try:
        server.wait()
        options = ["--backend", "openai", "--base-url", server.url, "--model", "demo", "--tokenizer", str(MODEL),
                   "--dataset-name", "random", "--random-input-len", "64", "--random-output-len", "16",
                   "--num-prompts", "40", "--request-rate", "4", "--ignore-eos", "--save-result",
                   "--result-dir", str(tmp_path), "--result-filename", "result.json"]  # fmt: skip
        subprocess.run([sys.executable, "-c", BENCH, *options], check=True, timeout=600)
    finally:
        server.kill(signal.SIGTERM)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (40, 0)
    assert result["total_output_tokens"] == 40 * 16
    print({name: round(result[name], 1) for name in ("median_ttft_ms", "median_tpot_ms", "output_throughput")})
