"""Model shapes: parameters and KV sizes against published and hand-computed values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hetkv.costmodel.memory import kv_bytes_per_token, weight_bytes
from hetkv.costmodel.models import known_models, model_shape, shape_from_config
from hetkv.errors import InputError

PUBLISHED = {
    "Llama-2-7B": 6.74e9,
    "Llama-2-13B": 13.02e9,
    "Llama-2-70B": 68.98e9,
    "Llama-3-8B": 8.03e9,
    "Llama-3.1-405B": 405.9e9,
    "Mistral-7B": 7.25e9,
    "Mixtral-8x7B": 46.7e9,
    "Mixtral-8x22B": 140.6e9,
    "Qwen2-7B": 7.62e9,
    "Qwen2.5-72B": 72.7e9,
    "Qwen3-8B": 8.19e9,
    "Qwen3-32B": 32.8e9,
    "Qwen3-30B-A3B": 30.5e9,
    "Qwen3-235B-A22B": 235.1e9,
    "DeepSeek-V3": 671.0e9,
    "gpt-oss-120b": 116.8e9,
}
"""Total parameters as the model cards give them."""

ACTIVE = {"Mixtral-8x7B": 12.9e9, "Qwen3-30B-A3B": 3.3e9, "Qwen3-235B-A22B": 22e9, "DeepSeek-V3": 37e9}

KIB_PER_TOKEN = {
    "Llama-2-7B": 512,  # 32 layers x 32 heads x 128 x 2 (K and V) x 2 bytes
    "Llama-2-13B": 800,
    "Llama-2-70B": 320,  # 80 x 8 x 128 x 2 x 2
    "Llama-3-8B": 128,
    "Llama-3.1-405B": 504,
    "Qwen2-7B": 56,
    "Qwen3-32B": 256,
    "Mixtral-8x7B": 128,
    "DeepSeek-V3": 68.625,  # 61 x (512 + 64) x 2, no V
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_parameters_match_the_model_card(name: str) -> None:
    assert model_shape(name).total_params == pytest.approx(PUBLISHED[name], rel=0.003)


@pytest.mark.parametrize("name", sorted(ACTIVE))
def test_active_parameters(name: str) -> None:
    assert model_shape(name).active_params == pytest.approx(ACTIVE[name], rel=0.1)


@pytest.mark.parametrize("name", sorted(KIB_PER_TOKEN))
def test_kv_bytes_per_token(name: str) -> None:
    assert kv_bytes_per_token(model_shape(name), 1, "bf16") == KIB_PER_TOKEN[name] * 1024


def test_kv_over_ranks() -> None:
    llama, deepseek = model_shape("Llama-2-70B"), model_shape("DeepSeek-V3")
    one = kv_bytes_per_token(llama, 1, "bf16")
    assert kv_bytes_per_token(llama, 8, "bf16") == one
    assert kv_bytes_per_token(llama, 16, "bf16") == 2 * one  # 8 heads on 16 ranks: each is held twice
    assert kv_bytes_per_token(llama, 3, "bf16") == one * 9 / 8  # 3 ranks hold 3 heads each at most
    assert kv_bytes_per_token(deepseek, 8, "bf16") == 8 * kv_bytes_per_token(deepseek, 1, "bf16")
    assert kv_bytes_per_token(llama, 1, "fp8") == one / 2


def test_weight_bytes_split_over_ranks_and_stages() -> None:
    shape = model_shape("Llama-2-70B")
    whole = weight_bytes(shape, 1, 1, 1, "bf16")
    assert whole == pytest.approx(2 * shape.total_params)
    assert weight_bytes(shape, 4, 1, 1, "bf16") == pytest.approx(whole / 4)
    layers = weight_bytes(shape, 1, 4, 1, "bf16")
    assert whole / 4 < layers < whole / 4 * 1.05  # the last stage also holds the head


def test_quantised_experts_leave_the_rest_in_bf16() -> None:
    shape = model_shape("gpt-oss-120b")
    assert shape.experts_only_quantised
    size = weight_bytes(shape, 1, 1, 1, "fp4")
    assert size == pytest.approx(shape.routed_params * 0.53125 + (shape.total_params - shape.routed_params) * 2)


def test_sliding_and_state_layers() -> None:
    gpt, qwen = model_shape("gpt-oss-120b"), model_shape("Qwen3.5-397B-A17B")
    assert (gpt.full_layers, gpt.sliding_layers, gpt.sliding_window) == (18, 18, 128)
    assert (qwen.full_layers, qwen.state_layers) == (15, 45)


@pytest.mark.parametrize("name", known_models())
def test_every_shipped_model_reads(name: str) -> None:
    shape = model_shape(name)
    assert shape.layers == shape.dense_mlp_layers + shape.moe_layers
    assert shape.max_positions > 0


@pytest.mark.parametrize("name", ["meta-llama/Llama-2-70b-hf", "llama2-70b", "LLAMA-2-70B"])
def test_names(name: str) -> None:
    assert model_shape(name).name == "Llama-2-70B"


def test_a_config_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    assert model_shape(str(path)).layers == 2
    assert model_shape(str(tmp_path)).hidden == 64


SMALL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "magic"}, "family 'magic' is not supported"),
        ({"hidden_size": None}, "`hidden_size` is null"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` is 0"),
        ({"vocab_size": "many"}, "`vocab_size` must be a whole number"),
        ({"vocab_size": 1.5}, "`vocab_size` must be a whole number"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "no multiple of `num_attention_heads` 5"),
        ({"num_key_value_heads": 32}, "4 is no multiple of `num_key_value_heads` 32"),
        ({"layer_types": ["full_attention"]}, "which family llama does not have"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "names 1 layers, `num_hidden_layers` says 2"),
        ({"model_type": "qwen2", "layer_types": ["full_attention", "magic"]}, "'magic'"),
        ({"num_experts": 4}, "which family llama does not have"),
        ({"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 8}, "8 exceeds the 4 experts"),
    ],
)
def test_bad_configs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        shape_from_config({**SMALL, **change}, "small", "config.json")


def test_unknown_model_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown model 'Llama-9'"):
        model_shape("Llama-9")
    with pytest.raises(InputError, match="no such file"):
        model_shape(str(tmp_path / "none.json"))
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        model_shape(str(bad))
