"""What clients may send by mistake, or on purpose: each is an error that names it, and no one else waits for it."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import httpx
import pytest

from hetkv.errors import ApiError, InputError
from hetkv.serve.http import bound
from hetkv.serve.protocol import MOST_SEQUENCES, json_object, parse
from tests.serve.serving import Serving

PROMPT: dict[str, Any] = {"model": "tiny", "prompt": "x", "max_tokens": 2}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
KINDS: list[Any] = [None, True, -1, 0, 1.5, 10**40, -(10**40), 1e308, "", "x", [], [[]], [None], {}, {"a": 1}]
FIELDS = (
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "n", "seed",
    "stop", "stream", "stream_options", "ignore_eos", "logprobs", "top_logprobs", "best_of", "tools", "priority",
    "logit_bias", "response_format", "chat_template_kwargs", "metadata", "unknown",
)  # fmt: skip


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("field", FIELDS)
def test_every_field_with_every_kind_of_value(field: str, chat: bool) -> None:
    """It is understood, or an error of the client that has a message."""
    for value in KINDS:
        body = json.dumps({**(CHAT if chat else PROMPT), field: value}).encode()
        try:
            call = parse(body, chat)
        except ApiError as error:
            rejected = error
        else:
            rejected = None
        if rejected is not None:
            assert rejected.status == 400
            assert str(rejected)
            assert (rejected.param or field).split(".")[0] in (field, "prompt", "messages", "stream_options")
        else:
            assert 1 <= call.n <= 32
            assert -(1 << 63) <= call.sampling.seed < 1 << 63
            assert call.max_tokens is None or call.max_tokens > 0


@pytest.mark.parametrize(("seed", "taken"), [(2**63 - 1, True), (-(2**63), True), (2**63, False), (-(2**63) - 1, False),
                                             (10**40, False)])  # fmt: skip
def test_seeds_are_of_64_bits(server: Serving, seed: int, taken: bool) -> None:
    """The last choices of several have the next seeds, also after the largest one."""
    answer = httpx.post(server.url + "/v1/completions", json={**PROMPT, "seed": seed, "n": 2}, timeout=60)
    if taken:
        assert [choice["finish_reason"] for choice in answer.json()["choices"]] == ["length"] * 2
    else:
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "seed")


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a":' * 100_000, b'{"prompt":' + b"[" * 5000])
def test_a_body_of_too_many_levels(server: Serving, body: bytes) -> None:
    with pytest.raises(ApiError, match=r"not JSON|inside of each other"):
        json_object(body)
    name = next(iter(server.health()["instances"]))
    for path in ("/v1/completions", "/v1/chat/completions", f"/instances/{name}/role"):
        answer = httpx.post(server.url + path, content=body[:190_000], timeout=30)
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_a_request_has_a_number_of_choices_at_most() -> None:
    assert (
        len(parse(json.dumps({**PROMPT, "prompt": [[5]] * MOST_SEQUENCES}).encode(), False).prompts) == MOST_SEQUENCES
    )
    for prompts, n in ((MOST_SEQUENCES + 1, 1), (MOST_SEQUENCES // 4, 5)):
        with pytest.raises(ApiError, match=f"{MOST_SEQUENCES} choices, not {prompts} prompts with {n} each"):
            parse(json.dumps({**PROMPT, "prompt": [[5]] * prompts, "n": n}).encode(), False)


@pytest.mark.parametrize("part", [{"type": "text"}, {"type": "text", "text": 5}, {"type": "image_url"}, "x", None])
def test_parts_of_a_message_are_texts(part: Any) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]
    with pytest.raises(ApiError, match=r"messages\[0\]"):
        parse(json.dumps({**CHAT, "messages": messages}).encode(), True)


def test_the_field_of_an_option_is_named_with_it() -> None:
    with pytest.raises(ApiError, match=r"stream_options\.x"):
        parse(json.dumps({**PROMPT, "stream": True, "stream_options": {"x": 1}}).encode(), False)


VLLM = {
    "add_special_tokens": True, "allowed_token_ids": None, "bad_words": [], "ignore_eos": None, "min_tokens": 0,
    "include_stop_str_in_output": False, "kv_transfer_params": None, "priority": 0, "prompt_logprobs": None,
    "repetition_penalty": 1.0, "return_token_ids": False, "skip_special_tokens": True, "stop_token_ids": [],
    "spaces_between_special_tokens": True, "truncate_prompt_tokens": None,
}  # fmt: skip


def test_fields_of_vllm_that_ask_for_nothing() -> None:
    parse(json.dumps({**PROMPT, **VLLM}).encode(), False)
    chat = {**VLLM, "add_special_tokens": False, "add_generation_prompt": True, "chat_template_kwargs": {},
            "continue_final_message": False, "documents": [], "reasoning_effort": None}  # fmt: skip
    parse(json.dumps({**CHAT, **chat}).encode(), True)
    for name, value in (("stop_token_ids", [5]), ("priority", 3), ("chat_template", "x"), ("prompt_logprobs", 1)):
        with pytest.raises(ApiError, match=name):
            parse(json.dumps({**CHAT, name: value}).encode(), True)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_server_answers_while_a_long_text_is_encoded(server: Serving, path: str) -> None:
    text = "é 漢x" * 27_000  # as long as the server takes
    chat = {**CHAT, "messages": [{"role": "user", "content": text}]}
    body = {**PROMPT, "prompt": text} if path == "/v1/completions" else chat
    done: list[httpx.Response] = []
    begin = time.monotonic()
    thread = threading.Thread(target=lambda: done.append(httpx.post(server.url + path, json=body, timeout=120)))
    thread.start()
    waits = []
    while thread.is_alive():
        start = time.monotonic()
        assert httpx.get(server.url + "/health", timeout=60).status_code == 200
        waits.append(time.monotonic() - start)
    took = time.monotonic() - begin
    thread.join()
    assert (done[0].status_code, done[0].json()["error"]["code"]) == (400, "context_length_exceeded")
    assert max(waits) < max(took / 2, 0.25), f"of {took:.2f} s"
    server.wait_empty()


@pytest.mark.parametrize(
    ("host", "port"), [("127.0.0.1", 99999), ("127.0.0.1", -1), ("no.such.host.", 0), ("a" * 70, 0)]
)
def test_a_place_that_is_none(host: str, port: int) -> None:
    with pytest.raises(InputError, match=f"cannot listen at {host}:{port}"):
        bound(host, port)
