"""A child process that runs methods of one object for its parent: `Child`. Benchmarks and tests use it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hetkv.errors import BenchmarkError
from hetkv.interrupt import kept_from_children

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

REPLY_S = 120.0


class Child:
    """A spawned process that makes `make(*arguments)` and answers `ask` with what its methods return.

    `environment` is set in it before UCX is loaded. The first `answer` says whether the object was made.
    """

    def __init__(
        self, name: str, make: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str] | None = None
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, arguments, environment or {}), daemon=True)
        with kept_from_children():
            self.process.start()
        theirs.close()

    def ask(self, *message: Any) -> Any:
        """Call a method: `(name, *arguments)`. Raises `BenchmarkError` with the text of what it raised."""
        self.pipe.send(message)
        return self.answer()

    def answer(self) -> Any:
        """The answer to what was sent last."""
        try:
            if not self.pipe.poll(REPLY_S):
                raise BenchmarkError(f"the {self.name} did not answer within {REPLY_S:.0f} s")
            done, value = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join(5)
            raise BenchmarkError(f"the {self.name} ended with exit code {self.process.exitcode}") from None
        if not done:
            raise BenchmarkError(f"the {self.name}: {value}")
        return value

    def signal(self, number: int) -> None:
        """Send a signal to the process."""
        os.kill(self.process.pid or 0, number)

    def close(self) -> None:
        """Let the object close and the process end; kill it where it does not."""
        with contextlib.suppress(OSError):
            self.pipe.send(("close",))
        self.process.join(10)
        self.kill()

    def kill(self) -> None:
        """End the process at once."""
        self.process.kill()
        self.process.join()


def ask_all(children: Sequence[Child], *message: Any) -> list[Any]:
    """The same question to several processes at once; their answers in order."""
    for child in children:
        child.pipe.send(message)
    return [child.answer() for child in children]


def _serve(
    connection: Connection, make: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str]
) -> None:
    """Body of a child: answers `(method, *arguments)` until the pipe closes."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.update(environment)
    try:
        side = make(*arguments)
        connection.send((True, None))
    except Exception as error:  # reported to the parent, which raises it
        connection.send((False, f"{type(error).__name__}: {error}"))
        return
    try:
        while True:
            method, *rest = connection.recv()
            if method == "close":
                break
            try:
                connection.send((True, getattr(side, method)(*rest)))
            except Exception as error:
                connection.send((False, f"{type(error).__name__}: {error}"))
    except EOFError:
        pass
    side.close()
