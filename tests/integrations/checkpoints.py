"""Small checkpoints for the tests of engines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

import hetkv.runtime

VOCABULARY = 3072
TOKENIZER = Path(hetkv.runtime.__file__).parent / "data" / "demo" / "tokenizer.json"


def llama(
    folder: Path, *, heads: int, kv_heads: int, seed: int = 0, layers: int = 2, dtype: str = "float32", **config: Any
) -> Path:
    """A Llama with random weights, so large that every KV entry decides on the tokens; with the demo's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 64,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **config}))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    shutil.copy(TOKENIZER, folder / "tokenizer.json")
    return folder


def with_config(folder: Path, to: Path, **changes: Any) -> Path:
    """A copy whose config.json differs in these keys."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **changes}))
    return to


def with_vocabulary(folder: Path, to: Path) -> Path:
    """A copy in whose tokenizer two tokens have changed places."""
    shutil.copytree(folder, to)
    tokenizer = json.loads((to / "tokenizer.json").read_text())
    tokens = tokenizer["model"]["vocab"]
    one, other = list(tokens)[300:302]
    tokens[one], tokens[other] = tokens[other], tokens[one]
    (to / "tokenizer.json").write_text(json.dumps(tokenizer))
    return to
