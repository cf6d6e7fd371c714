"""Checkpoints of every family, tiny and in fp32, made by `transformers`; and edits of them that must be understood or
rejected by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 211
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MLA = {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
       "v_head_dim": 8, "n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 1,
       "moe_intermediate_size": 16, "first_k_dense_replace": 1}  # fmt: skip
FAMILY: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {"sliding_window": 9}, "qwen2": {}, "qwen3": {"head_dim": 12}, "qwen3_moe": MOE,
    "mixtral": {"num_local_experts": 5}, "gemma": {"head_dim": 12},
    "gemma2": {"head_dim": 12, "sliding_window": 9, "query_pre_attn_scalar": 10, "attn_logit_softcapping": 3.0,
               "final_logit_softcapping": 2.0},
    "gemma3_text": {"head_dim": 12, "sliding_window": 9,
                    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phi3": {}, "gpt_oss": {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 9, "head_dim": 12},
    "glm": {"head_dim": 16}, "glm4": {"head_dim": 16}, "olmo2": {}, "olmo3": {"sliding_window": 9},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5,
                "attention_multiplier": 0.2},
    "deepseek_v2": MLA,
}  # fmt: skip
"""Families that the runtime computes, with what makes the family's own options count."""
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e3, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}

Edit = Callable[[Path], None]


@dataclass(frozen=True)
class Specimen:
    """One checkpoint: its family, what its configuration has of its own, and what is done to its files."""

    name: str
    family: str
    config: dict[str, Any] = field(default_factory=dict)
    edit: Edit | None = None
    rejected: str | None = None
    """What the one line says that rejects it; None: it gives the tokens of `transformers`."""
    unedited: bool = False
    """Some versions of `transformers` reject the edit, which means nothing: the unedited model gives the tokens."""

    def make(self, directory: Path) -> PreTrainedModel:
        """Write the checkpoint; the model as `transformers` made it, before the edit."""
        model = random_model(self.family, self.config, len(self.name))
        model.save_pretrained(directory)
        write_tokenizer(directory)
        if self.edit is not None:
            self.edit(directory)
        return model


def random_model(family: str, config: dict[str, Any], seed: int) -> PreTrainedModel:
    """A model whose every parameter counts: gains differ from one, biases and sinks from zero."""
    torch.manual_seed(seed)
    stock = CONFIG_MAPPING[family](**{**SMALL, **FAMILY.get(family, {}), **config})
    model = AutoModelForCausalLM.from_config(stock).eval().float()
    offset = family.startswith("gemma")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.dim() == 1 else (0.7 if offset else 2.0) / parameter.shape[-1] ** 0.5
            parameter.normal_(float("norm" in name and not offset), spread)
    return model


