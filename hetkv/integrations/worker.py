"""One engine in a process and an interpreter of its own: `python -m hetkv.integrations.worker FD`.

Whoever starts it (`EngineProcess`) talks to it over the socket with that descriptor, in MessagePack: first `Start`,
then `(operation, arguments)`, each with one answer. KV never passes through here.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
from collections import deque
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from hetkv.errors import HetkvError, InputError

ENGINES = {
    "reference": "hetkv.integrations.reference.engine:ReferenceEngine",
    "transformers": "hetkv.integrations.transformers.engine:TransformersEngine",
    "transformers-paged": "hetkv.integrations.transformers.batching:BatchingEngine",
    "llama.cpp": "hetkv.integrations.llama_cpp.engine:LlamaCppEngine",
    "mlx": "hetkv.integrations.mlx.engine:MlxEngine",
    "vllm": "hetkv.integrations.vllm.instance:VllmInstance",
}
"""Where each engine's class is: an `Engine`, or one with the operations of an `EngineInstance`."""


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """What a process is started with."""

    engine: str
    model: str
    instance: str
    secret: bytes
    options: dict[str, Any] = {}
    """Of the engine's class."""


class Failure(msgspec.Struct, frozen=True, tag="failure"):
    """What an operation raised."""

    kind: str
    text: str
    fields: tuple[str, ...] = ()
    """Of an `IncompatibleError`: field, mine, theirs, why."""


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """What an operation returned."""

    value: Any = None


def make(start: Start) -> Any:
    """The instance of an engine. Raises `InputError` where it is not known, or not installed here."""
    if start.engine not in ENGINES:
        raise InputError(f"engine {start.engine!r} is not known; known are {', '.join(ENGINES)}")
    module, _, name = ENGINES[start.engine].partition(":")
    try:
        kind = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("hetkv"):
            raise
        raise InputError(f"engine {start.engine}: {sys.executable} has no module {error.name}") from None
    try:
        from hetkv.integrations.engine import Engine
        from hetkv.integrations.instance import EngineInstance

        if not issubclass(kind, Engine):
            return kind(start.model, instance=start.instance, secret=start.secret, **start.options)
        engine = kind(start.model, **start.options)
        return EngineInstance(engine, instance=start.instance, secret=start.secret)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise InputError(f"engine {start.engine}: {error}") from None


class Warned(logging.Handler):
    """Keeps what hetkv warned of, such as peers that were rejected: the operation `warned` returns it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: deque[str] = deque(maxlen=100)
        logging.getLogger("hetkv").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def serve(pipe: Connection) -> None:
    """Body of the process: ends when the pipe does."""
    warned = Warned()
    start = msgspec.msgpack.decode(pipe.recv_bytes(), type=Start)
    try:
        instance = make(start)
    except Exception as error:
        pipe.send_bytes(_encoded(_failure(error)))
        return
    with closing(instance):
        pipe.send_bytes(_encoded(Answer()))
        while True:
            operation, arguments = msgspec.msgpack.decode(pipe.recv_bytes())
            try:
                if operation == "warned":
                    answer: Answer | Failure = Answer(list(warned.texts))
                else:
                    answer = Answer(getattr(instance, operation)(**arguments))
            except Exception as error:
                answer = _failure(error)
            pipe.send_bytes(_encoded(answer))


def _failure(error: Exception) -> Failure:
    fields = tuple(getattr(error, name, "") for name in ("field", "mine", "theirs", "why"))
    text = str(error) if isinstance(error, HetkvError) else f"{type(error).__name__}: {error}"
    return Failure(type(error).__name__, text, fields if fields[0] else ())


def _encoded(message: Answer | Failure) -> bytes:
    return msgspec.msgpack.encode(message)


def main() -> None:
    """What `python -m` runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets Ctrl-C too, and ends this one
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with suppress(EOFError, OSError):  # the parent has hung up
        serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()
