"""Everything together in one process: the scheduler, its gate for instances, and the HTTP side before them."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from typing import Any

import msgspec
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from hetkv.control.secret import shared_secret
from hetkv.errors import ApiError, InputError
from hetkv.runtime.chat import ChatTemplate
from hetkv.runtime.tokenizer import TextTokenizer, TokenIds
from hetkv.serve.app import Fleet, application
from hetkv.serve.gate import Gate
from hetkv.serve.instance import is_shape, model_config
from hetkv.serve.limits import Limits
from hetkv.serve.metrics import Metrics
from hetkv.serve.scheduler import Scheduler
from hetkv.simulator.router import BALANCED

MAX_BODY, MAX_REQUESTS = 8 << 20, 512
log = logging.getLogger("hetkv.serve")


class ServerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the server is started with."""

    model: str
    """Checkpoint directory; or `shape:NAME`, whose text is token ids."""
    served_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    gate: str = "127.0.0.1:0"
    """Where instances register."""
    api_keys: tuple[str, ...] = ()
    max_body: int = MAX_BODY
    max_requests: int = MAX_REQUESTS
    prefill: str = BALANCED
    decode: str = BALANCED
    secret_file: str | None = None


class Server(uvicorn.Server):
    """uvicorn over the whole system. `on_open` is called with the gate's address once instances may register."""

    def __init__(self, options: ServerOptions, on_open: Callable[[str], None] = lambda address: None) -> None:
        self.options, self._on_open = options, on_open
        self.scheduler = Scheduler(options.prefill, options.decode, lambda generation: self.metrics.ended(generation))
        self.metrics = Metrics(self.scheduler)
        self.gate = Gate(self.scheduler, shared_secret(options.secret_file))
        config = model_config(options.model)
        tokenizer: TextTokenizer | TokenIds
        if is_shape(options.model):
            tokenizer, template = TokenIds(config.vocab_size), None
        else:
            tokenizer, template = TextTokenizer.load(options.model), ChatTemplate.load(options.model)
        fleet = Fleet(self.scheduler, options.served_name, tokenizer, template, config.max_context)
        app = application(fleet)
        self._add_routes(app)
        self.limits = Limits(app, options.api_keys, options.max_body, options.max_requests)
        super().__init__(
            uvicorn.Config(
                self.limits,
                host=options.host,
                port=options.port,
                log_level="warning",
                lifespan="off",
                access_log=False,
                timeout_keep_alive=30,
                server_header=False,
            )
        )

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Until a signal ends it, and all requests that were accepted are answered."""
        async with AsyncExitStack() as stack:
            await self.gate.open(self.options.gate)
            stack.push_async_callback(self.gate.close)
            self._on_open(self.gate.address)
            await super().serve(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own would end the process by the signal again, before the instances were ended in order."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        on_main = threading.current_thread() is threading.main_thread()
        for number in signals if on_main else ():
            loop.add_signal_handler(number, self.end)
        try:
            yield
        finally:
            for number in signals if on_main else ():
                loop.remove_signal_handler(number)

    def end(self) -> None:
        """New requests are rejected from now on, those that are here are answered. The second time: at once."""
        self.force_exit = self.should_exit
        self.limits.closing = self.should_exit = True

    def _add_routes(self, app: FastAPI) -> None:
        @app.get("/metrics")
        async def metrics() -> Response:
            return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

        @app.post("/instances/{name}/role")
        async def role(name: str, request: Request) -> JSONResponse:
            """Let an instance prefill, decode, or both: `{"role": ...}`."""
            with suppress(msgspec.DecodeError):
                body: Any = msgspec.json.decode(await request.body())
                if isinstance(body, dict) and set(body) == {"role"}:
                    member = self.scheduler.set_role(name, str(body["role"]))
                    return JSONResponse({"name": name, "role": member.role, "wanted": member.wanted})
            raise ApiError(400, 'the body must be {"role": "prefill" | "decode" | "aggregated"}')


def bound(host: str, port: int) -> socket.socket:
    """A listening socket, so that a port that is taken is known before anything is started. Raises `InputError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise InputError(f"cannot listen at {host}:{port}: {error.strerror or error}") from None


def run_server(server: Server, listening: socket.socket) -> None:
    """Body of the server's process."""
    asyncio.run(server.serve([listening]))
