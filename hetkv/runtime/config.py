"""A checkpoint's `config.json`, read into `ModelConfig`: only what the decoder computes with, every field checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from hetkv.errors import InputError
from hetkv.kv.spec import KVSpec, LayerSpec
from hetkv.runtime import deepseek

_T = TypeVar("_T")

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "DeepseekV2ForCausalLM",
)


class Rope(msgspec.Struct, frozen=True):
    """Rotary embedding. `llama3` and `yarn` stretch low frequencies by `factor`, `linear` all of them."""

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    """YaRN: turns over the original context above which a frequency is kept, and below which it is stretched."""
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    """YaRN: its temperature on rotated and on all channels; 0: not given."""
    attention_factor: float | None = None
    truncate: bool = True


class ModelConfig(msgspec.Struct, frozen=True):
    """Geometry of a Llama-family decoder."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_context: int
    """Tokens that positions are defined for (`max_position_embeddings`)."""
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: Rope
    windows: tuple[int | None, ...]
    """Per layer: the sliding window in tokens, or None for full attention."""
    eos_ids: tuple[int, ...]
    """Token ids that end a text."""
    latent: deepseek.Latent | None = None
    """Multi-head latent attention; `num_kv_heads` then counts the heads that a latent becomes."""
    experts: deepseek.Experts | None = None

    def kv_spec(self) -> KVSpec:
        """KV geometry. Where full and sliding layers are mixed they are two cache groups, full first."""
        if self.latent is not None:
            return KVSpec((LayerSpec.latent(self.latent.rank, self.latent.rope_dim),) * self.num_layers)
        mixed = len(set(self.windows)) > 1
        return KVSpec(
            tuple(
                LayerSpec.kv(self.num_kv_heads, self.head_dim, window=window, group=int(mixed and window is not None))
                for window in self.windows
            )
        )


class _RawConfig(msgspec.Struct):
    """`config.json` as Hugging Face writes it. Fields without a default are required."""

    architectures: list[str]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float = 1.0
    sliding_window: int | None = None
    use_sliding_window: bool = False
    max_window_layers: int | None = None
    layer_types: list[str] | None = None
    quantization_config: dict[str, Any] | None = None
    eos_token_id: int | list[int] | None = None


class _RawGeneration(msgspec.Struct):
    eos_token_id: int | list[int] | None = None


