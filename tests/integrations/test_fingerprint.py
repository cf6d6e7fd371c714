"""Fingerprints of checkpoints: equal however the files are cut, unequal for any tensor or token that differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hetkv.errors import InputError
from hetkv.integrations.fingerprint import (
    SAMPLE_BYTES,
    checkpoint_fingerprint,
    config_fingerprint,
    rope_text,
    vocabulary_digest,
    weights_digest,
)

safetensors = pytest.importorskip("safetensors.torch")


def tensors_of(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"embed": (64, 32), "layers.0.k": (32, 32), "layers.0.norm": (32,), "head": (300, 64), "scalar": ()}
    return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


def save(folder: Path, tensors: dict[str, torch.Tensor], files: int = 1) -> Path:
    """A checkpoint of one file, or of several with their index."""
    folder.mkdir()
    names = list(tensors)
    if files == 1:
        safetensors.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    parts = {f"part-{i}.safetensors": names[i::files] for i in range(files)}
    for file, part in parts.items():
        safetensors.save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    safetensors.save_file({"unused": torch.ones(2)}, folder / "consolidated.safetensors")
    return folder


def test_weights_do_not_depend_on_files(tmp_path: Path) -> None:
    one, three = save(tmp_path / "one", tensors_of()), save(tmp_path / "three", tensors_of(), 3)
    assert weights_digest(one) == weights_digest(three)
    assert weights_digest(tmp_path) is None


@pytest.mark.parametrize("name", list(tensors_of()))
def test_each_tensor_counts(tmp_path: Path, name: str) -> None:
    """Its values, at the start and in the middle, its dtype, its name and its absence."""
    same = weights_digest(save(tmp_path / "same", tensors_of()))
    middle = tensors_of()[name].numel() // 2
    changes: list[dict[str, torch.Tensor]] = []
    for at in {0, middle}:
        changed = tensors_of()
        changed[name].view(-1)[at] += 1
        changes.append(changed)
    changes.append({**tensors_of(), name: tensors_of()[name].to(torch.bfloat16)})
    rest = {other: tensor for other, tensor in tensors_of().items() if other != name}
    changes += [rest, {**rest, f"{name}.x": tensors_of()[name]}]
    found = {weights_digest(save(tmp_path / str(i), changed)) for i, changed in enumerate(changes)}
    assert len(found) == len(changes)
    assert same not in found


def test_large_tensors_are_sampled(tmp_path: Path) -> None:
    """Few bytes of each are read: a change outside them is not seen, one inside is."""
    plain = {"w": torch.zeros(8 * SAMPLE_BYTES, dtype=torch.uint8)}
    digest = weights_digest(save(tmp_path / "plain", plain))
    for name, at, seen in (("inside", 4 * SAMPLE_BYTES, True), ("outside", 2 * SAMPLE_BYTES, False)):
        changed = {"w": plain["w"].clone()}
        changed["w"][at] = 1
        assert (weights_digest(save(tmp_path / name, changed)) != digest) is seen


@pytest.mark.parametrize("content", [b"", b"x", b"\xff" * 16, (5).to_bytes(8, "little") + b"[1,2]"])
def test_what_is_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors"):
        weights_digest(tmp_path)


def test_vocabularies() -> None:
    vocabulary = {"a": 0, "b": 1, "\u0120c": 2}
    assert vocabulary_digest(vocabulary) == vocabulary_digest(dict(reversed(vocabulary.items())))
    swapped, other = {"b": 0, "a": 1, "\u0120c": 2}, {"a": 0, "b": 1, " c": 2}
    others = [{**vocabulary, "d": 3}, swapped, other, {"ab": 0, "\u0120c": 2}]
    assert len({vocabulary_digest(other) for other in [vocabulary, *others]}) == 5


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"rope_theta": 10000.0}, "default, rope_theta 10000"),
        ({"rope_theta": 500000}, "default, rope_theta 500000"),
        ({"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}, "default, rope_theta 10000"),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 4.0}},
            "linear, factor 4, rope_theta 1000000",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.5}}, "yarn, factor 2.5, rope_theta 10000"),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "default, partial_rotary_factor 0.5, rope_theta 10000"),
        ({"hidden_size": 8}, ""),
    ],
)
def test_rope(config: dict[str, Any], text: str) -> None:
    """The old fields of config.json and the new ones say the same."""
    assert rope_text(config) == text


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"model_type": "llama"}, "default, rope_theta 10000"),
        ({"model_type": "glm"}, "default, interleaved True, partial_rotary_factor 0.5, rope_theta 10000"),
        (
            {
                "model_type": "qwen2",
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
                "rope_theta": 1e6,
            },
            "yarn, factor 4, original_max_position_embeddings 64, rope_theta 1000000",
        ),
        ({"model_type": "llama", "rope_scaling": {"type": "unheard"}}, "unheard, rope_theta 10000"),
    ],
)
def test_rope_of_a_known_family(config: dict[str, Any], text: str) -> None:
    """`rope_scaling` wins, a family's defaults count, and what its reader rejects is compared as it is written."""
    assert rope_text(config) == text


def test_checkpoint(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", tensors_of())
    config = {"model_type": "llama", "hidden_size": 32, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "use_cache": True}
    (folder / "config.json").write_text(json.dumps(config))
    found = checkpoint_fingerprint(folder)
    assert set(found) == {"weights", "config", "rope"}
    assert found["config"] == "model_type llama, hidden_size 32, rms_norm_eps 1e-05"
    assert config_fingerprint({"text_config": config, "vision_config": {}}) == {
        "config": found["config"],
        "rope": found["rope"],
    }


def test_engines_that_read_it_agree(tmp_path: Path) -> None:
    """What transformers makes of a config.json has the fingerprint of the file itself."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(hidden_size=96, rope_theta=20000.0, num_attention_heads=3, num_key_value_heads=3)
    config.save_pretrained(tmp_path)
    read = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    assert config_fingerprint(read) == checkpoint_fingerprint(tmp_path)
    assert config_fingerprint(read)["rope"] == "default, rope_theta 20000"
