"""The `openai` package against the running system: completions, chats, streams, logprobs, stops, and errors."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from hetkv.runtime.tokenizer import TextTokenizer
from tests.runtime.instances import reference
from tests.serve.serving import TEMPLATE, Serving

openai = pytest.importorskip("openai", reason="the package openai is not installed")
PROMPT = "And it came to pass in those days, that"


@pytest.fixture(scope="module")
def client(server: Serving) -> Any:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: tuple[Path, Any]) -> TextTokenizer:
    return TextTokenizer.load(checkpoint[0])


def test_greedy_tokens_are_those_of_transformers_at_concurrency_32(
    client: Any, checkpoint: tuple[Path, Any], tokenizer: TextTokenizer, server: Serving
) -> None:
    rng = random.Random(2)
    prompts = [[rng.randrange(2, 3000) for _ in range(rng.randrange(1, 120))] for _ in range(32)]

    def ask(prompt: list[int]) -> Any:
        return client.completions.create(
            model="tiny", prompt=prompt, max_tokens=12, temperature=0, logprobs=0, extra_body={"ignore_eos": True}
        )

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = reference(checkpoint[1], prompt, 12)
        assert answer.choices[0].logprobs.tokens == [tokenizer.token(token) for token in expected]
        assert answer.choices[0].text == tokenizer.decode(expected)
        usage = answer.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), 12)
    server.wait_empty()


def test_streamed_chat(client: Any, checkpoint: tuple[Path, Any], tokenizer: TextTokenizer) -> None:
    """Its chunks add up to the answer that comes whole, and to that of `transformers` of the rendered template."""
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who are you?"}]
    options: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": 20, "temperature": 0}
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    whole = client.chat.completions.create(**options)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    rendered = TEMPLATE and "<|endoftext|>system: Be kind.\nuser: Who are you?\nassistant:"
    expected = reference(checkpoint[1], tokenizer.encode(rendered, special_tokens=False), 20)
    assert text == tokenizer.decode(expected[: whole.usage.completion_tokens])


def test_choices_seeds_and_stops(client: Any) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "temperature": 0.8}
    three = client.completions.create(**options, n=3, seed=5)
    again = client.completions.create(**options, n=3, seed=5)
    texts = [choice.text for choice in three.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) == 3
    one = client.completions.create(**options, seed=6, stream=True)
    assert "".join(chunk.choices[0].text for chunk in one) == texts[1]
    stop = texts[0][len(texts[0]) // 2 :][:4]
    for stream in (False, True):
        cut = client.completions.create(**options, seed=5, stop=["never there", stop], stream=stream)
        got = "".join(chunk.choices[0].text for chunk in cut) if stream else cut.choices[0].text
        assert got == texts[0][: texts[0].index(stop)]
    several = client.completions.create(model="tiny", prompt=[PROMPT, "Now"], max_tokens=3, n=2, temperature=0)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text


def test_logprobs(client: Any) -> None:
    messages = [{"role": "user", "content": "x"}]
    chat = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    content = chat.choices[0].logprobs.content
    assert len(content) == 4
    for token in content:
        best = [other.logprob for other in token.top_logprobs]
        assert (len(best), token.logprob) == (3, max(best))
    plain = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4, temperature=0, logprobs=2)
    logprobs = plain.choices[0].logprobs
    assert [len(entry) for entry in logprobs.top_logprobs] == [2] * 4
    assert logprobs.text_offset[0] == 0
    streamed = list(client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=4, temperature=0, logprobs=2, stream=True))  # fmt: skip
    tokens = [token for chunk in streamed if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.tokens]
    assert tokens == logprobs.tokens


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "hetkv"
    with pytest.raises(openai.NotFoundError, match="`other` does not exist"):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "`gpt-9` does not exist"),
        ({"prompt": ""}, openai.BadRequestError, "prompt is empty"),
        ({"prompt": []}, openai.BadRequestError, "prompt must be a text, token ids"),
        ({"prompt": [1, "x"]}, openai.BadRequestError, "prompt must be a text, token ids"),
        ({"prompt": [99999]}, openai.BadRequestError, "outside the vocabulary"),
        ({"prompt": [5] * 1100}, openai.BadRequestError, "maximum context length is 1024 tokens"),
        ({"max_tokens": 5000}, openai.BadRequestError, "maximum context length"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens must be between 1"),
        ({"temperature": 3}, openai.BadRequestError, "temperature must be between 0 and 2"),
        ({"temperature": "hot"}, openai.BadRequestError, "temperature: expected"),
        ({"top_p": 0}, openai.BadRequestError, "top_p must be greater than 0"),
        ({"n": 1000}, openai.BadRequestError, "n must be between 1 and 32"),
        ({"best_of": 4}, openai.BadRequestError, "best_of: 4 is not supported"),
        ({"presence_penalty": 0.5}, openai.BadRequestError, "presence_penalty: 0.5 is not supported"),
        ({"stop": ["x"] * 30}, openai.BadRequestError, "stop must be"),
        ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "goes with stream"),
        ({"extra_body": {"colour": "red"}}, openai.BadRequestError, "Unrecognized request argument supplied: colour"),
    ],
)
def test_bad_input_is_an_error_in_openais_shape(
    client: Any, server: Serving, changes: dict[str, Any], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text) as caught:
        client.completions.create(**{"model": "tiny", "prompt": PROMPT, "max_tokens": 4, **changes})
    body: Any = caught.value.body  # type: ignore[attr-defined]
    assert {"message", "type", "param", "code"} <= set(body)
    assert body["type"] == "invalid_request_error"


def test_what_is_no_request_of_openai(server: Serving) -> None:
    """Broken JSON, another method, another path, a body that is too large, said or counted."""
    post = lambda **what: httpx.post(server.url + "/v1/completions", timeout=30, **what)  # noqa: E731
    broken = post(content=b'{"model": ')
    assert (broken.status_code, "not JSON" in broken.json()["error"]["message"]) == (400, True)
    assert post(content=b"[1]").json()["error"]["message"] == "the body is not a JSON object"
    assert post(json={"model": "tiny"}).json()["error"]["param"] == "prompt"
    for path, method, status in (("/v1/nothing", "GET", 404), ("/v1/completions", "GET", 405)):
        answer = httpx.request(method, server.url + path)
        assert (answer.status_code, answer.json()["error"]["message"]) == (status, f"Invalid URL ({method} {path})")
    said = post(content=b"x" * 300_000)
    counted = post(content=iter([b"x" * 100_000] * 3))
    for answer in (said, counted):
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    assert server.is_empty()


def test_more_at_a_time_than_allowed_are_asked_to_come_again(server: Serving) -> None:
    """40 are served at a time; the others get 429 and when to retry, which the `openai` package does by itself."""
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 32, "ignore_eos": True}
    with httpx.Client(timeout=60, limits=httpx.Limits(max_connections=80)) as client, ThreadPoolExecutor(80) as pool:
        got = list(pool.map(lambda _: client.post(server.url + "/v1/completions", json=body), range(80)))
    codes = [answer.status_code for answer in got]
    assert set(codes) == {200, 429}
    assert codes.count(200) >= 40
    assert {answer.headers["retry-after"] for answer in got if answer.status_code == 429} == {"1"}
    server.wait_empty()
