"""`hetkv demo`: what it is given, with what it compares, and what it says of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hetkv.cli import main
from hetkv.runtime.chat import ChatTemplate
from hetkv.runtime.demo import MODEL
from tests.models.zoo import Specimen, prompt, write_tokenizer
from tests.runtime.test_demo import demo

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def chatty(tmp_path: Path) -> Path:
    """The demo checkpoint with a chat template."""
    target = tmp_path / "chatty"
    shutil.copytree(MODEL, target)
    path = target / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    return target


def test_ids_of_prompts_and_tokens_are_written(tmp_path: Path) -> None:
    result = demo(tmp_path, "--tokens", "12", "--prompt", "And it came to pass", "--prompt", "[/INST] Hello [bold]")
    assert (result["reference"], result["outcome"], result["same_prompt_ids"]) == ("transformers", "identical", True)
    assert [request["prompt"] for request in result["requests"]] == ["And it came to pass", "[/INST] Hello [bold]"]
    for request in result["requests"]:
        assert len(request["prompt_ids"]) == request["prompt_tokens"]
        assert request["token_ids"] == request["reference_ids"]
        assert request["first_difference"] is None


def test_a_prompt_is_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo(tmp_path, "--tokens", "4", "--prompt", "[INST] Hello [/INST]")
    printed = capsys.readouterr().out
    assert "[INST] Hello [/INST]" in printed
    assert "identical (compared with transformers)" in printed


def test_prompts_of_files(tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("And he said\n\nThe words of\n")
    result = demo(tmp_path, "--tokens", "4", "--prompts", str(lines), "--requests", "3")
    assert [request["prompt"] for request in result["requests"]] == ["And he said", "The words of", "he said"]
    objects = tmp_path / "prompts.jsonl"
    objects.write_text('"And he said"\n{"prompt": "a\\nb"}\n')
    result = demo(tmp_path, "--tokens", "4", "--prompts", str(objects))
    assert [request["prompt"] for request in result["requests"]] == ["And he said", "a\nb"]


def test_chats_are_rendered_by_the_template(tmp_path: Path, chatty: Path) -> None:
    from hetkv.runtime import TextTokenizer

    tokenizer, messages = TextTokenizer.load(chatty), tmp_path / "chats.jsonl"
    messages.write_text(
        json.dumps({"messages": [{"role": "system", "content": "so"}, {"role": "user", "content": "Who?"}]})
    )
    result = demo(tmp_path, "--model", str(chatty), "--tokens", "4", "--prompts", str(messages))
    rendered = "<system> so\n<user> Who?\n<assistant>"
    assert result["requests"][0]["prompt_ids"] == tokenizer.encode(rendered, special_tokens=False)
    result = demo(tmp_path, "--model", str(chatty), "--tokens", "4", "--chat", "--prompt", "Who?")
    assert result["requests"][0]["prompt_ids"] == tokenizer.encode("<user> Who?\n<assistant>", special_tokens=False)
    assert result["same_prompt_ids"] is True


RENDERED = (
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{%- if tools is not none %}tools{% endif %}{% if documents is none %}none{% endif %}{{ messages[0].content }}",
    "{% set x = 'a' %}\n{% generation %}{% set x = 'b' %}{{ messages[0]['content'] }}\n{% endgeneration %}{{ x }}",
    "{% for m in messages %}{{ m | tojson(separators=(',', ':')) }}{% break %}{% endfor %}{{ bos_token }}",
    "{{ {'b': 1, 'a': '<'} | tojson(sort_keys=True) }} {% if add_generation_prompt %}go{% endif %}",
)


@pytest.mark.parametrize("template", RENDERED)
def test_a_template_is_rendered_as_by_transformers(template: str, chatty: Path) -> None:
    from transformers import AutoTokenizer

    (chatty / "chat_template.jinja").write_text(template)
    (chatty / "special_tokens_map.json").write_text('{"bos_token": "the"}')  # it wins over tokenizer_config.json
    messages = [{"role": "user", "content": "Who said <that>?"}, {"role": "assistant", "content": "I"}]
    loaded = ChatTemplate.load(chatty)
    assert loaded is not None
    theirs = AutoTokenizer.from_pretrained(chatty)
    assert loaded.render(messages) == theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def test_rounding_is_distinguished_from_a_fault(tmp_path: Path) -> None:
    """Decoding from fp8 KV gives other tokens than transformers' fp32: those of one process that rounds alike."""
    options = ("--tokens", "60", "--decode-dtype", "float8_e5m2", "--prefill-dtype", "float16")
    result = demo(tmp_path, *options)
    assert result["outcome"] == "rounding"
    request = result["requests"][0]
    assert (
        request["token_ids"][: request["first_difference"]] == request["reference_ids"][: request["first_difference"]]
    )
    alone = demo(tmp_path, *options, "--reference", "self")
    assert (alone["reference"], alone["outcome"]) == ("self", "identical")


def test_nothing_to_compare_with(tmp_path: Path) -> None:
    result = demo(tmp_path, "--tokens", "4", "--reference", "none")
    assert (result["identical"], result["outcome"]) == (None, "not compared")
    assert result["requests"][0]["reference_ids"] is None


def test_penalties_may_be_left_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "penalised"
    directory.mkdir()
    Specimen("llama", "llama").make(directory)
    (directory / "generation_config.json").write_text('{"repetition_penalty": 1.5}')
    write_tokenizer(directory)
    options = ("--model", str(directory), "--prompt", prompt(9), "--tokens", "8")
    assert main(["demo", *options]) == 2
    assert "repetition_penalty 1.5 changes greedy decoding" in capfd.readouterr().err
    pools = ("--prefill-dtype", "float32", "--decode-dtype", "float32")
    assert demo(tmp_path, *options, *pools, "--plain-greedy")["identical"] is True


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--prompt", ""), "a prompt is empty"),
        (("--prompt", "abc \udcff"), "not UTF-8 at character 4"),
        (("--prompt", "a", "--prompts", "b"), "give one of them"),
        (("--chat",), "--chat goes with --prompt"),
        (("--chat", "--prompt", "a"), "its tokenizer has no chat template"),
        (("--prompt", "so " * 1100), "the model's context has 1024 (`max_position_embeddings`)"),
        (("--prompts", "{tmp}/none"), "none: No such file"),
        (("--prompts", "{tmp}/empty.txt"), "empty.txt: no prompt in it"),
        (("--prompts", "{tmp}/latin.txt"), "latin.txt: not UTF-8"),
        (("--prompts", "{tmp}/bad.jsonl"), "bad.jsonl:1: must be a string"),
        (("--prompts", "{tmp}/worse.jsonl"), "worse.jsonl:1: a message has a `role`"),
    ],
)
def test_bad_prompts_are_one_line(
    options: tuple[str, ...], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}')
    (tmp_path / "worse.jsonl").write_text('{"messages": [{"role": "user"}]}')
    assert main(["demo", *(option.format(tmp=tmp_path) for option in options)]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("hetkv")]
    assert len(lines) == 1
    assert said in lines[0]
