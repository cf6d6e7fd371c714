"""The families' fields are those of `transformers`' configuration classes, and the reader reads what they read."""

from __future__ import annotations

import json
from dataclasses import fields as class_fields
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hetkv.errors import InputError
from hetkv.models import FAMILIES, ModelConfig, Rope, parse_config, read_config
from hetkv.models.families import COMMON, EXPERT_COUNTS, GEOMETRY, HARMLESS, WRAPPERS

COMPARED = sorted(set(FAMILIES) & set(CONFIG_MAPPING))
DERIVED = {"intermediate_size", "rope_parameters", "architectures", *GEOMETRY}
"""Fields whose default means nothing: they must be in the file, or it is computed."""
OVERRIDDEN = {
    ("glm", "eos_token_id"), ("glm4", "eos_token_id"),  # set after construction
    ("deepseek_v3", "num_key_value_heads"), ("glm_moe_dsa", "num_key_value_heads"),  # MLA: as many as query heads
    ("deepseek_v3", "num_mtp_layers"),  # layers that `generate` does not run
}  # fmt: skip


def test_all_but_copies_are_families_of_transformers() -> None:
    assert set(FAMILIES) - set(CONFIG_MAPPING) == {"kimi_k2"}
    assert {FAMILIES[name].architecture for name in COMPARED} <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


@pytest.mark.parametrize("name", COMPARED)
def test_fields_and_defaults_are_those_of_the_class(name: str) -> None:
    known = {**COMMON, **dict.fromkeys(EXPERT_COUNTS), **FAMILIES[name].defaults}
    theirs = {field.name: field.default for field in class_fields(CONFIG_MAPPING[name])}
    assert set(theirs) - HARMLESS <= set(known), "a field of the class is not known"
    checked = set(theirs) - HARMLESS - DERIVED - {field for family, field in OVERRIDDEN if family == name}
    assert {field: known[field] for field in checked} == {field: theirs[field] for field in checked}


def saved(config: Any, directory: Path) -> dict[str, Any]:
    config.save_pretrained(directory)
    return json.loads((directory / "config.json").read_text())


def check(ours: ModelConfig, theirs: Any) -> None:
    """The geometry, windows and rotary embedding of both are the same."""
    heads = theirs.num_attention_heads
    assert (ours.num_layers, ours.num_heads, ours.hidden_size) == (theirs.num_hidden_layers, heads, theirs.hidden_size)
    assert (ours.vocab_size, ours.max_context) == (theirs.vocab_size, theirs.max_position_embeddings)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // heads)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert (ours.tied_embeddings, ours.norm_eps) == (theirs.tie_word_embeddings, theirs.rms_norm_eps)
    kinds = getattr(theirs, "layer_types", None)
    window = getattr(theirs, "sliding_window", None)
    if FAMILIES[ours.family].sliding_windows == "none":
        assert ours.sliding_windows == (None,) * ours.num_layers
    elif kinds is None:
        assert ours.sliding_windows == (window,) * ours.num_layers
    else:
        assert ours.sliding_windows == tuple(window if kind == "sliding_attention" else None for kind in kinds)
    nested = theirs.rope_parameters.get("full_attention")
    check_rope(ours.rope, nested or theirs.rope_parameters)
    if nested:
        assert ours.sliding_rope is not None
        check_rope(ours.sliding_rope, theirs.rope_parameters["sliding_attention"])


def check_rope(ours: Rope, theirs: dict[str, Any]) -> None:
    assert (ours.kind, ours.theta) == (theirs["rope_type"], theirs["rope_theta"])
    assert ours.fraction == theirs.get("partial_rotary_factor", 1.0)
    for name in ("factor", "low_freq_factor", "high_freq_factor"):
        if name in theirs and ours.kind != "longrope":
            assert getattr(ours, name) == theirs[name]
    if ours.kind in ("yarn", "llama3", "longrope"):
        assert ours.original_context == theirs["original_max_position_embeddings"]


