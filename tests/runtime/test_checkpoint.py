"""A broken checkpoint is refused with one line that names the file, field or tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE

from hetkv.errors import InputError
from hetkv.runtime import Decoder, TextTokenizer, read_config
from hetkv.runtime.config import Rope
from hetkv.runtime.weights import expected_tensors

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 17,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "eos_token_id": 3,
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A good checkpoint in two shards."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    tensors = {name: torch.randn(shape) for name, shape in expected_tensors(read_config(tmp_path)).items()}
    shards = {f"model-{i}.safetensors": dict(list(tensors.items())[i::2]) for i in range(2)}
    for file, part in shards.items():
        save_file(part, tmp_path / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


def edit_config(**changes: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / "config.json").write_text(json.dumps(CONFIG | changes))

    return change


def edit_index(change_map: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change_map(index["weight_map"])
        path.write_text(json.dumps(index))

    return change


def edit_tensor(name: str, make: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        path = directory / index["weight_map"][name]
        tensors = load_file(path)
        made = make(tensors.pop(name))
        save_file(tensors if made is None else tensors | {name: made}, path)

    return change


def truncate(directory: Path) -> None:
    path = directory / "model-1.safetensors"
    path.write_bytes(path.read_bytes()[:-20])


DOWN = "model.layers.1.mlp.down_proj.weight"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), r"config\.json: no such file"),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), r"config\.json: "),
    "config lacks a field": (lambda d: (d / "config.json").write_text("{}"), r"config\.json: .*architectures"),
    "config has a wrong type": (edit_config(hidden_size="8"), r"config\.json: .*hidden_size"),
    "unknown architecture": (
        edit_config(architectures=["GPT2LMHeadModel"]),
        "'GPT2LMHeadModel' is not supported.*Llama",
    ),
    "no architecture": (edit_config(architectures=[]), "architecture 'none'"),
    "other activation": (edit_config(hidden_act="gelu"), "hidden_act 'gelu'"),
    "quantised": (edit_config(quantization_config={"quant_method": "awq"}), "quant_method 'awq'"),
    "partial rotary": (edit_config(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
    "rope type": (edit_config(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope type 'dynamic'"),
    "rope lacks a field": (edit_config(rope_scaling={"rope_type": "llama3", "factor": 2.0}), "needs 'low_freq_factor'"),
    "rope has a wrong type": (edit_config(rope_scaling={"type": "linear", "factor": "x"}), "rope parameters: .*factor"),
    "no heads": (edit_config(num_attention_heads=0), "num_attention_heads is 0"),
    "heads do not divide": (edit_config(num_key_value_heads=3), "2 is no multiple of num_key_value_heads 3"),
    "odd head": (edit_config(head_dim=3), "head_dim 3 is odd"),
    "layer types": (
        edit_config(architectures=["Qwen2ForCausalLM"], use_sliding_window=True, sliding_window=4, layer_types=["x"]),
        "layer_types has 1 entries for 2 layers",
    ),
    "tensor missing": (edit_index(lambda m: m.pop(DOWN)), f"tensor '{DOWN}' is missing"),
    "two tensors missing": (
        edit_index(lambda m: [m.pop(DOWN), m.pop("lm_head.weight")]),
        f"tensor '{DOWN}' and 1 more",
    ),
    "tensor missing from its shard": (
        edit_tensor(DOWN, lambda t: None),
        rf"model-.\.safetensors: tensor '{DOWN}' is missing",
    ),
    "wrong shape": (
        edit_tensor("model.embed_tokens.weight", lambda t: t[1:].clone()),
        r"'model\.embed_tokens\.weight' has shape \[16, 8\], config\.json asks for \[17, 8\]",
    ),
    "integer weights": (edit_tensor(DOWN, lambda t: t.to(torch.int32)), f"tensor '{DOWN}' has dtype torch.int32"),
    "tensor that would be ignored": (
        edit_index(lambda m: m.update({"model.layers.0.self_attn.q_proj.bias": "model-0.safetensors"})),
        "tensor 'model.layers.0.self_attn.q_proj.bias' has no place in LlamaForCausalLM",
    ),
    "shard missing": (lambda d: (d / "model-0.safetensors").unlink(), r"model-0\.safetensors: no such file"),
    "shard truncated": (truncate, r"model-1\.safetensors: not a readable safetensors file"),
    "shard outside": (edit_index(lambda m: m.update({DOWN: "../w.safetensors"})), "points outside the directory"),
    "index is no index": (lambda d: (d / "model.safetensors.index.json").write_text("[]"), r"index\.json: "),
    "no weights": (lambda d: (d / "model.safetensors.index.json").unlink(), r"neither model\.safetensors nor"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoint_is_refused(name: str, checkpoint: Path) -> None:
    breaks, message = BROKEN[name]
    breaks(checkpoint)
    with pytest.raises(InputError, match=message) as caught:
        Decoder.load(checkpoint)
    assert "\n" not in str(caught.value)


def test_good_checkpoint_loads(checkpoint: Path) -> None:
    model = Decoder.load(str(checkpoint), torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.kv_spec.layers[0].segments[0][1:] == (1, 4)
    with pytest.raises(InputError, match="no such checkpoint directory"):
        Decoder.load(checkpoint / "absent")


def test_tied_head_may_be_saved_twice(checkpoint: Path) -> None:
    edit_config(tie_word_embeddings=True)(checkpoint)
    model = Decoder.load(checkpoint)
    assert model.head is model.embedding


def test_end_tokens_and_rope_of_either_spelling(checkpoint: Path) -> None:
    assert read_config(checkpoint).eos_ids == (3,)
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert read_config(checkpoint).eos_ids == (5, 6)
    edit_config(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2})(checkpoint)
    old = read_config(checkpoint).rope
    edit_config(rope_parameters={"rope_type": "linear", "factor": 2, "rope_theta": 5e5})(checkpoint)
    assert old == read_config(checkpoint).rope == Rope(5e5, "linear", 2.0)


def test_tokenizer_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json: no such file"):
        TextTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: not a readable tokenizer"):
        TextTokenizer.load(tmp_path)
    Tokenizer(BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])).save(str(tmp_path / "tokenizer.json"))
    tokenizer = TextTokenizer.load(tmp_path)
    assert tokenizer.vocab_size == 3
    assert tokenizer.encode("abb") == [2, 1]
    assert tokenizer.decode([2]) == "ab"
