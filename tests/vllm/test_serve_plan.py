"""`hetkv serve --plan` with vLLM: what the planner writes is started, and one server answers for it."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import yaml

from tests.vllm.engines import checkpoint
from tests.vllm.servers import Process, body_of, tokens_of

PLAN = {
    "engine": {"name": "vllm", "weight_dtype": "fp16", "max_num_seqs": 8, "max_num_batched_tokens": 2048},
    "pools": [
        {"role": "prefill", "gpu": "H100", "engine": {"block_size": 32}},
        {"role": "decode", "gpu": "H100", "engine": {"block_size": 64}},
    ],
    "link": {"gb_s": 25},
}
ARGUMENTS = "--skip-tokenizer-init --dtype float32 --enforce-eager --max-model-len 1024"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_plan_is_started_and_answers(models: Path, tmp_path: Path, prompts: list[list[int]]) -> None:
    model = shutil.copytree(checkpoint(models), tmp_path / "tiny")
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump({"model": str(model / "config.json"), **PLAN}))
    arguments = ["hetkv", "serve", "--plan", str(file), "--model", str(model), f"--vllm-args={ARGUMENTS}"]
    server = Process(tmp_path / "log", arguments)
    try:
        server.wait()
        answers = [tokens_of(server.post(body_of("tiny", prompt))) for prompt in prompts[:3]]
        assert all(len(tokens) == 8 for tokens in answers)
        assert answers == [tokens_of(server.post(body_of("tiny", prompt))) for prompt in prompts[:3]]
    finally:
        server.kill(signal.SIGTERM)
    assert "decode computes the prompt" not in server.log.read_text()
