"""`generation_config.json`: the tokens that end a text, and what would change greedy decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from hetkv.models.config import ModelConfig
from hetkv.models.fields import Fields, load_object
from hetkv.models.reader import token_ids

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "penalty_alpha": (0.0,),
    "guidance_scale": (1.0,),
    "renormalize_logits": (False, True),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "stop_strings": ([],),
    "token_healing": (False,),
    "generation_kwargs": ({},),
    "cache_implementation": ("dynamic", "dynamic_full", "static", "hybrid", "sliding_window", "offloaded",
                             "offloaded_static", "offloaded_hybrid", "hybrid_chunked", "offloaded_hybrid_chunked"),
    **dict.fromkeys(
        ("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "constraints",
         "force_words_ids", "watermarking_config", "max_time", "dola_layers", "forced_decoder_ids",
         "prompt_lookup_num_tokens", "use_mtp"), (),
    ),
}  # fmt: skip
"""Values with which a key leaves greedy decoding as it is."""

_NAMES = """
transformers_version _from_model_config bos_token_id pad_token_id decoder_start_token_id max_length max_new_tokens
do_sample temperature top_k top_p min_p typical_p top_h epsilon_cutoff eta_cutoff p_less low_memory use_cache
cache_config max_cache_len length_penalty early_stopping num_return_sequences output_attentions
output_hidden_states output_scores output_logits return_dict_in_generate remove_invalid_values
num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold assistant_early_exit
assistant_lookbehind target_lookbehind max_matching_ngram_size is_assistant prefill_chunk_size compile_config
disable_compile _commit_hash return_legacy_cache trust_remote_code do_remask
"""
_HARMLESS = frozenset(_NAMES.split())
"""Sampling, which greedy decoding does not do, and keys that change no token."""


class Generation(msgspec.Struct, frozen=True):
    """How a checkpoint wants its texts generated."""

    eos_ids: tuple[int, ...]
    """The file's where there is one, even where it names none; otherwise those of `config.json`."""
    changes: tuple[str, ...] = ()
    """Settings that change what greedy decoding gives, as `name value`."""


def read_generation(directory: Path, config: ModelConfig) -> Generation:
    """`Generation` of a checkpoint directory. `InputError` for a key that is not known."""
    path = directory / "generation_config.json"
    if not path.exists():
        return Generation(config.eos_ids)
    fields = Fields(load_object(path), {"eos_token_id": None, **dict.fromkeys(_NEUTRAL)}, str(path))
    fields.reject_unknown(_HARMLESS, "a generation config that hetkv knows")
    changes = [
        f"{name} {fields.get(name)}"
        for name, neutral in _NEUTRAL.items()
        if fields.get(name) is not None and fields.get(name) not in neutral
    ]
    return Generation(token_ids(fields, "eos_token_id"), tuple(changes))