@pytest.mark.parametrize("name", COMPARED)
def test_a_stock_configuration_is_read_as_transformers_reads_it(name: str, tmp_path: Path) -> None:
    given = {"num_experts_per_tok": 6} if name == "deepseek_v2" else {}
    saved(CONFIG_MAPPING[name](**given), tmp_path)
    check(read_config(tmp_path), AutoConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize("name", sorted(CONFIG_MAPPING))
def test_every_configuration_of_transformers_is_read_or_rejected_by_name(name: str, tmp_path: Path) -> None:
    try:
        values = saved(CONFIG_MAPPING[name](), tmp_path)
    except Exception as error:  # it needs arguments or a package that is not here
        pytest.skip(f"{name} has no stock configuration: {type(error).__name__}")
    if name not in FAMILIES and name not in WRAPPERS:
        with pytest.raises(InputError, match=f"family {values['model_type']!r} is not supported"):
            parse_config(values, "config.json")
    elif name == "deepseek_v2":
        with pytest.raises(InputError, match="`num_experts_per_tok` is null"):
            parse_config(values, "config.json")
    else:
        assert parse_config(values, "config.json").multimodal == (name in WRAPPERS)


@pytest.mark.parametrize("name", COMPARED)
def test_no_field_is_ignored(name: str, tmp_path: Path) -> None:
    """Another value of any field of the class changes what is read, or is rejected, or is said to be harmless."""
    given = {"num_experts_per_tok": 6} if name == "deepseek_v2" else {}
    stock = saved(CONFIG_MAPPING[name](**given), tmp_path)
    plain = parse_config(stock, "config.json")
    for field, value in stock.items():
        if field in HARMLESS or field in ("model_type", "architectures", *IRRELEVANT.get(name, ())):
            continue
        try:
            changed = parse_config({**stock, field: other(value)}, "config.json")
        except InputError:
            continue
        assert changed != plain, field


_WINDOW = ("use_sliding_window", "sliding_window", "max_window_layers")
IRRELEVANT = {
    "gemma2": ("hidden_act",), "gemma3_text": ("hidden_act", "_sliding_window_pattern", "sliding_window_pattern"),
    "qwen2": _WINDOW, "qwen3": _WINDOW, "qwen3_moe": ("intermediate_size", *_WINDOW),
    "deepseek_v2": ("n_group", "topk_group", "num_key_value_heads", "head_dim", "intermediate_size"),
    "deepseek_v3": ("num_mtp_layers", "num_nextn_predict_layers", "num_key_value_heads", "head_dim"),
    "glm_moe_dsa": ("num_key_value_heads", "head_dim", "first_k_dense_replace"),
    "phi3": ("original_max_position_embeddings",),
}  # fmt: skip
"""Fields that count only where another one says so, in the stock configuration."""


def other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 if value else 2
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, list):
        return value[:-1] if value else [0]
    return {**value, "factor": 3.0, "frobnicate": 1} if isinstance(value, dict) else 3


ROPE_CASES: dict[str, dict[str, Any]] = {
    "scaling next to parameters": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    },
    "scaling with theta outside": {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "empty scaling": {"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7e3}},
    "both names of the type": {"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}},
    "no original context": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "llama3": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
}


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "granite", "mixtral"])
@pytest.mark.parametrize("case", ROPE_CASES)
def test_rope_of_every_spelling(case: str, name: str, tmp_path: Path) -> None:
    values = saved(CONFIG_MAPPING[name](max_position_embeddings=1024), tmp_path)
    values = {key: value for key, value in values.items() if not key.startswith("rope")} | ROPE_CASES[case]
    (tmp_path / "config.json").write_text(json.dumps(values))
    check(read_config(tmp_path), AutoConfig.from_pretrained(tmp_path))


GEMMA_3_4B = {
    "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
    "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02,
    "mm_tokens_per_image": 256, "torch_dtype": "bfloat16", "vision_config": {"hidden_size": 1152},
    "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
                    "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                    "sliding_window": 1024},
}  # fmt: skip
"""As its authors publish it: what is left out is the class's default."""


def test_a_file_that_leaves_out_its_geometry(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GEMMA_3_4B))
    ours = read_config(tmp_path)
    check(ours, AutoConfig.from_pretrained(tmp_path).text_config)
    assert (ours.num_heads, ours.num_kv_heads, ours.head_dim, ours.eos_ids) == (8, 4, 256, (1, 106))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frobnicate": 3}, "`frobnicate` is 3, which family gemma3 outside its `text_config` does not have"),
        ({"num_hidden_layers": 7}, "`num_hidden_layers` is 7"),
        ({"sliding_window": 7}, "`sliding_window` is 7"),
        ({"rope_scaling": {"rope_type": "linear"}}, "`rope_scaling` is"),
        ({"architectures": ["LlamaForCausalLM"]}, "`architectures`"),
        ({"is_encoder_decoder": True}, "`is_encoder_decoder` true is not supported"),
        ({"text_config": "x"}, "`text_config` must be an object"),
        ({"text_config": {"model_type": "llama"}}, "is a gemma3_text, here it says 'llama'"),
    ],
)
def test_what_is_around_a_text_config_is_not_ignored(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_config(GEMMA_3_4B | changes, "config.json")
    with pytest.raises(InputError, match="missing field `text_config`"):
        parse_config({"model_type": "gemma3"}, "config.json")


def test_rotary_dim_of_minimax(tmp_path: Path) -> None:
    values = saved(CONFIG_MAPPING["minimax_m2"](), tmp_path)
    values = {key: value for key, value in values.items() if not key.startswith(("rope", "partial"))}
    (tmp_path / "config.json").write_text(json.dumps(values | {"rotary_dim": 64, "rope_theta": 5e6}))
    ours = read_config(tmp_path)
    check(ours, AutoConfig.from_pretrained(tmp_path))
    assert ours.rope.fraction == 0.5
