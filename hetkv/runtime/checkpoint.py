"""A checkpoint directory's `ModelConfig`, as far as the decoder computes it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from hetkv.errors import InputError
from hetkv.models import FAMILIES, Generation, ModelConfig, read_config, read_generation
from hetkv.runtime.mlp import ACTIVATIONS

ROPE_KINDS = ("default", "linear", "llama3", "yarn")


def read_checkpoint(directory: Path | str) -> ModelConfig:
    """`ModelConfig` with the end tokens of `generation_config.json`. `InputError` for what is not computed."""
    path = Path(directory)
    if not path.is_dir():
        raise InputError(f"{path}: no such checkpoint directory")
    config = read_config(path)
    check_computed(config, str(path / "config.json"))
    return msgspec.structs.replace(config, eos_ids=read_generation(path, config).eos_ids)


def greedy_settings(directory: Path | str, config: ModelConfig) -> Generation:
    """What `generation_config.json` says; see `Generation.changes`."""
    return read_generation(Path(directory), config)


def check_computed(config: ModelConfig, origin: str) -> None:
    """`InputError` that names the family or the field which the decoder does not compute."""
    if not FAMILIES[config.family].computed:
        known = ", ".join(name for name, family in FAMILIES.items() if family.computed)
        raise InputError(
            f"{origin}: family {config.family!r} is read for its sizes alone; the reference runtime computes {known}"
        )
    if config.multimodal:
        raise InputError(
            f"{origin}: a model that reads more than text is not supported, only its text part's own files"
        )
    if config.quantisation is not None:
        raise InputError(f"{origin}: quantised weights (`quant_method` {config.quantisation!r}) are not supported")
    if config.activation not in ACTIVATIONS:
        raise InputError(
            f"{origin}: activation {config.activation!r} is not supported; supported are {', '.join(ACTIVATIONS)}"
        )
    for rope in (config.rope, config.sliding_rope):
        if rope is not None and rope.kind not in ROPE_KINDS:
            raise InputError(
                f"{origin}: rope type {rope.kind!r} is not supported; supported are {', '.join(ROPE_KINDS)}"
            )
