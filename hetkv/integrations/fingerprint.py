"""Fingerprints of a model, alike in every engine that reads the same checkpoint: what `Sender(fingerprint=...)` takes.

| name | value |
|---|---|
| `weights` | digest of samples of every tensor of the checkpoint's safetensors files |
| `vocabulary` | digest of the tokens and their ids |
| `config` | the sizes and constants that every config.json names |
| `rope` | rotary embedding: its kind and parameters |

An engine leaves out what it cannot know. How it loads a model must not matter: its dtype, shards, parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from hetkv.errors import InputError
from hetkv.integrations.safetensors_files import checkpoint_files, stored_tensors
from hetkv.models import FAMILIES, Rope
from hetkv.models.families import COMMON
from hetkv.models.fields import Fields, load_object
from hetkv.models.rope import read_rope

SAMPLE_BYTES = 2048
"""Read at the start and in the middle of each tensor: training changes all of them, and nobody waits for gigabytes."""
CONFIG_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "rms_norm_eps",
)
DEFAULT_THETA = 10000.0
NAMES = {
    "theta": "rope_theta",
    "fraction": "partial_rotary_factor",
    "original_context": "original_max_position_embeddings",
}


def checkpoint_fingerprint(folder: Path, config: Mapping[str, Any] | None = None) -> dict[str, str]:
    """All four of a Hugging Face directory, as far as its files tell; `config` as the engine has changed it."""
    if config is None:
        config = load_object(folder / "config.json")
    found = {"weights": weights_digest(folder), "vocabulary": folder_vocabulary(folder), **config_fingerprint(config)}
    return {name: value for name, value in found.items() if value is not None}


def config_fingerprint(config: Mapping[str, Any]) -> dict[str, str]:
    """`config` and `rope` of a config.json or what an engine made of it; of a multimodal model the text's."""
    text = config.get("text_config")
    inner: Mapping[str, Any] = text if isinstance(text, Mapping) else config
    named = ", ".join(f"{key} {_plain(inner[key])}" for key in CONFIG_KEYS if inner.get(key) is not None)
    rope = rope_text(inner)
    return {name: value for name, value in (("config", named), ("rope", rope)) if value}


def rope_text(config: Mapping[str, Any]) -> str:
    """The rotary embedding in one line: `default, rope_theta 10000`. Empty where the config has none.

    Of a family that `hetkv.models` knows, as its reader understands the fields, with their precedences and defaults.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family is not None:
        try:
            rope, windowed = read_rope(Fields(config, {**COMMON, **family.defaults}, "config.json"), family)
        except InputError:
            return _as_written(config)  # it is compared all the same
        return "; ".join(_line(one) for one in (rope, windowed) if one is not None)
    return _as_written(config)


def _line(rope: Rope) -> str:
    """A rotary embedding by the names of `config.json`: its kind, theta, and what differs from the defaults."""
    plain = Rope()
    parts = [f"{NAMES.get(name, name)} {_plain(value)}" for name, value in msgspec.structs.asdict(rope).items()
             if name != "kind" and (name == "theta" or value != getattr(plain, name))]  # fmt: skip
    return ", ".join([rope.kind, *sorted(parts)])


def _as_written(config: Mapping[str, Any]) -> str:
    """The fields of a family that is not known, in an order of their own."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not parameters and config.get("rope_theta") is None:
        return ""
    if any(isinstance(value, Mapping) for value in parameters.values()):  # one set for each kind of layer
        return "; ".join(
            f"{kind}: {_as_written({**config, 'rope_parameters': value})}" for kind, value in sorted(parameters.items())
        )
    known = dict(parameters)
    kind = known.pop("rope_type", None) or known.pop("type", None) or "default"
    known.pop("type", None)
    known.setdefault("rope_theta", config.get("rope_theta") or DEFAULT_THETA)
    factor = known.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1
    if factor != 1:
        known["partial_rotary_factor"] = factor
    parts = [f"{name} {_plain(value)}" for name, value in sorted(known.items()) if value is not None]
    return ", ".join([str(kind), *parts])[:512]


def folder_vocabulary(folder: Path) -> str | None:
    """`vocabulary_digest` of a directory's `tokenizer.json`; `None` without one. Raises `InputError`."""
    file = folder / "tokenizer.json"
    if not file.exists():
        return None
    try:
        return vocabulary_digest(tokenizer_vocabulary(load_object(file)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{file}: its vocabulary is of no known form: {error!r}") from None


def tokenizer_vocabulary(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Tokens and their ids of a `tokenizer.json`, added ones too."""
    tokens = tokenizer["model"]["vocab"]
    known = dict(tokens) if isinstance(tokens, Mapping) else {token: number for number, (token, _) in enumerate(tokens)}
    return {**known, **{token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}}


def vocabulary_digest(vocabulary: Mapping[str, int]) -> str:
    """Of a tokenizer's tokens by text, added ones too."""
    digest = blake2b(digest_size=16)
    for text, number in sorted(vocabulary.items(), key=lambda item: (item[1], item[0])):
        data = text.encode(errors="surrogatepass")
        digest.update(number.to_bytes(8, "little", signed=True) + len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def weights_digest(folder: Path) -> str | None:
    """Of every tensor its name, dtype, shape and samples of its bytes; `None` without safetensors files.

    The files that a checkpoint is split into do not matter. Raises `InputError` for files that are none.
    """
    files = checkpoint_files(folder)
    if not files:
        return None
    tensors = sorted(entry for path in files for entry in _tensors(path))
    digest = blake2b(digest_size=16)
    for name, kind, sample in tensors:
        digest.update(f"{name}\0{kind}\0{len(sample)}\0".encode(errors="surrogatepass") + sample)
    return digest.hexdigest()


def _tensors(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """Name, dtype with shape, and samples of each tensor of a safetensors file."""
    stored = stored_tensors(path)
    try:
        with path.open("rb") as file:
            for name, dtype, shape, start, stop in stored:
                yield name, f"{dtype}{list(shape)}", _sample(file, start, stop - start)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a safetensors file: {error}") from None


def _sample(file: BinaryIO, at: int, size: int) -> bytes:
    out = b""
    for start in (0, max(SAMPLE_BYTES, size // 2)):
        file.seek(at + start)
        out += file.read(max(0, min(SAMPLE_BYTES, size - start)))
    return out


def _plain(value: Any) -> str:
    """Numbers alike in all engines: 10000 for 10000.0."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
