"""An engine in an interpreter of its own, from outside: `EngineProcess`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec

import hetkv
from hetkv import errors
from hetkv.errors import HetkvError, IncompatibleError, PeerLostError
from hetkv.integrations.instance import Generated
from hetkv.integrations.worker import Answer, Failure, Start

END_S = 10.0


class EngineProcess:
    """One process of `hetkv.integrations.worker`. One thread at a time calls it; errors are those of the engine."""

    def __init__(self, start: Start, *, python: str = sys.executable, environment: Mapping[str, str] | None = None):
        """Starts the process; `ready` waits until the model is loaded. `python`: an interpreter that has the engine."""
        self.start, self._busy = start, ""
        ours, theirs = socket.socketpair()
        self._pipe = Connection(ours.detach())
        # The interpreter may have no hetkv of its own: it gets this one.
        path = os.pathsep.join(part for part in (_home(), os.environ.get("PYTHONPATH")) if part)
        with theirs:
            self._process = subprocess.Popen(
                [python, "-m", "hetkv.integrations.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": path, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr,
            )
        self._send(msgspec.msgpack.encode(start))
        self._busy = "start"

    def ready(self) -> None:
        """Wait until the engine has loaded its model. Raises what went wrong."""
        if self._busy == "start":
            self.result()

    def begin(self, operation: str, **arguments: Any) -> None:
        """Begin an operation; `result` waits for it."""
        self.ready()
        assert not self._busy, f"{self._busy} is not done"
        self._send(msgspec.msgpack.encode((operation, arguments)))
        self._busy = operation

    def result(self) -> Any:
        """What the operation that was begun returned. Raises what it raised."""
        operation, self._busy = self._busy, ""
        try:
            answer = msgspec.msgpack.decode(self._pipe.recv_bytes(), type=Answer | Failure)
        except (EOFError, OSError):
            raise PeerLostError(f"{self.start.instance}: {self.start.engine} {self._how_it_ended()}") from None
        if isinstance(answer, Failure):
            raise _error(answer)
        generated = operation in ("prefill", "decode", "generate")
        return msgspec.convert(answer.value, Generated) if generated else answer.value

    def call(self, operation: str, **arguments: Any) -> Any:
        """`begin` and `result`."""
        self.begin(operation, **arguments)
        return self.result()

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send(self, message: bytes) -> None:
        try:
            self._pipe.send_bytes(message)
        except OSError:
            raise PeerLostError(f"{self.start.instance}: {self.start.engine} {self._how_it_ended()}") from None

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            return "hung up"
        return f"ended with {code}" if code >= 0 else f"was killed by signal {-code}"


def _home() -> str:
    """Where this package is imported from."""
    return str(Path(hetkv.__file__).parents[1])


def _error(failure: Failure) -> HetkvError:
    """The exception that the other process raised."""
    if failure.fields:
        return IncompatibleError(*failure.fields)
    kind = getattr(errors, failure.kind, None)
    if isinstance(kind, type) and issubclass(kind, HetkvError):
        return kind(failure.text)
    return HetkvError(failure.text)
