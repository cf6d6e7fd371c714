"""Specimens whose files were edited as people and tools edit them: understood, or rejected by a line that names it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from tests.models.zoo import LINEAR, LLAMA3, VOCAB, YARN, Edit, Specimen, edited, generation, random_model

_SCALING = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def _tensor(name: str, value: float) -> Edit:
    """One value of a tensor is another one."""

    def edit(directory: Path) -> None:
        path = directory / "model.safetensors"
        tensors = load_file(path)
        tensors[name].view(-1)[3] = value
        save_file(tensors, path, {"format": "pt"})

    return edit


def _head(directory: Path) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": torch.randn(VOCAB, 48)}, path, {"format": "pt"})


def _old_shards(directory: Path) -> None:
    """An index of other weights next to the single file."""
    old = random_model("llama", {}, 99)
    old.save_pretrained(directory / "old", max_shard_size="40KB")
    for path in (directory / "old").glob("model*"):
        path.rename(directory / path.name)


def _tokenizer(**options: int) -> Edit:
    """Saved after it truncated and padded."""

    def edit(directory: Path) -> None:
        path = str(directory / "tokenizer.json")
        tokenizer = Tokenizer.from_file(path)
        if "truncate" in options:
            tokenizer.enable_truncation(options["truncate"])
        if "pad" in options:
            tokenizer.enable_padding(length=options["pad"], pad_id=1, pad_token="w1")
        tokenizer.save(path)

    return edit


def _added_token(directory: Path) -> None:
    path = directory / "tokenizer_config.json"
    values = json.loads(path.read_text())
    values["added_tokens_decoder"] = {"210": {"content": "<end>", "special": True}}
    path.write_text(json.dumps(values))


def _both(*edits: Edit) -> Edit:
    def edit(directory: Path) -> None:
        for one in edits:
            one(directory)

    return edit


def specimens() -> Iterator[Specimen]:
    """All of them."""
    yield from _rope()
    yield from _identity()
    yield from _windows()
    yield from _files()
    yield from _generation()


def _rope() -> Iterator[Specimen]:
    for family in ("llama", "qwen2", "qwen3", "mistral", "olmo2", "granite"):
        yield Specimen(f"{family}+scaling-next-to-parameters", family, {}, edited(rope_scaling=_SCALING))
    old = ("rope_parameters",)
    yield Specimen("llama+old-spelling", "llama", {}, edited(drop=old, rope_theta=5e5, rope_scaling=LINEAR))
    yield Specimen("llama+old-llama3", "llama", {}, edited(drop=old, rope_theta=5e5, rope_scaling=LLAMA3))
    yield Specimen(
        "qwen2+original-outside",
        "qwen2",
        {},
        edited(rope_scaling={"type": "yarn", "factor": 4.0}, original_max_position_embeddings=32),
    )
    yield Specimen(
        "qwen2+original-in-both", "qwen2", {}, edited(rope_scaling=_SCALING, original_max_position_embeddings=32)
    )
    yield Specimen(
        "llama+llama3-original-outside",
        "llama",
        {"rope_parameters": LLAMA3},
        edited(original_max_position_embeddings=32),
    )
    yield Specimen("qwen3+no-original", "qwen3", {}, edited(rope_scaling={"rope_type": "yarn", "factor": 4.0}))
    yield Specimen(
        "llama+nested-rope",
        "llama",
        {},
        edited(rope_parameters={"full_attention": LINEAR}),
        "`full_attention` has no meaning",
    )
    yield Specimen(
        "llama+partial-rotary",
        "llama",
        {},
        edited(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        "`partial_rotary_factor` 0.5 is not supported",
    )
    yield Specimen(
        "llama+partial-outside", "llama", {}, edited(partial_rotary_factor=0.5), "`partial_rotary_factor` 0.5"
    )
    yield Specimen("glm+partial-outside", "glm", {}, edited(drop=old, rope_theta=1e4, partial_rotary_factor=0.25))
    yield Specimen("llama+no-rope-layers", "llama", {}, edited(no_rope_layers=[1, 0, 1]), "`no_rope_layers`")
    yield Specimen(
        "llama+dynamic",
        "llama",
        {},
        edited(rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        "rope type 'dynamic' is not supported",
    )
    yield Specimen(
        "phi3+longrope",
        "phi3",
        {},
        edited(rope_scaling={"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}),
        "rope type 'longrope' is not supported",
    )
    yield Specimen(
        "qwen2+mrope",
        "qwen2",
        {},
        edited(rope_scaling={"type": "default", "mrope_section": [2, 2, 2]}),
        "`mrope_section` has no meaning",
    )
    yield Specimen(
        "llama+llama3-reversed",
        "llama",
        {},
        edited(rope_scaling={**LLAMA3, "low_freq_factor": 4.0, "high_freq_factor": 1.0}),
        "`low_freq_factor` must be below `high_freq_factor`",
    )
    yield Specimen("llama+linear-below-1", "llama", {}, edited(rope_scaling={"rope_type": "linear", "factor": 0.5}))
    yield Specimen("olmo3+theta-outside", "olmo3", {}, edited(drop=old, rope_theta=5e5), "`rope_theta` may not count")
    yield Specimen(
        "gemma3_text+old-spelling",
        "gemma3_text",
        {},
        edited(drop=old, rope_theta=5e5, rope_local_base_freq=2e4, rope_scaling={"rope_type": "linear", "factor": 2.0}),
    )


def _identity() -> Iterator[Specimen]:
    llama = "LlamaForCausalLM"
    for other in ("granite", "mistral", "qwen3"):
        yield Specimen(
            f"llama+says-{other}",
            "llama",
            {},
            edited(model_type=other),
            rf"`architectures` \['{llama}'\]|does not have",
        )
    yield Specimen(
        "llama+says-nothing-known", "llama", {}, edited(model_type="lamma"), "family 'lamma' is not supported"
    )
    yield Specimen("llama+no-family", "llama", {}, edited(drop=("model_type",)), "missing field `model_type`")
    yield Specimen("granite+architecture", "granite", {}, edited(architectures=[llama]), "`architectures`")
    yield Specimen("llama+no-architecture", "llama", {}, edited(drop=("architectures",)))
    yield Specimen("llama+not-causal", "llama", {}, edited(is_causal=False), "`is_causal` false is not supported")
    for name in ("attention_multiplier", "embedding_multiplier", "logits_scaling", "residual_multiplier"):
        yield Specimen(
            f"llama+{name}", "llama", {}, edited(**{name: 0.5}), f"`{name}` is 0.5, which family llama does not"
        )
    yield Specimen(
        "llama+text-config",
        "llama",
        {},
        edited(drop=("vocab_size",), model_type="llava", text_config={}),
        "family 'llava' is not supported",
    )
    yield Specimen("llama+floats", "llama", {}, edited(hidden_size=48.0, max_position_embeddings=512.0), unedited=True)
    yield Specimen("llama+empty-quantisation", "llama", {}, edited(quantization_config={}), unedited=True)
    yield Specimen("llama+quantised", "llama", {}, edited(quantization_config={"quant_method": "gptq"}), "'gptq'")
    yield Specimen("llama+more-kv-heads", "llama", {}, edited(num_key_value_heads=8), "4 is no multiple of")
    yield Specimen("llama+pruned", "llama", {}, edited(pruned_heads={"0": [1]}), "`pruned_heads`")
    yield Specimen("llama+negative-eps", "llama", {}, edited(rms_norm_eps=-1e-6), "`rms_norm_eps` is -1e-06")
    yield Specimen(
        "llama+kv-dtype-of-its-own",
        "llama",
        {},
        edited(quantization_config={"quant_method": "fp8", "kv_cache_scheme": {"num_bits": 8}}),
        "`kv_cache_scheme` sets a KV dtype",
    )
    yield Specimen(
        "deepseek_v2+fewer-kv-heads", "deepseek_v2", {}, edited(num_key_value_heads=1), "`num_key_value_heads` 1 is not"
    )
    yield Specimen("deepseek_v2+head-dim", "deepseek_v2", {}, edited(head_dim=999), "`head_dim` 999 is none")
    yield Specimen(
        "qwen3_moe+dense-layer-that-is-not", "qwen3_moe", {}, edited(mlp_only_layers=[3]), "`mlp_only_layers` is"
    )
    yield Specimen(
        "llama+harmless-keys",
        "llama",
        {},
        edited(pretraining_tp=2, use_cache=False, initializer_range=0.5, attention_dropout=0.5, torch_dtype="bfloat16"),
    )


def _windows() -> Iterator[Specimen]:
    yield Specimen("llama+window", "llama", {}, edited(sliding_window=9), "`sliding_window` is 9, which family llama")
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    yield Specimen("mistral+layer-types", "mistral", {}, edited(layer_types=kinds), "`layer_types`")
    yield Specimen(
        "mistral+window-1", "mistral", {}, edited(sliding_window=1), "`sliding_window` is 1, it must be at least 2"
    )
    yield Specimen("mistral+window-left-out", "mistral", {}, edited(drop=("sliding_window",)))
    yield Specimen(
        "qwen2+window-and-no-layers",
        "qwen2",
        {},
        edited(drop=("max_window_layers", "layer_types"), use_sliding_window=True, sliding_window=5),
    )
    yield Specimen(
        "qwen2+layer-types-and-no-window", "qwen2", {}, edited(layer_types=kinds), "`use_sliding_window` is not set"
    )
    yield Specimen(
        "qwen2+unknown-kind",
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5},
        edited(layer_types=["chunked_attention"] * 3),
        "`layer_types` has 'chunked_attention'",
    )
    yield Specimen("gemma3_text+pattern", "gemma3_text", {}, edited(drop=("layer_types",), sliding_window_pattern=2))
    yield Specimen(
        "gemma3_text+both-patterns",
        "gemma3_text",
        {},
        edited(drop=("layer_types",), sliding_window_pattern=2, _sliding_window_pattern=3),
    )
    yield Specimen("gemma2+no-window", "gemma2", {}, edited(sliding_window=None), "`sliding_window` is null")


def _files() -> Iterator[Specimen]:
    yield Specimen("llama+old-index", "llama", {}, _old_shards)
    down = "model.layers.1.mlp.down_proj.weight"
    yield Specimen("llama+nan", "llama", {}, _tensor(down, float("nan")), f"'{down}' holds NaN or infinity")
    yield Specimen("llama+infinity", "llama", {}, _tensor(down, float("inf")), f"'{down}' holds NaN or infinity")
    yield Specimen("llama+head-of-its-own", "llama", {"tie_word_embeddings": True}, _head, "'lm_head.weight' differs")
    yield Specimen("llama+truncating-tokenizer", "llama", {}, _tokenizer(truncate=5))
    yield Specimen("llama+padding-tokenizer", "llama", {}, _tokenizer(pad=60))
    yield Specimen("llama+padding-truncating-tokenizer", "llama", {}, _tokenizer(pad=60, truncate=5))
    yield Specimen("llama+token-of-the-config-alone", "llama", {}, _added_token, "added token '<end>' with id 210")


def _generation() -> Iterator[Specimen]:
    stops = {"eos_token_id": 7}
    for name, eos in (("0", 0), ("null", None), ("list", [3, None, 5])):
        yield Specimen(f"llama+eos-{name}", "llama", stops, generation(eos_token_id=eos))
    yield Specimen("llama+eos-missing", "llama", stops, edited("generation_config.json", drop=("eos_token_id",)))
    yield Specimen("llama+sampling", "llama", {}, generation(do_sample=True, temperature=0.6, top_k=20, top_p=0.9))
    for key, value in {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "suppress_tokens": [3],
        "min_new_tokens": 4,
        "num_beams": 2,
        "bad_words_ids": [[3]],
        "forced_eos_token_id": 3,
        "min_length": 70,
        "token_healing": True,
        "cache_implementation": "quantized",
        "generation_kwargs": {"repetition_penalty": 3.0},
    }.items():
        yield Specimen(f"llama+{key}", "llama", {}, generation(**{key: value}), f"{key} .* changes greedy decoding")
    yield Specimen("llama+unknown-generation-key", "llama", {}, generation(frobnicate=1), "`frobnicate` is 1")
    in_config = _both(edited(eos_token_id=[7, None]), lambda d: (d / "generation_config.json").unlink())
    yield Specimen("llama+eos-list-in-config", "llama", stops, in_config, unedited=True)
    yield Specimen("qwen2+yarn-card", "qwen2", {"rope_parameters": YARN}, edited(use_mrope=False))
