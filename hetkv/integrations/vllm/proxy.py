"""A small router for disaggregated vLLM: `hetkv proxy --prefill URL --decode URL`.

Takes OpenAI-compatible requests and sends each to one prefill and one decode server, in one of two ways:

* `prefill_first`: prefill, then decode with the `kv_transfer_params` of its answer (vLLM's own convention);
* `concurrent`: both at once under one transfer id, so that layers travel while later ones compute.

A request whose prefill fails is given to the decode server alone, which computes the prompt itself. One whose decode
server is gone before it has said anything is given to another one, and the server rests for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
import uuid
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

_log = logging.getLogger("hetkv.proxy")
PRODUCE = {"do_remote_decode": True, "do_remote_prefill": False}
HOP_HEADERS = {"host", "content-length", "connection", "transfer-encoding", "content-encoding",
               "accept-encoding"}  # fmt: skip
TEXT_LIMIT = 300
REST_S = 10.0
"""How long a server that could not be reached gets no requests, as long as there is another one."""


class _Rejected(Exception):
    """A server answered with an error, or not at all."""


class _Gone(Exception):
    """A decode server could not be reached, or was lost before it answered anything."""

    def __init__(self, server: Server, text: str) -> None:
        super().__init__(f"decode {server.url}: {text}")
        self.server = server


@dataclass(eq=False)
class Server:
    """One vLLM server."""

    url: str
    under_way: int = 0
    identity: dict[str, Any] | None = None
    """Prefill: engine id and addresses of its workers, as it said them; `None` where they must be asked again."""
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)
    rests_until: float = 0.0

    @property
    def rests(self) -> bool:
        """Whether it was lost a moment ago."""
        return time.monotonic() < self.rests_until

    def rest(self) -> None:
        """It was lost: others are asked from now on."""
        self.rests_until = time.monotonic() + REST_S

    @contextlib.contextmanager
    def busy(self) -> Any:
        """Count a request for the choice of servers."""
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1


class Router:
    """Chooses servers by the requests they have in flight, and pairs the two halves of a request."""

    def __init__(self, prefill: list[str], decode: list[str], mode: str, timeout_s: float) -> None:
        self.prefill, self.decode = [Server(url) for url in prefill], [Server(url) for url in decode]
        self.mode = mode
        self._turn = itertools.count()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(timeout_s, connect=5.0)
        self.client = httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False)

    def choose(self, tried: Collection[Server] = ()) -> tuple[Server, Server]:
        """The server of each kind with the fewest requests in flight; servers that tie take turns.

        A server that was lost recently or was `tried` is chosen only where there is no other.
        """
        turn = next(self._turn)

        def least(servers: list[Server]) -> Server:
            first = turn % len(servers)

            def cost(server: Server) -> tuple[bool, bool, int]:
                return server in tried, server.rests, server.under_way

            return min(servers[first:] + servers[:first], key=cost)

        return least(self.prefill), least(self.decode)

    async def serve(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Response:
        """Answer one client's request. Where its decode server is lost all of it begins again with another one."""
        body.pop("kv_transfer_params", None)
        half = self._after if self.mode == "prefill_first" else self._concurrent
        tried: list[Server] = []
        while True:
            prefill, decode = self.choose(tried)
            try:
                return await half(prefill, decode, path, body, headers)
            except _Gone as error:
                error.server.rest()
                tried.append(decode)
                _log.warning("%s", error)
                if len(tried) == len(self.decode):
                    return JSONResponse({"error": str(error)}, 502)

    async def _after(
        self, prefill: Server, decode: Server, path: str, body: dict[str, Any], headers: dict[str, str]
    ) -> Response:
        """Prefill first, decode afterwards."""
        order = dict(PRODUCE, transfer_id=uuid.uuid4().hex)
        try:
            with prefill.busy():
                answer = await self._ask(prefill, path, prefill_body(body, order), headers)
            params = answer.get("kv_transfer_params")
        except _Rejected as error:
            _log.warning("prefill %s: %s; decode computes the prompt", prefill.url, error)
            params = None
        return await self._decode(decode, path, body, params, headers)

    async def _concurrent(
        self, prefill: Server, decode: Server, path: str, body: dict[str, Any], headers: dict[str, str]
    ) -> Response:
        """Both at once. Where the prefill fails, decode is asked again without it: it has sent nothing so far."""
        try:
            identity = await self.identity(prefill, headers)
        except _Rejected as error:
            _log.warning("prefill %s: %s; decode computes the prompt", prefill.url, error)
            return await self._decode(decode, path, body, None, headers)
        transfer = uuid.uuid4().hex
        order = dict(PRODUCE, rendezvous="concurrent", transfer_id=transfer)

        async def compute() -> None:
            with prefill.busy():
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
            _log.warning("prefill %s: %s; decode computes the prompt", prefill.url, failure)
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

    async def identity(self, prefill: Server, headers: dict[str, str]) -> dict[str, Any]:
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

    async def _ask(self, server: Server, path: str, body: dict[str, Any], headers: dict[str, str]) -> dict[str, Any]:
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
        self, server: Server, path: str, body: dict[str, Any], params: dict[str, Any] | None, headers: dict[str, str]
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
            raise _Gone(server, f"{type(error).__name__}: {error}") from None
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


def application(router: Router) -> FastAPI:
    """The HTTP side."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        introducing = asyncio.create_task(router.introduce())
        yield
        introducing.cancel()
        await router.client.aclose()

    app = FastAPI(title="hetkv proxy", lifespan=lifespan)

    @app.post("/v1/completions")
    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        try:
            body = await request.json()
        except ValueError:
            raise HTTPException(400, "the body is not JSON") from None
        if not isinstance(body, dict):
            raise HTTPException(400, "the body is not a JSON object")
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP_HEADERS}
        serving = asyncio.create_task(router.serve(request.url.path, body, headers))
        leaving = asyncio.create_task(gone(request))
        await asyncio.wait((serving, leaving), return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if not serving.done():
            serving.cancel()
            await asyncio.wait((serving,))
            return Response(status_code=499)
        return serving.result()

    @app.get("/v1/models")
    async def models() -> Response:
        try:
            answer = await router.client.get(router.decode[0].url + "/v1/models")
        except httpx.HTTPError as error:
            raise HTTPException(502, f"decode {router.decode[0].url}: {type(error).__name__}: {error}") from None
        return Response(answer.content, answer.status_code, media_type="application/json")

    @app.get("/health")
    async def health() -> JSONResponse:
        async def alive(server: Server) -> bool:
            try:
                answer = await router.client.get(server.url + "/health", timeout=2.0)
                return bool(answer.status_code == 200)
            except httpx.HTTPError:
                return False

        servers = [*router.prefill, *router.decode]
        states = await asyncio.gather(*(alive(server) for server in servers))
        detail = {server.url: state for server, state in zip(servers, states, strict=True)}
        decoding = any(detail[server.url] for server in router.decode)
        return JSONResponse({"mode": router.mode, "servers": detail}, 200 if decoding else 503)

    return app


async def gone(request: Request) -> None:
    """Returns when the client has closed its connection."""
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return


def serve(router: Router, host: str, port: int) -> None:
    """Serve until a signal ends the process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    uvicorn.run(application(router), host=host, port=port, log_level="warning")
