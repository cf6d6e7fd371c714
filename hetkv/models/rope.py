"""A family's rotary embedding out of its fields, with the precedences that `transformers` gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hetkv.models.config import Rope
from hetkv.models.families import Family
from hetkv.models.fields import Fields

_ANY = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_KEYS: Mapping[str, frozenset[str]] = {
    "default": _ANY,
    "linear": _ANY | {"factor"},
    "dynamic": _ANY | {"factor", "original_max_position_embeddings"},
    "llama3": _ANY | {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": _ANY | {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
                    "attention_factor", "truncate"},
    "longrope": _ANY | {"factor", "original_max_position_embeddings", "short_factor", "long_factor",
                        "attention_factor", "short_mscale", "long_mscale"},
}  # fmt: skip


def read_rope(fields: Fields, family: Family) -> tuple[Rope, Rope | None]:
    """The rotary embedding, and that of layers with a sliding window where it differs.

    `rope_scaling` wins over `rope_parameters` where it is not empty, with all its fields: theta is then that of
    `rope_theta`. The original context next to them wins over the one inside.
    """
    if family.nested_rope:
        return _read_nested(fields, family)
    values = fields.table("rope_scaling") or fields.table("rope_parameters") or dict(family.rope)
    name = "rope_scaling" if fields.table("rope_scaling") else "rope_parameters"
    theta = None if values.get("rope_theta") is not None else fields.number("rope_theta")
    return _read(fields, family, values, name, theta), None


def _read_nested(fields: Fields, family: Family) -> tuple[Rope, Rope | None]:
    """Gemma 3 and OLMo 3: one for each layer kind; `rope_scaling` adds to that of full layers."""
    given = fields.table("rope_parameters")
    unknown = set(given) - {"full_attention", "sliding_attention"}
    if unknown:
        raise fields.error(
            f"`rope_parameters` has `{min(unknown)}`; known are `full_attention` and `sliding_attention`"
        )
    for kind, value in given.items():
        if value is not None and not isinstance(value, dict):
            raise fields.error(f"`rope_parameters`: `{kind}` must be an object")
    full = {**(given.get("full_attention") or {}), **fields.table("rope_scaling")}
    local = given.get("sliding_attention") or {}
    if full.get("truncate") is not None or local.get("truncate") is not None:
        raise fields.error("`truncate` of a layer kind's `rope_parameters` is not supported")
    local_theta = "rope_local_base_freq" if "rope_local_base_freq" in fields.defaults else "rope_theta"
    if local_theta == "rope_theta" and "rope_theta" in fields.values and local.get("rope_theta") is None:
        raise fields.error(
            "`rope_theta` may not count for layers with a sliding window: give it in `rope_parameters` of each kind"
        )
    return (
        _read(fields, family, full, "rope_parameters", fields.number("rope_theta")),
        _read(fields, family, local, "rope_parameters", fields.number(local_theta)),
    )


def _rotated(fields: Fields) -> Any:
    """Share of a head's channels that are rotated, which MiniMax's own files give as `rotary_dim`."""
    if fields.get("rotary_dim") is not None and "partial_rotary_factor" not in fields.values:
        return fields.whole("rotary_dim") / fields.whole("head_dim")
    return fields.get("partial_rotary_factor")


def _read(fields: Fields, family: Family, values: Mapping[str, Any], name: str, theta: float | None) -> Rope:
    defaults = {
        "rope_theta": theta,
        "partial_rotary_factor": _rotated(fields),
        "original_max_position_embeddings": fields.get("max_position_embeddings"),
        "low_freq_factor": None,
        "truncate": True,
    }
    if fields.get("original_max_position_embeddings") is not None:
        values = {**values, "original_max_position_embeddings": fields.get("original_max_position_embeddings")}
    inner = Fields(values, defaults, f"{fields.origin}: `{name}`")
    kind = inner.get("rope_type") or inner.get("type") or "default"
    if family.model_type == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"
    if kind not in _KEYS:
        raise inner.error(f"rope type {kind!r} is not known; known are {', '.join(_KEYS)}")
    outside = {"original_max_position_embeddings"} if fields.get("original_max_position_embeddings") else set()
    inner = Fields(values, {**defaults, **dict.fromkeys(_KEYS[kind] - set(defaults))}, inner.origin)
    for key, value in values.items():
        if value is not None and key not in _KEYS[kind] | outside:
            raise inner.error(f"`{key}` has no meaning for rope type {kind!r}")
    fraction = inner.number_or_none("partial_rotary_factor")
    if fraction is None:
        fraction = 1.0
    if not 0 < fraction <= 1:
        raise inner.error(f"`partial_rotary_factor` is {fraction}, it must be above 0 and at most 1")
    if fraction != 1 and not family.partial_rotary:
        raise inner.error(f"`partial_rotary_factor` {fraction} is not supported for family {family.model_type}")
    found: dict[str, Any] = {
        "kind": kind,
        "theta": inner.number("rope_theta"),
        "fraction": fraction,
        "interleaved": family.model_type in ("glm", "glm4") or "kv_lora_rank" in family.defaults,
    }
    if kind in ("linear", "llama3", "yarn", "dynamic"):
        found["factor"] = inner.number("factor")
    if kind in ("llama3", "yarn", "longrope"):
        found["original_context"] = inner.whole("original_max_position_embeddings")
    if kind == "llama3":
        found |= {key: inner.number(key) for key in ("low_freq_factor", "high_freq_factor")}
        if found["low_freq_factor"] >= found["high_freq_factor"]:
            raise inner.error("`low_freq_factor` must be below `high_freq_factor`")
    if kind == "yarn":
        turns = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.0, "mscale_all_dim": 0.0}
        found |= {key: inner.number_or_none(key) or default for key, default in turns.items()}
        found |= {"attention_factor": inner.number_or_none("attention_factor"), "truncate": inner.flag("truncate")}
    for key in ("theta", "factor", "original_context", "beta_fast", "beta_slow"):
        if found.get(key, 1.0) <= 0 or (key == "theta" and found[key] == 1):
            raise inner.error(f"`{'rope_theta' if key == 'theta' else key}` is {found[key]}, which turns nothing")
    return Rope(**found)
