"""The GGUF file of a Hugging Face directory of the Llama family, with the package `gguf`.

Query and key weights are stored as llama.cpp rotates them: rows c and c + d/2 of a head become neighbours. Other
families are converted by llama.cpp's own `convert_hf_to_gguf.py`; the engine takes any GGUF file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, TokenType, get_tensor_name_map, quants

from hetkv.errors import InputError, UnsupportedError
from hetkv.integrations.fingerprint import checkpoint_fingerprint, tokenizer_vocabulary
from hetkv.integrations.safetensors_files import float_tensors
from hetkv.models import ModelConfig, Rope, read_config
from hetkv.models.fields import load_object

PREFIX = "hetkv.fingerprint."
"""Metadata with the directory's fingerprint: what is in the file has other bytes and names."""
TYPES = {
    "float32": GGMLQuantizationType.F32,
    "float16": GGMLQuantizationType.F16,
    "bfloat16": GGMLQuantizationType.BF16,
}
"""Of matrices; vectors are always float32, as llama.cpp wants them."""
NOT_WRITTEN = ("rotary_emb.inv_freq",)


def write(folder: Path, file: Path, dtype: str = "float32") -> Path:
    """Write `file` and return it. Raises `InputError` for a directory that is none, or not of this family."""
    config = read_config(folder)
    if config.family != "llama" or config.rope != Rope(theta=config.rope.theta):
        raise UnsupportedError(
            f"{folder}: {config.family} with rope {config.rope.kind}: only llama with the default one is written; "
            "llama.cpp's convert_hf_to_gguf.py knows others"
        )
    writer = GGUFWriter(file, "llama")
    writer.add_name(folder.name)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_vocab_size(config.vocab_size)
    _add_vocabulary(writer, folder, config)
    for name, value in checkpoint_fingerprint(folder).items():
        writer.add_string(PREFIX + name, value)
    for name, tensor in _tensors(folder, config):
        kind = TYPES[dtype] if tensor.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(name, quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _tensors(folder: Path, config: ModelConfig) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """By llama.cpp's names."""
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_layers)
    for name, tensor in float_tensors(folder):
        if name.endswith(NOT_WRITTEN) or (name == "lm_head.weight" and config.tied_embeddings):
            continue
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise InputError(f"{folder}: llama.cpp has no name for tensor {name!r}")
        for projection, heads in (("q_proj", config.num_heads), ("k_proj", config.num_kv_heads)):
            if f".{projection}." in name:
                tensor = interleave(tensor, heads)
        yield known, np.ascontiguousarray(tensor)


def interleave(tensor: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Rows `[heads * d, ...]` of halves that are rotated against each other, as rows of neighbours that are."""
    split = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return np.asarray(split.swapaxes(1, 2).reshape(tensor.shape))


def _add_vocabulary(writer: GGUFWriter, folder: Path, config: ModelConfig) -> None:
    """The tokens of a byte-level BPE; none for other tokenizers, as the engine takes and gives token ids."""
    path = folder / "tokenizer.json"
    tokenizer = load_object(path) if path.exists() else {}
    model = tokenizer.get("model", {})
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        writer.add_tokenizer_model("none")
        return
    tokens = {number: text for text, number in tokenizer_vocabulary(tokenizer).items()}
    special = {token["id"] for token in tokenizer.get("added_tokens") or () if token.get("special")}
    kinds = {number: TokenType.CONTROL if number in special else TokenType.NORMAL for number in tokens}
    every = range(config.vocab_size)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokens.get(number, f"[PAD{number}]") for number in every])
    writer.add_token_types([kinds.get(number, TokenType.UNUSED) for number in every])
    writer.add_token_merges(merges)
