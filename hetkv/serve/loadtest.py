"""A traffic against a running OpenAI-compatible server, measured by the simulator's metrics: `LoadTest`.

Requests are streamed completions of fixed lengths. Times count from the moment a request should have been sent, so that
a slow client does not hide a slow server.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import msgspec
import numpy as np
from numpy.typing import NDArray

from hetkv.errors import InputError
from hetkv.simulator.records import Records
from hetkv.simulator.request import FAILED, FINISHED, REJECTED, Request
from hetkv.simulator.traffic.workload import Workload

FIRST_ID = 10
"""Lowest token id of made-up prompts: those under it are special in many vocabularies."""
WORDS = tuple(map(str, range(100, 1000)))
"""Words of made-up texts: one token each in many vocabularies."""
OnProgress = Callable[[int, int], None]
"""Called with the requests that were sent and that have ended."""


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """Who is asked, and how."""

    url: str
    """Of the server, without `/v1`."""
    model: str
    api_key: str = ""
    vocabulary: int = 1000
    """Prompts are token ids below this; 0: texts of about as many words."""
    timeout_s: float = 600.0
    concurrency: int | None = None
    """Most requests at a time; further ones wait here, which counts."""


class LoadTest:
    """One run. `errors` counts what went wrong, by text."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.errors: dict[str, int] = {}
        self.records = Records()
        self._begin = 0.0
        self._sent = 0

    async def run(self, workload: Workload, seed: int, on_progress: OnProgress = lambda sent, ended: None) -> float:
        """Send all requests; the seconds until the last of them ended."""
        headers = {"Authorization": f"Bearer {self.target.api_key}"} if self.target.api_key else {}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=self.target.timeout_s)
        gate = asyncio.Semaphore(self.target.concurrency or 1 << 30)
        prompts = Prompts(self.target.vocabulary, workload.hash_tokens, seed)
        tasks: set[asyncio.Task[None]] = set()
        async with aiohttp.ClientSession(
            headers=headers, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)
        ) as session:
            self._begin = time.monotonic()

            async def one(request: Request, body: dict[str, Any]) -> None:
                async with gate:
                    await self._ask(session, request, body)
                on_progress(self._sent, len(self.records))

            try:
                for request in workload.requests(seed):
                    body = self._body(request, prompts)
                    delay = request.arrival - (time.monotonic() - self._begin)
                    if delay > 0:
                        await asyncio.sleep(delay)
                    self._sent += 1
                    task = asyncio.create_task(one(request, body))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                if tasks:
                    await asyncio.wait(tasks)
            finally:  # a run that is cancelled gives up what it has begun
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        return time.monotonic() - self._begin

    def _body(self, request: Request, prompts: Prompts) -> dict[str, Any]:
        return {
            "model": self.target.model,
            "prompt": prompts.of(request),
            "max_tokens": request.output,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    async def _ask(self, session: aiohttp.ClientSession, request: Request, body: dict[str, Any]) -> None:
        """One request, and its record."""
        status = FAILED
        try:
            async with session.post(f"{self.target.url}/v1/completions", json=body) as answer:
                if answer.status == 200:
                    status = await self._read(answer, request)
                else:
                    status = REJECTED if answer.status < 500 else FAILED
                    self._note(f"HTTP {answer.status}: {_message(await answer.read())}")
        except (aiohttp.ClientError, TimeoutError, asyncio.TimeoutError) as error:
            self._note(f"{type(error).__name__}: {error}")
        self.records.add(request, status)

    async def _read(self, answer: aiohttp.ClientResponse, request: Request) -> int:
        """A stream to its end."""
        chunks, counted, status = 0, 0, FAILED
        async for line in answer.content:
            if not line.startswith(b"data: "):
                continue
            now = time.monotonic() - self._begin
            if line.startswith(b"data: [DONE]"):
                status = FINISHED
            elif b'"error"' in line[:20]:
                self._note(_message(line[6:]))
                return FAILED
            elif b'"choices":[]' in line or b'"choices": []' in line:
                counted = (json.loads(line[6:]).get("usage") or {}).get("completion_tokens", 0)
            else:
                chunks += 1
                request.last_token = now
                if chunks == 1:
                    request.first_token = now
        # Several tokens may share a chunk, and a token may have no text of its own: the server's count holds.
        request.output = request.generated = counted or chunks
        return status if request.generated else FAILED

    def _note(self, text: str) -> None:
        self.errors[text] = self.errors.get(text, 0) + 1


class Prompts:
    """Made-up prompts, each different from the others except for the blocks that a trace's hashes say are the same."""

    def __init__(self, vocabulary: int, hash_tokens: int, seed: int) -> None:
        if vocabulary and vocabulary <= FIRST_ID + 1:
            raise InputError(f"a vocabulary of {vocabulary} tokens: prompts are ids from {FIRST_ID} on")
        self._vocabulary, self._hash_tokens, self._seed = vocabulary, hash_tokens, seed

    def of(self, request: Request) -> list[int] | str:
        """The prompt of a request, `request.prompt` tokens long; as a text of so many words."""
        if request.hashes and self._hash_tokens:
            blocks = [self._draw((1, abs(key)), self._hash_tokens) for key in request.hashes]
            ids = np.concatenate(blocks)[: request.prompt]
            if len(ids) < request.prompt:
                ids = np.concatenate((ids, self._draw((0, request.id), request.prompt - len(ids))))
        else:
            ids = self._draw((0, request.id), request.prompt)
        if not self._vocabulary:
            return " ".join(WORDS[number] for number in ids.tolist())
        found: list[int] = ids.tolist()
        return found

    def _draw(self, key: tuple[int, int], count: int) -> NDArray[np.int64]:
        low, high = (FIRST_ID, self._vocabulary) if self._vocabulary else (0, len(WORDS))
        return np.random.default_rng([self._seed, *key]).integers(low, high, count)


def _message(body: bytes) -> str:
    """What an error says."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace").strip()


async def only_model(url: str, api_key: str) -> str:
    """The name of the model that a server has, where it has one. Raises `InputError`."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        timeout = aiohttp.ClientTimeout(total=10)
        async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
            async with session.get(f"{url}/v1/models") as answer:
                body = await answer.read()
                if answer.status != 200:
                    raise InputError(f"{url}: HTTP {answer.status}: {_message(body)}")
    except (aiohttp.ClientError, TimeoutError, asyncio.TimeoutError) as error:
        raise InputError(f"{url}: {error or type(error).__name__}") from None
    try:
        names = [str(model["id"]) for model in json.loads(body)["data"]]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{url}: /v1/models is no list of models") from None
    if len(names) != 1:
        raise InputError(f"{url} has the models {', '.join(names)}: name one with --model")
    return names[0]
