"""A broken checkpoint is rejected with one line that names the file, field or tensor."""

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
from hetkv.models import Rope
from hetkv.runtime import Decoder, TextTokenizer, read_checkpoint
from hetkv.runtime.tensors import expected_tensors

CONFIG = {
    "model_type": "llama",
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
    tensors = {name: torch.randn(spec.shape) for name, spec in expected_tensors(read_checkpoint(tmp_path)).items()}
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


def add_tensor(directory: Path) -> None:
    path = directory / "model-0.safetensors"
    save_file(load_file(path) | {"more": torch.ones(1)}, path)


def truncate(directory: Path) -> None:
    path = directory / "model-1.safetensors"
    path.write_bytes(path.read_bytes()[:-20])


DEEPSEEK = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "num_key_value_heads": 2}
DOWN = "model.layers.1.mlp.down_proj.weight"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), r"config\.json: no such file"),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), r"config\.json: "),
    "config lacks its family": (lambda d: (d / "config.json").write_text("{}"), r"config\.json: .*`model_type`"),
    "config lacks a field": (edit_config(vocab_size=None), r"config\.json: `vocab_size` is null"),
    "config has a wrong type": (edit_config(hidden_size="8"), r"config\.json: `hidden_size` must be a whole number"),
    "unknown family": (edit_config(model_type="gpt2"), "family 'gpt2' is not supported; supported are llama"),
    "family that is read for its sizes": (edit_config(**DEEPSEEK), "family 'deepseek_v3' is read for its sizes alone"),
    "architecture of another family": (
        edit_config(architectures=["GPT2LMHeadModel"]),
        "`architectures` .'GPT2LMHeadModel'. is not that of `model_type` 'llama', LlamaForCausalLM",
    ),
    "a key of another family": (
        edit_config(sliding_window=4),
        "`sliding_window` is 4, which family llama does not have",
    ),
    "an unknown key": (edit_config(frobnicate=True), "`frobnicate` is true, which family llama does not have"),
    "other activation": (edit_config(hidden_act="relu2"), "activation 'relu2'"),
    "quantised": (edit_config(quantization_config={"quant_method": "awq"}), "`quant_method` 'awq'"),
    "partial rotary": (edit_config(partial_rotary_factor=0.5), "`partial_rotary_factor` 0.5 is not supported"),
    "rope type": (edit_config(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope type 'dynamic'"),
    "rope type that nobody knows": (edit_config(rope_scaling={"type": "x"}), "`rope_scaling`: rope type 'x'"),
    "rope lacks a field": (
        edit_config(rope_scaling={"rope_type": "llama3", "factor": 2.0}),
        "missing field `low_freq_factor`",
    ),
    "rope has a wrong type": (
        edit_config(rope_scaling={"type": "linear", "factor": "x"}),
        "`rope_scaling`: `factor` must be a number",
    ),
    "rope has an unknown field": (
        edit_config(rope_scaling={"type": "linear", "factor": 2, "mscale": 1}),
        "`mscale` has no meaning for rope type 'linear'",
    ),
    "no heads": (edit_config(num_attention_heads=0), "`num_attention_heads` is 0"),
    "heads do not divide": (edit_config(num_key_value_heads=3), "2 is no multiple of `num_key_value_heads` 3"),
    "odd head": (edit_config(head_dim=3), "3 of 3 channels of a head are rotated"),
    "layer types": (
        edit_config(
            model_type="qwen2",
            architectures=["Qwen2ForCausalLM"],
            use_sliding_window=True,
            sliding_window=4,
            layer_types=["x"],
        ),
        "`layer_types` names 1 layers, `num_hidden_layers` says 2",
    ),
    "unknown generation key": (
        lambda d: (d / "generation_config.json").write_text('{"frobnicate": 3}'),
        r"generation_config\.json: `frobnicate` is 3",
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
    "integer weights": (edit_tensor(DOWN, lambda t: t.to(torch.int32)), f"tensor '{DOWN}' has dtype I32; read are"),
    "tensor that would be ignored": (
        edit_index(lambda m: m.update({"model.layers.0.self_attn.q_proj.bias": "model-0.safetensors"})),
        "tensor 'model.layers.0.self_attn.q_proj.bias' has no place in llama",
    ),
    "FP8 weights": (edit_tensor(DOWN, lambda t: t.to(torch.float8_e4m3fn)), f"tensor '{DOWN}' has dtype F8_E4M3"),
    "NaN": (edit_tensor(DOWN, lambda t: t.where(t != t[0, 0], torch.nan)), f"tensor '{DOWN}' holds NaN or infinity"),
    "infinity": (edit_tensor(DOWN, lambda t: t.where(t != t[0, 0], torch.inf)), f"tensor '{DOWN}' holds NaN or inf"),
    "tensor that the index lacks": (
        lambda d: add_tensor(d),
        r"model-0\.safetensors: tensor 'more' is not in the index",
    ),
    "another head where it is tied": (
        edit_config(tie_word_embeddings=True),
        "'lm_head.weight' differs from 'model.embed",
    ),
    "shard missing": (lambda d: (d / "model-0.safetensors").unlink(), r"model-0\.safetensors: no such file"),
    "shard truncated": (truncate, r"model-1\.safetensors: not a readable safetensors file"),
    "shard outside": (edit_index(lambda m: m.update({DOWN: "../w.safetensors"})), "points outside the directory"),
    "index is no index": (lambda d: (d / "model.safetensors.index.json").write_text("[]"), r"index\.json: "),
    "no weights": (lambda d: (d / "model.safetensors.index.json").unlink(), r"neither model\.safetensors nor"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoint_is_rejected(name: str, checkpoint: Path) -> None:
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
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    embedding = load_file(checkpoint / index["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    edit_tensor("lm_head.weight", lambda t: embedding.clone())(checkpoint)
    edit_config(tie_word_embeddings=True)(checkpoint)
    model = Decoder.load(checkpoint)
    assert model.head is model.embedding


def test_a_single_file_wins_over_an_index(checkpoint: Path) -> None:
    """As in transformers: the index may be that of an older state."""
    old = Decoder.load(checkpoint)
    new = {name: torch.randn(spec.shape) for name, spec in expected_tensors(old.config).items()}
    save_file(new, checkpoint / "model.safetensors")
    assert torch.equal(Decoder.load(checkpoint).head, new["lm_head.weight"])


def test_values_beyond_the_compute_dtype_are_rejected(checkpoint: Path) -> None:
    edit_tensor(DOWN, lambda t: t * 1e6)(checkpoint)
    Decoder.load(checkpoint)
    with pytest.raises(InputError, match=r"holds a value beyond the range of torch\.float16"):
        Decoder.load(checkpoint, torch.float16)


def test_whole_numbers_and_empty_objects(checkpoint: Path) -> None:
    plain = read_checkpoint(checkpoint)
    edit_config(max_position_embeddings=64.0, hidden_size=8.0, quantization_config={}, eos_token_id=[3, None])(
        checkpoint
    )
    assert read_checkpoint(checkpoint) == plain


@pytest.mark.parametrize(
    ("text", "eos"),
    [('{"eos_token_id": 0}', (0,)), ('{"eos_token_id": null}', ()), ("{}", ()), ('{"eos_token_id": [5, null]}', (5,))],
)
def test_end_tokens_of_the_generation_config(text: str, eos: tuple[int, ...], checkpoint: Path) -> None:
    """As transformers has it: the file's, even where it names none; `config.json`'s only where there is no file."""
    (checkpoint / "generation_config.json").write_text(text)
    assert read_checkpoint(checkpoint).eos_ids == eos


def test_end_tokens_and_rope_of_either_spelling(checkpoint: Path) -> None:
    assert read_checkpoint(checkpoint).eos_ids == (3,)
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert read_checkpoint(checkpoint).eos_ids == (5, 6)
    edit_config(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2})(checkpoint)
    old = read_checkpoint(checkpoint).rope
    edit_config(rope_parameters={"rope_type": "linear", "factor": 2, "rope_theta": 5e5})(checkpoint)
    assert old == read_checkpoint(checkpoint).rope == Rope(5e5, "linear", 2.0)


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
