"""vLLM servers with hetkv's connector as the HTTP side asks them: `VllmEngines`.

Each request goes to one prefill and one decode server, which the simulator's `Router` chooses, in one of two ways:

* `prefill_first`: prefill, then decode with the `kv_transfer_params` of its answer (vLLM's own convention);
* `concurrent`: both at once under one transfer id, so that layers travel while later ones compute.

A request whose prefill fails is given to the decode server alone, which computes the prompt itself. One whose decode
server is gone before it has said anything is given to another one, and the server rests for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, NamedTuple

import httpx
from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from hetkv.errors import ApiError
from hetkv.serve.app import unless_gone
from hetkv.serve.protocol import json_object
from hetkv.simulator.router import JOIN_SHORTEST_QUEUE, LEAST_LOADED, Router

log = logging.getLogger("hetkv.serve.vllm")
MODES = ("prefill_first", "concurrent")
PRODUCE = {"do_remote_decode": True, "do_remote_prefill": False}
HOP_HEADERS = {"host", "content-length", "connection", "transfer-encoding", "content-encoding",
               "accept-encoding"}  # fmt: skip
TEXT_LIMIT = 300
REST_S = 10.0
"""How long a server that could not be reached gets no requests, as long as there is another one."""
CHARACTERS_PER_TOKEN = 4
"""Of texts, to compare prompts by their length: the servers have the tokenizer."""


class _Rejected(Exception):
    """A server answered with an error, or not at all."""


class _Gone(Exception):
    """A decode server could not be reached, or was lost before it answered anything."""


class Asked(NamedTuple):
    """What the router sees of a request."""

    target: int
    hashes: tuple[int, ...] | None = None


class _Pool:
    """Implements the router's `PoolFacts`."""

    weight, max_num_seqs, seconds_per_prompt_token = 1.0, 256, 1.0

    def __init__(self, name: str) -> None:
        self.name = name


class _Blocks:
    """Implements the router's `Blocks`: a server tells nothing of its memory."""

    total = block_size = 1
    hash_tokens = 0

    def match(self, hashes: tuple[int, ...], tokens: int) -> int:
        """Nothing is known."""
        return 0


class VllmServer:
    """One vLLM server, a candidate of the router."""

    coming_tokens, available = 0, 1

    def __init__(self, url: str) -> None:
        self.url, self.pool, self.kv = url, _Pool(url), _Blocks()
        self.up = True
        self.requests = self.prompt_tokens = 0
        self.identity: dict[str, Any] | None = None
        """Prefill: engine id and addresses of its workers, as it said them; `None` where they must be asked again."""
        self.asking = asyncio.Lock()
        self._rests_until = 0.0
        self._changed: dict[Any, None] = {}

    def report_to(self, changed: dict[Any, None]) -> None:
        """See `Candidate` of the router."""
        self._changed = changed

    def refresh(self) -> None:
        """It may have rested long enough."""
        up = time.monotonic() >= self._rests_until
        if up != self.up:
            self.up = up
            self._changed[self] = None

    def rest(self) -> None:
        """It was lost: others are asked for a while."""
        self._rests_until = time.monotonic() + REST_S
        self.refresh()

    @contextlib.contextmanager
    def busy(self, prompt_tokens: int = 0) -> Iterator[None]:
        """Count a request for the choice of servers."""
        self._count(1, prompt_tokens)
        try:
            yield
        finally:
            self._count(-1, -prompt_tokens)

    def _count(self, requests: int, prompt_tokens: int) -> None:
        self.requests += requests
        self.prompt_tokens += prompt_tokens
        self._changed[self] = None


