"""What a GGUF file says of its model, in the words of `hetkv.integrations.fingerprint`."""

from __future__ import annotations

from typing import Any

import llama_cpp
import numpy as np

from hetkv.integrations.fingerprint import config_fingerprint, vocabulary_digest
from hetkv.integrations.llama_cpp.cache import metadata
from hetkv.integrations.llama_cpp.gguf_file import PREFIX

NAMES = ("weights", "vocabulary", "config", "rope")
FIELDS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
}


def fingerprint_of(model: Any) -> dict[str, str]:
    """Of a loaded model. Without the metadata of `gguf_file.write` the weights are unknown: GGUF files change them."""
    found = {**config_fingerprint(_config(model)), **_vocabulary(model)}
    written = {name: metadata(model, PREFIX + name) for name in NAMES}
    return {**found, **{name: value for name, value in written.items() if value}}


def _config(model: Any) -> dict[str, Any]:
    """As a config.json would say it."""
    architecture = metadata(model, "general.architecture")

    def number(name: str) -> float | None:
        text = metadata(model, f"{architecture}.{name}")
        return float(text) if text else None

    config: dict[str, Any] = {"model_type": architecture}
    config |= {key: number(name) for key, name in FIELDS.items()}
    config["vocab_size"] = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    epsilon = number("attention.layer_norm_rms_epsilon")
    config["rms_norm_eps"] = None if epsilon is None else float(str(np.float32(epsilon)))  # kept in 32 bits
    if not metadata(model, f"{architecture}.rope.scaling.type"):
        config["rope_theta"] = number("rope.freq_base")
    return config


def _vocabulary(model: Any) -> dict[str, str]:
    """Of the tokens, without those that only fill the file up."""
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    if llama_cpp.llama_vocab_type(vocabulary) == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
        return {}
    unused = llama_cpp.LLAMA_TOKEN_ATTR_UNUSED
    tokens = {
        llama_cpp.llama_vocab_get_text(vocabulary, number).decode(errors="surrogateescape"): number
        for number in range(llama_cpp.llama_vocab_n_tokens(vocabulary))
        if not llama_cpp.llama_vocab_get_attr(vocabulary, number) & unused
    }
    return {"vocabulary": vocabulary_digest(tokens)}