def write_tokenizer(directory: Path, **options: Any) -> None:
    """One token a word: `w0` to `w210`."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0", **options})
    )


def prompt(count: int, seed: int = 0) -> str:
    """`count` words that the tokenizer knows."""
    ids = torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(f"w{i}" for i in ids)


def edited(file: str = "config.json", drop: tuple[str, ...] = (), **changes: Any) -> Edit:
    """Other keys in a JSON file."""

    def edit(directory: Path) -> None:
        path = directory / file
        values = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({k: v for k, v in values.items() if k not in drop} | changes))

    return edit


def generation(**changes: Any) -> Edit:
    """Other keys in `generation_config.json`."""
    return edited("generation_config.json", **changes)


def _geometry() -> Iterator[Specimen]:
    """Every family with odd heads, dims, depths, tying and context."""
    odd: dict[str, dict[str, Any]] = {
        "plain": {},
        "one-layer": {"num_hidden_layers": 1},
        "mha": {"num_key_value_heads": 4},
        "mqa": {"num_key_value_heads": 1},
        "wide-head": {"head_dim": 24},
        "tied": {"tie_word_embeddings": True},
        "seven-layers": {"num_hidden_layers": 7},
        "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    }
    for family in FAMILY:
        for name, config in odd.items():
            if family == "deepseek_v2" and name in ("mqa", "mha", "wide-head"):
                continue  # its latent has neither
            if family in ("gemma3_text", "olmo3") and name == "theta":
                config = {
                    "rope_parameters": {
                        k: {"rope_type": "default", "rope_theta": 5e5} for k in ("full_attention", "sliding_attention")
                    }
                }
            if (family == "gemma3_text" and "layers" in name) or (name == "one-layer" and family == "gemma3_text"):
                config = {**config, "layer_types": None}
            untied = (
                {} if name == "tied" or not family.startswith("gemma") else {"tie_word_embeddings": name == "plain"}
            )
            yield Specimen(f"{family}-{name}", family, {**untied, **config})


def _options() -> Iterator[Specimen]:
    """What families say by fields of their own."""
    bias = {"attention_bias": True}
    for family in ("llama", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "olmo2", "granite", "deepseek_v2"):
        yield Specimen(f"{family}-bias", family, bias)
    for family in ("glm", "glm4", "gpt_oss"):
        yield Specimen(f"{family}-no-bias", family, {"attention_bias": False})
    for family in ("llama", "granite"):
        yield Specimen(f"{family}-mlp-bias", family, {"mlp_bias": True})
    for family in ("llama", "mistral", "qwen2", "qwen3", "mixtral", "granite", "olmo2", "qwen3_moe"):
        # Mixtral's class leaves `head_dim` at None, which its own YaRN cannot work with.
        yield Specimen(f"{family}-yarn", family, {"rope_parameters": YARN, "head_dim": 12})
        yield Specimen(f"{family}-linear", family, {"rope_parameters": LINEAR})
    for family in ("llama", "qwen2", "granite"):
        yield Specimen(f"{family}-llama3", family, {"rope_parameters": LLAMA3})
    yield Specimen("llama-yarn-no-truncate", "llama", {"rope_parameters": {**YARN, "truncate": False}})
    yield Specimen("llama-yarn-slow-0", "llama", {"rope_parameters": {**YARN, "beta_slow": 0}})
    yield Specimen("llama-yarn-fast-0", "llama", {"rope_parameters": {**YARN, "beta_fast": 0}})
    yield Specimen("llama-yarn-mscale", "llama", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}})
    yield Specimen("llama-yarn-factor", "llama", {"rope_parameters": {**YARN, "attention_factor": 1.3}})
    yield Specimen(
        "deepseek_v2-yarn", "deepseek_v2", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}}
    )
    for family in ("llama", "gemma2", "phi3"):
        yield Specimen(f"{family}-relu", family, {"hidden_activation" if family == "gemma2" else "hidden_act": "relu"})
        yield Specimen(f"{family}-gelu", family, {"hidden_activation" if family == "gemma2" else "hidden_act": "gelu"})
    for family in ("mistral", "mixtral", "phi3"):
        yield Specimen(f"{family}-window-2", family, {"sliding_window": 2})
        yield Specimen(f"{family}-no-window", family, {"sliding_window": None})
        yield Specimen(f"{family}-window-5", family, {"sliding_window": 5})
    for family in ("qwen2", "qwen3"):
        window = {"use_sliding_window": True, "sliding_window": 7}
        yield Specimen(f"{family}-all-windows", family, {**window, "max_window_layers": 0})
        yield Specimen(f"{family}-some-windows", family, {**window, "max_window_layers": 2})
        yield Specimen(
            f"{family}-layer-types",
            family,
            {**window, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
        )
    yield Specimen("qwen3_moe-window", "qwen3_moe", {"use_sliding_window": True, "sliding_window": 7})
    yield Specimen("qwen3_moe-some-dense", "qwen3_moe", {"mlp_only_layers": [1]})
    yield Specimen("qwen3_moe-step-2", "qwen3_moe", {"decoder_sparse_step": 2})
    yield Specimen("qwen3_moe-normalised", "qwen3_moe", {"norm_topk_prob": True})
    yield Specimen("qwen3_moe-all-experts", "qwen3_moe", {"num_experts_per_tok": 8})
    yield Specimen("mixtral-one-expert", "mixtral", {"num_experts_per_tok": 1})
    yield Specimen("gpt_oss-default-rope", "gpt_oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})
    yield Specimen("gpt_oss-clamp", "gpt_oss", {"swiglu_limit": 0.5, "swiglu_alpha": 1.0})
    yield Specimen("gemma2-no-caps", "gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None})
    yield Specimen("gemma3_text-logit-cap", "gemma3_text", {"final_logit_softcapping": 3.0})
    yield Specimen(
        "gemma3_text-linear",
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    )
    yield Specimen(
        "olmo3-yarn",
        "olmo3",
        {
            "num_hidden_layers": 4,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    )
    for family, part in (("glm4", 0.25), ("glm", 1.0), ("phi3", 0.5)):
        yield Specimen(
            f"{family}-rotary-{part}",
            family,
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": part}},
        )
    yield Specimen("deepseek_v2-query-rank", "deepseek_v2", {"q_lora_rank": 20})
    yield Specimen(
        "deepseek_v2-groups",
        "deepseek_v2",
        {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.0},
    )
    yield Specimen("deepseek_v2-dense", "deepseek_v2", {"first_k_dense_replace": 3})
    yield Specimen("llama-eos-id", "llama", {"eos_token_id": 7})


UNSUPPORTED = ("starcoder2", "smollm3", "cohere", "olmo", "stablelm", "qwen2_moe")


def _families() -> Iterator[Specimen]:
    """Families that are not read, and one that is read for its sizes."""
    for family in UNSUPPORTED:
        yield Specimen(f"{family}-plain", family, rejected=f"family '{family}' is not supported; supported are llama")
    yield Specimen(
        "minimax_m2-plain",
        "minimax_m2",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 12},
        rejected="family 'minimax_m2' is read for its sizes alone",
    )


def specimens() -> list[Specimen]:
    """All that are unedited."""
    return [*_geometry(), *_options(), *_families()]
