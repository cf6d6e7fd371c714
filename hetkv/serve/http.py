"""uvicorn with limits before the application, and an end that answers what was accepted: `HttpServer`."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import uvicorn
from fastapi import FastAPI

from hetkv.errors import InputError
from hetkv.serve.limits import Limits


class HttpOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What clients may ask for."""

    api_keys: tuple[str, ...] = ()
    max_body: int = 8 << 20
    max_requests: int = 512


class HttpServer(uvicorn.Server):
    """One application."""

    def __init__(self, app: FastAPI, options: HttpOptions) -> None:
        self.limits = Limits(app, options.api_keys, options.max_body, options.max_requests)
        super().__init__(
            uvicorn.Config(
                self.limits,
                log_level="warning",
                lifespan="off",
                access_log=False,
                timeout_keep_alive=30,
                server_header=False,
            )
        )

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


def bound(host: str, port: int) -> socket.socket:
    """A listening socket, so that a port that is taken is known before anything is started. Raises `InputError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError, UnicodeError) as error:  # no such port; a host that is no name
        raise InputError(f"cannot listen at {host}:{port}: {getattr(error, 'strerror', None) or error}") from None