class VllmEngines:
    """Chooses servers, and pairs the two halves of a request. Implements `Engines`.

    Without prefill servers, `decode` are aggregated ones.
    """

    def __init__(
        self,
        prefill: Sequence[str],
        decode: Sequence[str],
        mode: str,
        timeout_s: float,
        prefill_routing: str = LEAST_LOADED,
        decode_routing: str = JOIN_SHORTEST_QUEUE,
    ) -> None:
        self.prefill, self.decode = [VllmServer(url) for url in prefill], [VllmServer(url) for url in decode]
        self.mode = mode
        self._entry = Router(self.prefill, prefill_routing)
        self._exit = Router(self.decode, decode_routing, for_decode=True)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(timeout_s, connect=5.0)
        self.client = httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False)

    async def complete(self, request: Request, body: bytes, chat: bool) -> Response:
        document = json_object(body)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP_HEADERS}
        answer = await unless_gone(request, self.answer(request.url.path, document, headers))
        return Response(status_code=499) if answer is None else answer

    async def models(self) -> dict[str, Any]:
        server = self._exit.choose(Asked(1)) or self.decode[0]
        try:
            answer = await self.client.get(server.url + "/v1/models")
            found: dict[str, Any] = answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise ApiError(502, f"decode {server.url}: {type(error).__name__}: {error}") from None
        return found

    async def health(self) -> tuple[bool, dict[str, Any]]:
        async def alive(server: VllmServer) -> bool:
            try:
                answer = await self.client.get(server.url + "/health", timeout=2.0)
                return bool(answer.status_code == 200)
            except httpx.HTTPError:
                return False

        servers = [*self.prefill, *self.decode]
        states = await asyncio.gather(*(alive(server) for server in servers))
        detail = {server.url: state for server, state in zip(servers, states, strict=True)}
        return any(detail[server.url] for server in self.decode), {"mode": self.mode, "servers": detail}

    async def close(self) -> None:
        """End all connections."""
        await self.client.aclose()

    def choose(self, router: Router[VllmServer], asked: Asked) -> VllmServer:
        """The router's choice; where all rest, the one with the fewest requests all the same."""
        for server in router.instances:
            server.refresh()
        return router.choose(asked) or min(router.instances, key=lambda server: server.requests)

    async def answer(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Response:
        """Answer one client's request. Where its decode server is lost all of it begins again with another one."""
        body.pop("kv_transfer_params", None)
        asked = Asked(prompt_tokens(body))
        tried: set[VllmServer] = set()
        while True:
            decode = self.choose(self._exit, asked)
            if decode in tried:  # all rest
                decode = next(server for server in self.decode if server not in tried)
            try:
                # Counted from here on, as others are chosen meanwhile; `_decode` counts on while it streams.
                with decode.busy():
                    if not self.prefill:
                        return await self._decode(decode, path, body, None, headers)
                    prefill = self.choose(self._entry, asked)
                    half = self._after if self.mode == "prefill_first" else self._concurrent
                    with prefill.busy(asked.target):
                        return await half(prefill, decode, path, body, headers)
            except _Gone as error:
                decode.rest()
                tried.add(decode)
                log.warning("%s", error)
                if len(tried) == len(self.decode):
                    raise ApiError(502, str(error), code="no_server") from None

    async def _after(
        self, prefill: VllmServer, decode: VllmServer, path: str, body: dict[str, Any], headers: dict[str, str]
    ) -> Response:
        """Prefill first, decode afterwards."""
        order = dict(PRODUCE, transfer_id=uuid.uuid4().hex)
        try:
            answer = await self._ask(prefill, path, prefill_body(body, order), headers)
            params = answer.get("kv_transfer_params")
        except _Rejected as error:
            log.warning("prefill %s: %s; decode computes the prompt", prefill.url, error)
            params = None
        return await self._decode(decode, path, body, params, headers)

    async def _concurrent(
        self, prefill: VllmServer, decode: VllmServer, path: str, body: dict[str, Any], headers: dict[str, str]
    ) -> Response:
        """Both at once. Where the prefill fails, decode is asked again without it: it has sent nothing so far."""
        try:
            identity = await self.identity(prefill, headers)
        except _Rejected as error:
            log.warning("prefill %s: %s; decode computes the prompt", prefill.url, error)
            return await self._decode(decode, path, body, None, headers)
        transfer = uuid.uuid4().hex
        order = dict(PRODUCE, rendezvous="concurrent", transfer_id=transfer)

        async def compute() -> None:
            answer = await self._ask(prefill, path, prefill_body(body, order), headers)
            prefill.identity = _identity(answer)  # another one where the server was started again

        computing = asyncio.create_task(compute())
        decoding = asyncio.create_task(self._decode(decode, path, body, {**identity, "transfer_id": transfer}, headers))
        given: Response | None = None
        try:
            await asyncio.wait((computing, decoding), return_when=asyncio.FIRST_COMPLETED)
            if not computing.done():
                if (await decoding).status_code >= 400:  # perhaps of an identity that is gone
                    prefill.identity = None
                await asyncio.wait((computing,))
            failure = computing.exception()
            if failure is None:
                given = await decoding
                return given
            if not isinstance(failure, _Rejected):
                raise failure
            prefill.identity = None
            log.warning("prefill %s: %s; decode computes the prompt", prefill.url, failure)
            if not decoding.done():
                decoding.cancel()
                await asyncio.wait((decoding,))
            elif decoding.result().status_code < 400:
                given = decoding.result()
                return given
            return await self._decode(decode, path, body, None, headers)
        finally:
            computing.cancel()
            if given is None:
                await drop(decoding)

    async def introduce(self) -> None:
        """Ask the prefill servers that are up who they are, before there is a request that would wait for it."""
        if self.mode == "concurrent":
            await asyncio.gather(*(self.identity(server, {}) for server in self.prefill), return_exceptions=True)

    async def identity(self, prefill: VllmServer, headers: dict[str, str]) -> dict[str, Any]:
        """Where a prefill server's workers listen; it is asked once, and again after each failure.

        It answers with a completion, as vLLM has no other way to reach a connector: one of a single token.
        """
        async with prefill.asking:
            known = prefill.identity
            if known is None:
                order = dict(PRODUCE, describe=True)
                body = prefill_body({"prompt": [0]}, order)
                known = _identity(await self._ask(prefill, "/v1/completions", body, headers))
                prefill.identity = known
        return known

    async def _ask(
        self, server: VllmServer, path: str, body: dict[str, Any], headers: dict[str, str]
    ) -> dict[str, Any]:
        """A whole JSON answer. Raises `_Rejected`."""
        try:
            response = await self.client.post(server.url + path, json=body, headers=headers)
        except httpx.HTTPError as error:
            server.rest()
            raise _Rejected(f"{type(error).__name__}: {error}") from None
        if response.status_code >= 400:
            raise _Rejected(f"HTTP {response.status_code}: {response.text[:TEXT_LIMIT]}")
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise _Rejected("its answer is not a JSON object")
        return answer

    async def _decode(
        self,
        server: VllmServer,
        path: str,
        body: dict[str, Any],
        params: dict[str, Any] | None,
        headers: dict[str, str],
    ) -> Response:
        """The decode server's answer, passed on as it comes. Raises `_Gone`."""
        if params is not None:
            body = dict(body, kv_transfer_params=params)
        stack = contextlib.AsyncExitStack()
        try:
            stack.enter_context(server.busy())
            request = self.client.build_request("POST", server.url + path, json=body, headers=headers)
            response = await self.client.send(request, stream=True)
            stack.push_async_callback(response.aclose)
            passed = {name: value for name, value in response.headers.items() if name.lower() not in HOP_HEADERS}
            if not body.get("stream") or response.status_code >= 400:
                content = await response.aread()
                await stack.aclose()
                return Response(content, response.status_code, passed)
            # The first piece is awaited here: with it the KV has arrived, or the request has failed.
            pieces = response.aiter_bytes()
            first = await anext(pieces, b"")
        except httpx.HTTPError as error:
            await stack.aclose()
            raise _Gone(f"decode {server.url}: {type(error).__name__}: {error}") from None
        except BaseException:
            await stack.aclose()
            raise

        async def rest() -> AsyncIterator[bytes]:
            yield first
            async for piece in pieces:
                yield piece

        return Passed(rest(), response.status_code, passed, stack)


class Passed(StreamingResponse):
    """A server's stream. It lets the server go however it ends, also where the client left before it was begun."""

    def __init__(
        self, pieces: AsyncIterator[bytes], status: int, headers: dict[str, str], held: contextlib.AsyncExitStack
    ) -> None:
        super().__init__(pieces, status, headers)
        self.held = held

    async def __call__(self, *asgi: Any) -> None:
        async with self.held:
            await super().__call__(*asgi)


async def drop(task: asyncio.Task[Response]) -> None:
    """End a request whose client has gone."""
    task.cancel()
    await asyncio.wait((task,))
    if not task.cancelled() and task.exception() is None and isinstance(answer := task.result(), Passed):
        await answer.held.aclose()


def prefill_body(body: dict[str, Any], order: dict[str, Any]) -> dict[str, Any]:
    """The same request for one token, with an order to keep its KV."""
    changed = {key: value for key, value in body.items() if key not in ("stream_options", "min_tokens", "n", "best_of")}
    changed.update(stream=False, kv_transfer_params=order, max_tokens=1)
    if "max_completion_tokens" in body:
        changed["max_completion_tokens"] = 1
    return changed


def _identity(answer: dict[str, Any]) -> dict[str, Any]:
    """The part of a prefill server's answer that identifies it."""
    params = answer.get("kv_transfer_params") or {}
    names = ("do_remote_prefill", "remote_engine_id", "remote_addresses")
    if any(name not in params for name in names):
        raise _Rejected("its answer has no kv_transfer_params of HetKVConnector: is it a producer?")
    return {name: params[name] for name in names}


def prompt_tokens(body: dict[str, Any]) -> int:
    """About how many tokens a request's prompts have: exact where they are token ids."""
    prompt = body.get("prompt", body.get("messages"))
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        return len(prompt)
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], list):
        return sum(map(len, prompt))
    return 1 + len(str(prompt)) // CHARACTERS_PER_TOKEN
