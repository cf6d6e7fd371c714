"""Everything together in one process: the scheduler, its gate for instances, and the HTTP side before them."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from hetkv.control.secret import SecretFile
from hetkv.control.tls import Tls, TlsConfig
from hetkv.errors import ApiError
from hetkv.runtime.chat import ChatTemplate
from hetkv.runtime.tokenizer import TextTokenizer, TokenIds
from hetkv.serve.app import application
from hetkv.serve.fleet import Fleet
from hetkv.serve.gate import Gate
from hetkv.serve.generation import Generation
from hetkv.serve.http import HttpOptions, HttpServer
from hetkv.serve.instance import is_shape, model_config
from hetkv.serve.member import Member
from hetkv.serve.messages import Trace
from hetkv.serve.metrics import Metrics
from hetkv.serve.page import Moves, add_page
from hetkv.serve.protocol import json_object
from hetkv.serve.scheduler import Scheduler
from hetkv.simulator.router import BALANCED

if TYPE_CHECKING:
    from hetkv.serve.tracing import RequestTracer

log = logging.getLogger("hetkv.serve")


class ServerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the server is started with."""

    model: str
    """Checkpoint directory; or `shape:NAME`, whose text is token ids."""
    served_name: str
    gate: str = "127.0.0.1:0"
    """Where instances register."""
    http: HttpOptions = HttpOptions()
    prefill: str = BALANCED
    decode: str = BALANCED
    secret_file: str | None = None
    tls: TlsConfig | None = None
    timeline: bool = False
    """Instances report what their transports do, for the page."""
    trace: str | None = None
    """File that gets the spans of all requests."""


class Server(HttpServer):
    """The HTTP side over the whole system. `on_open` is called with the gate's address once instances may register."""

    def __init__(self, options: ServerOptions, on_open: Callable[[str], None] = lambda address: None) -> None:
        self.options, self._on_open = options, on_open
        self.scheduler = Scheduler(options.prefill, options.decode, self._ended)
        self.metrics = Metrics(self.scheduler)
        self.tracer = _tracer(options.trace)
        self._moves = Moves()
        tls = Tls(options.tls) if options.tls is not None else None
        self.gate = Gate(self.scheduler, SecretFile(options.secret_file), self._on_trace, tls)
        config = model_config(options.model)
        tokenizer: TextTokenizer | TokenIds
        if is_shape(options.model):
            tokenizer, template = TokenIds(config.vocab_size), None
        else:
            tokenizer, template = TextTokenizer.load(options.model), ChatTemplate.load(options.model)
        fleet = Fleet(self.scheduler, options.served_name, tokenizer, template, config.max_context)
        app = application(fleet)
        self._add_routes(app)
        add_page(app, options.served_name, self.scheduler, self.metrics, self._moves, options.timeline)
        super().__init__(app, options.http)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Until a signal ends it, and all requests that were accepted are answered."""
        async with AsyncExitStack() as stack:
            if self.tracer is not None:
                stack.callback(self.tracer.close)
            await self.gate.open(self.options.gate)
            stack.push_async_callback(self.gate.close)
            self._on_open(self.gate.address)
            await super().serve(sockets)

    def _ended(self, generation: Generation) -> None:
        self.metrics.ended(generation)
        if self.tracer is not None:
            self.tracer.ended(generation)

    def _on_trace(self, member: Member, trace: Trace) -> None:
        self._moves.on_trace(member, trace)
        if self.tracer is not None:
            self.tracer.on_trace(member, trace)

    def _add_routes(self, app: FastAPI) -> None:
        @app.get("/metrics")
        async def metrics() -> Response:
            return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

        @app.post("/instances/{name}/role")
        async def role(name: str, request: Request) -> JSONResponse:
            """Let an instance prefill, decode, or both: `{"role": ...}`."""
            body = json_object(await request.body())
            if set(body) != {"role"} or not isinstance(body["role"], str):
                raise ApiError(400, 'the body must be {"role": "prefill" | "decode" | "aggregated"}')
            member = self.scheduler.set_role(name, body["role"])
            return JSONResponse({"name": name, "role": member.role, "wanted": member.wanted})


def _tracer(path: str | None) -> RequestTracer | None:
    if path is None:
        return None
    from hetkv.serve.tracing import PerfettoExporter, RequestTracer

    return RequestTracer(PerfettoExporter(path))


def run_server(server: Server, listening: socket.socket) -> None:
    """Body of the server's process."""
    asyncio.run(server.serve([listening]))
