"""KV bytes per token and per request equal those of a cache that `transformers` really allocated, for every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hetkv.cli import main
from hetkv.costmodel.memory import kv_bytes_per_token
from hetkv.costmodel.models import ModelShape, model_shape
from hetkv.errors import InputError
from hetkv.models import FAMILIES
from tests.models.zoo import FAMILY, SMALL, edited

HYBRID = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 4, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 6,
}  # fmt: skip
SIZES_ALONE: dict[str, dict[str, Any]] = {
    "deepseek_v3": {**FAMILY["deepseek_v2"], "n_group": 1, "topk_group": 1},
    "glm_moe_dsa": {**FAMILY["deepseek_v2"], "q_lora_rank": 20, "n_group": 1, "topk_group": 1, "index_topk": 8,
                    "index_n_heads": 2, "index_head_dim": 8},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 12},
    "qwen3_5_moe_text": HYBRID,
}  # fmt: skip
TOKENS = (5, 40)


def cached(
    family: str, config: dict[str, Any], tokens: int, directory: Path, dtype: torch.dtype = torch.float32
) -> tuple[ModelShape, int]:
    """The shape that hetkv reads, and bytes that the cache of a prompt of so many tokens holds."""
    torch.manual_seed(0)
    made = CONFIG_MAPPING[family](**{**SMALL, **config})
    model = AutoModelForCausalLM.from_config(made).eval().to(dtype)
    made.save_pretrained(directory)
    with torch.no_grad():
        cache = model(torch.arange(tokens)[None], use_cache=True).past_key_values
    return model_shape(str(directory)), sum(sizes(layer) for layer in cache.layers)


def sizes(layer: Any) -> int:
    """Bytes of all tensors of one layer's cache."""
    found = [value for name, value in vars(layer).items() if not name.startswith("_")]
    tensors = [t for value in found for t in (value.values() if isinstance(value, dict) else [value])]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor) and t.dim() > 1)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"kimi_k2"}))
def test_a_request_keeps_what_transformers_keeps(family: str, tmp_path: Path) -> None:
    config = {**FAMILY, **SIZES_ALONE}[family]
    for tokens in TOKENS:
        model_shape.cache_clear()
        shape, size = cached(family, config, tokens, tmp_path)
        assert shape.kv_bytes_of_request(tokens, 4) == size
        if not shape.sliding_layers and not shape.state_layers:
            assert kv_bytes_per_token(shape, 1, "bf16") * 2 * tokens == size


REJECTED = {
    "cohere2": {}, "llama4_text": {}, "gemma3n_text": {}, "nemotron_h": {}, "jamba": {},
    "falcon": {"multi_query": True}, "qwen2_5_omni": {}, "qwen3_next": {},
    "gpt2": {}, "bloom": {}, "mamba2": {}, "zamba2": {},
}  # fmt: skip


@pytest.mark.parametrize("family", REJECTED)
def test_what_is_not_read_is_rejected_by_name(family: str, tmp_path: Path) -> None:
    CONFIG_MAPPING[family](**REJECTED[family]).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"family '{family}' is not supported"):
        model_shape(str(tmp_path))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma3_text", {"sliding_window_pattern": 2, "layer_types": None}, None),
        ("phi3", {"sliding_window": 9}, None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2, "layer_types": None}, None),
        ("llama", {"num_key_value_heads": 8}, "4 is no multiple of `num_key_value_heads` 8"),
        ("llama", {"num_kv_shared_layers": 1}, "`num_kv_shared_layers` is 1, which family llama does not have"),
        ("llama", {"attn_layer_period": 2}, "`attn_layer_period` is 2"),
        ("llama", {"hybrid_override_pattern": "M-M"}, "`hybrid_override_pattern`"),
        ("llama", {"multi_query": True}, "`multi_query` is true"),
    ],
)
def test_fields_that_were_read_wrong(family: str, changes: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    made = CONFIG_MAPPING[family](**{**SMALL, **FAMILY.get(family, {})})
    made.save_pretrained(tmp_path)
    edited(**changes)(tmp_path)
    model_shape.cache_clear()
    if message is not None:
        with pytest.raises(InputError, match=message):
            model_shape(str(tmp_path))
        return
    shape = model_shape(str(tmp_path))
    again = CONFIG_MAPPING[family].from_pretrained(tmp_path)
    with torch.no_grad():
        cache = AutoModelForCausalLM.from_config(again).eval().float()(torch.arange(40)[None]).past_key_values
    assert shape.kv_bytes_of_request(40, 4) == sum(sizes(layer) for layer in cache.layers)
    assert shape.sliding_layers == sum(layer.is_sliding for layer in cache.layers)


def test_the_text_part_of_a_wrapped_model(tmp_path: Path) -> None:
    made = CONFIG_MAPPING["gemma3"](text_config={**SMALL, **FAMILY["gemma3_text"]})
    made.save_pretrained(tmp_path)
    model_shape.cache_clear()
    shape = model_shape(str(tmp_path))
    assert (shape.full_layers, shape.sliding_layers, shape.sliding_window) == (1, 2, 9)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gemma3"


PLAN = """
model: Llama-3.1-8B
pools:
  - {{role: prefill, gpu: H200, engine: {{max_num_batched_tokens: {chunk}, max_num_seqs: 8}}}}
  - {{role: decode, gpu: H200}}
link: {{gb_s: 50}}
"""
PROBLEM = """
models: [{{name: {path}, tp: [1], pp: [1], dp: [1]}}]
classes: [{{name: all, rate: 1, prompt_tokens: "30", output_tokens: "11", ttft_ms: 1000, tpot_ms: 1000}}]
gpus: [{{gpu: H200, usd_per_gpu_hour: 1, basis: on_demand, as_of: 2026-05}}]
link: {{gb_s: 50}}
allow_unstartable: true
"""


def facts_of(folder: Path, *arguments: str) -> Any:
    """The JSON of one hetkv command."""
    assert main([*arguments, "--json", str(folder / "out.json")]) == 0
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"kimi_k2"}))
def test_commands_report_and_move_what_transformers_keeps(family: str, tmp_path: Path) -> None:
    """40 tokens in bf16: what a simulated request keeps at its end and what goes over the link, in one piece and in
    chunks; and what a plan says of it."""
    config = {**FAMILY, **SIZES_ALONE}[family]
    model_shape.cache_clear()
    shape, size = cached(family, config, 40, tmp_path, torch.bfloat16)
    path = str(tmp_path / "config.json")
    for chunk in (9, 8192):
        (tmp_path / "plan.yaml").write_text(PLAN.format(chunk=chunk))
        options = ["--model", path, "--rate", "10", "--requests", "5", "--prompt-tokens", "40", "--output-tokens", "1"]
        facts = facts_of(tmp_path, "simulate", "--plan", str(tmp_path / "plan.yaml"), *options)
        assert facts["finished"] == 5
        assert facts["kv"]["bytes_per_request"]["mean"] == size
        assert facts["kv"]["bytes_per_token"] == kv_bytes_per_token(shape, 1, "bf16")
        assert facts["link"]["gigabytes"] == pytest.approx(5 * size / 1e9)
    (tmp_path / "problem.yaml").write_text(PROBLEM.format(path=path))
    facts = facts_of(tmp_path, "plan", "--problem", str(tmp_path / "problem.yaml"), "--launch", "none")
    (kv,) = facts["kv"]
    assert kv["bytes_per_request"]["all"] == size
    assert kv["bytes_per_token"] == kv_bytes_per_token(shape, 1, "bf16")
