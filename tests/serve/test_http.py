"""The HTTP side without instances: API keys, the end of a server, stop strings, chat templates, bad command lines."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hetkv.cli import main
from hetkv.errors import InputError
from hetkv.runtime.chat import ChatTemplate
from hetkv.serve.answer import StopStrings
from hetkv.serve.app import application
from hetkv.serve.limits import Limits


class Echo:
    """An engine that answers with the body's length."""

    async def complete(self, request: Request, body: bytes, chat: bool) -> Response:
        if body == b"fault":
            raise RuntimeError("a secret of the server")
        return JSONResponse({"length": len(body), "chat": chat})

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "org/name"}]}

    async def health(self) -> tuple[bool, dict[str, Any]]:
        return True, {}


def ask(limits: Limits, method: str, path: str, **what: Any) -> httpx.Response:
    async def one() -> httpx.Response:
        transport = httpx.ASGITransport(limits, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.request(method, path, **what)

    return asyncio.run(one())


def test_api_keys() -> None:
    limits = Limits(application(Echo()), ("one", "two"), 100, 10)
    for key, status in (("one", 200), ("two", 200), ("three", 401), ("", 401)):
        answer = ask(limits, "POST", "/v1/chat/completions", content=b"abc", headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == status
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert ask(limits, "GET", "/v1/models").status_code == 401
    assert ask(limits, "POST", "/instances/x/role", content=b"{}").status_code == 401
    assert ask(limits, "GET", "/health").status_code == 200
    assert ask(limits, "GET", "/v1/models/org/name", headers={"Authorization": "Bearer one"}).json() == {
        "id": "org/name"
    }


def test_a_server_that_ends_takes_no_more() -> None:
    limits = Limits(application(Echo()), (), 100, 10)
    limits.closing = True
    answer = ask(limits, "POST", "/v1/completions", content=b"abc")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"] == {
        "message": "the server is ending", "type": "server_error", "param": None, "code": "shutting_down"
    }  # fmt: skip


def test_a_fault_tells_nothing_of_the_server() -> None:
    answer = ask(Limits(application(Echo()), (), 100, 10), "POST", "/v1/completions", content=b"fault")
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "RuntimeError in the server"


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)
def test_stop_strings_end_a_text_however_it_comes(text: str, stops: list[str], cuts: list[int]) -> None:
    """What is sent is the text before the first of them; nothing is sent that would have to be taken back."""
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    strings, sent, stopped = StopStrings(stops), "", False
    for start, stop in pairwise(edges):
        more, stopped = strings.push(text[start:stop], last=stop == len(text))
        sent += more
        if stopped:
            break
    if text:
        assert stopped == bool(found)
        # Of overlapping ones the first that is whole ends it, which may begin after another.
        assert sent == text[: len(sent)]
        assert (sent == text) if not found else any(text[len(sent) :].startswith(stop) for stop in stops)


MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Why is the sky blue? <&>\n\n"},
    {"role": "assistant", "content": " It scatters. "},
    {"role": "user", "content": "And \"red\"?"},
]  # fmt: skip
TEMPLATES = {
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "trims": "{{ bos_token }}\n{% for m in messages %}\n    {% if loop.index > 2 %}{% continue %}{% endif %}\n"
    "    [{{ m.content | trim | tojson }}]\n{% endfor %}{{ eos_token }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_rendered_as_transformers_does(name: str, checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint[0])
    tokenizer.chat_template = TEMPLATES[name]
    tokenizer.save_pretrained(tmp_path)
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert template.render(MESSAGES) == expected


def test_templates_that_object_or_are_broken() -> None:
    strict = ChatTemplate("{{ raise_exception('roles must alternate') }}", {}, "x")
    with pytest.raises(InputError, match="rejects the messages: roles must alternate"):
        strict.render(MESSAGES)
    with pytest.raises(InputError, match="rejects the messages"):
        ChatTemplate("{{ ''.__class__.__mro__ }}", {}, "x").render(MESSAGES)
    with pytest.raises(InputError, match="is no Jinja"):
        ChatTemplate("{% for %}", {}, "x")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--model", "nowhere"], "nowhere: no such checkpoint directory"),
        (["--decode", "2xTP"], "--decode 2xTP: not of the form"),
        (["--decode-layout", "odd"], "decode-0: `layout` 'odd' is not known; known are nhd"),
        (["--prefill-dtype", "int8"], "does not compute with int8"),
        (["--plan", "nowhere.yaml"], "nowhere.yaml"),
        (["--join", "x:1", "--prefill", "2xTP1"], "--join starts one instance"),
        (["--join", "x:1", "--none"], "nothing would be started"),
        (["--cluster", "ray", "--join", "x:1"], "--cluster ray starts instances of the reference runtime"),
        (["--kv-tokens", "0"], "--kv-tokens must be at least 1"),
        (["--max-num-batched-tokens", "8"], "leaves no room for prompts"),
        (["--decode-routing", "luck"], "known are"),
        (["--port", "1", "--host", "203.0.113.1"], "cannot listen at 203.0.113.1:1"),
    ],
)
def test_bad_command_lines_are_one_line(options: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *options]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.startswith("hetkv serve: ")
    assert error.count("\n") == 1