def read_config(directory: Path) -> ModelConfig:
    """`ModelConfig` of a checkpoint directory. `InputError` names the file, the field and what is supported."""
    path = directory / "config.json"
    raw = _read(path, _RawConfig)
    architecture = raw.architectures[0] if raw.architectures else "none"
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"{path}: architecture {architecture!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    if raw.hidden_act != "silu":
        raise InputError(f"{path}: hidden_act {raw.hidden_act!r} is not supported; supported is 'silu'")
    if raw.quantization_config is not None:
        method = raw.quantization_config.get("quant_method", "unnamed")
        raise InputError(f"{path}: quantised weights (quant_method {method!r}) are not supported")
    if raw.partial_rotary_factor != 1.0:
        raise InputError(f"{path}: partial_rotary_factor {raw.partial_rotary_factor} is not supported; supported is 1")
    latent, experts = deepseek.read(path) if architecture == "DeepseekV2ForCausalLM" else (None, None)
    kv_heads = raw.num_key_value_heads or raw.num_attention_heads
    head_dim = raw.head_dim or raw.hidden_size // max(raw.num_attention_heads, 1)
    if latent is not None:
        head_dim = latent.rope_dim
    positive = {
        "vocab_size": raw.vocab_size,
        "hidden_size": raw.hidden_size,
        "intermediate_size": raw.intermediate_size,
        "num_hidden_layers": raw.num_hidden_layers,
        "num_attention_heads": raw.num_attention_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": raw.max_position_embeddings,
    }
    for field, value in positive.items():
        if value < 1:
            raise InputError(f"{path}: {field} is {value}, it must be at least 1")
    if raw.num_attention_heads % kv_heads:
        raise InputError(
            f"{path}: num_attention_heads {raw.num_attention_heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    if head_dim % 2:
        raise InputError(f"{path}: head_dim {head_dim} is odd, rotary embedding needs pairs of channels")
    return ModelConfig(
        architecture=architecture,
        vocab_size=raw.vocab_size,
        hidden_size=raw.hidden_size,
        intermediate_size=raw.intermediate_size,
        num_layers=raw.num_hidden_layers,
        num_heads=raw.num_attention_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=raw.rms_norm_eps,
        max_context=raw.max_position_embeddings,
        tied_embeddings=raw.tie_word_embeddings,
        qkv_bias=raw.attention_bias or architecture == "Qwen2ForCausalLM",
        output_bias=raw.attention_bias and architecture != "Qwen2ForCausalLM",
        mlp_bias=raw.mlp_bias and architecture == "LlamaForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
        rope=_rope(path, raw),
        windows=_windows(path, raw, architecture),
        eos_ids=_eos_ids(directory, raw),
        latent=latent,
        experts=experts,
    )


def _read(path: Path, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise InputError(f"{path}: {error}") from None


def _rope(path: Path, raw: _RawConfig) -> Rope:
    """Newer files keep theta and scaling in `rope_parameters`, older ones in `rope_theta` and `rope_scaling`."""
    fields = raw.rope_parameters or raw.rope_scaling or {}
    kind = fields.get("rope_type", fields.get("type", "default"))
    theta = fields.get("rope_theta", raw.rope_theta if raw.rope_theta is not None else 10000.0)
    optional: dict[str, Any] = {}
    if kind == "default":
        names: dict[str, str] = {}
    elif kind == "linear":
        names = {"factor": "factor"}
    elif kind == "llama3":
        names = {
            "factor": "factor",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
            "original_context": "original_max_position_embeddings",
        }
    elif kind == "yarn":
        names = {"factor": "factor"}
        choices = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate")
        optional = {name: fields[name] for name in choices if fields.get(name) is not None}
        optional["original_context"] = fields.get("original_max_position_embeddings", raw.max_position_embeddings)
    else:
        known = "'default', 'linear', 'llama3', 'yarn'"
        raise InputError(f"{path}: rope type {kind!r} is not supported; supported are {known}")
    missing = [name for name in names.values() if name not in fields]
    if missing:
        raise InputError(f"{path}: rope type {kind!r} needs {missing[0]!r}")
    try:
        return msgspec.convert(
            {"theta": theta, "kind": kind, **optional, **{own: fields[name] for own, name in names.items()}}, Rope
        )
    except msgspec.ValidationError as error:
        raise InputError(f"{path}: rope parameters: {error}") from None


def _windows(path: Path, raw: _RawConfig, architecture: str) -> tuple[int | None, ...]:
    count = raw.num_hidden_layers
    window = raw.sliding_window
    if architecture == "LlamaForCausalLM" or window is None:
        return (None,) * count
    if architecture == "MistralForCausalLM":
        return (window,) * count
    if not raw.use_sliding_window:
        return (None,) * count
    if raw.layer_types is not None:
        if len(raw.layer_types) != count:
            raise InputError(f"{path}: layer_types has {len(raw.layer_types)} entries for {count} layers")
        unknown = set(raw.layer_types) - {"full_attention", "sliding_attention"}
        if unknown:
            raise InputError(f"{path}: layer type {min(unknown)!r} is not supported")
        return tuple(window if kind == "sliding_attention" else None for kind in raw.layer_types)
    first = raw.max_window_layers if raw.max_window_layers is not None else count
    return tuple(window if layer >= first else None for layer in range(count))


def _eos_ids(directory: Path, raw: _RawConfig) -> tuple[int, ...]:
    """`generation_config.json` wins where it is present, as in `transformers`."""
    value = raw.eos_token_id
    path = directory / "generation_config.json"
    if path.is_file():
        value = _read(path, _RawGeneration).eos_token_id or value
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
