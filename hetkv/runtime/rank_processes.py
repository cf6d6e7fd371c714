"""An instance of several ranks, each in a process of its own: `RankProcesses`. It carries no KV."""

from __future__ import annotations

import os
import queue
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import torch

from hetkv.errors import AuthenticationError, HandshakeError, HetkvError, InputError, PeerLostError
from hetkv.runtime.forkserver import end_with_parent, forkserver_context, interrupt_later
from hetkv.runtime.processes import ERROR_S, JOIN_S
from hetkv.runtime.rank import Event, Facts, Moved, Order, Rank, RankConfig
from hetkv.runtime.sampling import Token
from hetkv.transport.instance import Instance


class RankProcesses:
    """Implements `Ranks` of the engine. A rank that is lost ends the instance: calls raise `PeerLostError`."""

    def __init__(self, config: RankConfig) -> None:
        self.count = config.plan.ranks
        self._on_event: Callable[[int, Event], None] = lambda rank, event: None
        self._lock = threading.Lock()
        self._answers: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in range(self.count)]
        self._names = [f"{config.plan.name}/{rank}" for rank in range(self.count)]
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        self._patience = ERROR_S
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="hetkv-"))
            stack.callback(self._end)
            context = forkserver_context()
            for rank in range(self.count):
                mine = msgspec.structs.replace(config, rank=rank, meeting=f"file://{folder}/{config.plan.name}")
                ours, theirs = context.Pipe()
                process = context.Process(target=serve, args=(mine, theirs), name=mine.name, daemon=True)
                self._pipes.append(ours)
                with interrupt_later():
                    process.start()
                    self._processes.append(process)
                theirs.close()
                threading.Thread(target=self._read, args=(rank, ours), daemon=True).start()
            self.facts: list[Facts] = self._all_answers()
            self.eos_ids: tuple[int, ...] = self._call("eos_ids")[0]
            self._stack = stack.pop_all()
        self._patience = JOIN_S

    def start(self, on_event: Callable[[int, Event], None]) -> None:
        self._on_event = on_event

    def work(self, order: Order) -> list[Token]:
        # The last stage has the logits; its first rank chooses.
        return next((tokens for tokens in self._call("work", order) if tokens), [])

    def link(self, source: Instance) -> None:
        self._call("link", source)

    def trace(self) -> list[Moved]:
        """See `Rank.trace`; of all ranks."""
        return [moved for rank in self._call("trace") for moved in rank]

    def close(self) -> None:
        """End the processes."""
        self._stack.close()

    def _call(self, operation: str, *arguments: Any) -> list[Any]:
        with self._lock:
            for rank, pipe in enumerate(self._pipes):
                try:
                    pipe.send((operation, arguments))
                except OSError:
                    raise self._lost(rank) from None
            return self._all_answers()

    def _all_answers(self) -> list[Any]:
        """One answer of each rank; the first failure, whoever's it is: the others may wait for that rank."""
        found: dict[int, Any] = {}
        while len(found) < self.count:
            for rank in range(self.count):
                if rank in found:
                    continue
                with suppress(queue.Empty):
                    found[rank] = self._answer(rank, 0.002 if len(found) + 1 < self.count else None)
        return [found[rank] for rank in range(self.count)]

    def _answer(self, rank: int, timeout: float | None) -> Any:
        answer = self._answers[rank].get(timeout=timeout)
        if answer is None:
            raise self._lost(rank)
        if isinstance(answer, HetkvError):
            for other, process in enumerate(self._processes):
                if isinstance(answer, PeerLostError) and process.exitcode is not None:
                    raise self._lost(other)
            raise answer
        return answer[0]

    def _read(self, rank: int, pipe: Connection) -> None:
        """Body of a thread: a rank's answers, and its events in between."""
        with suppress(EOFError, OSError):
            while True:
                message = pipe.recv()
                if isinstance(message, Event):
                    self._on_event(rank, message)
                else:
                    self._answers[rank].put(message)
        self._answers[rank].put(None)

    def _lost(self, rank: int) -> HetkvError:
        self._processes[rank].join(1)
        return PeerLostError(f"rank {self._names[rank]} ended with {self._processes[rank].exitcode}")

    def _end(self) -> None:
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.send(("close", ()))
        deadline = time.monotonic() + self._patience
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()


def serve(config: RankConfig, pipe: Connection) -> None:
    """Body of a rank's process: `(result,)` or an error for each call, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets Ctrl-C too, and ends its ranks
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    lock = threading.Lock()

    def say(message: Any) -> None:
        with lock, suppress(OSError):  # the parent has hung up
            pipe.send(message)

    try:
        rank = Rank(config, say)
    except (HetkvError, torch.OutOfMemoryError) as error:
        say(_plain(error))
        return
    with closing(rank), suppress(EOFError, OSError):
        say((rank.facts(),))
        while True:
            operation, arguments = pipe.recv()
            if operation == "close":
                return
            try:
                say((rank.eos_ids if operation == "eos_ids" else getattr(rank, operation)(*arguments),))
            except (HetkvError, torch.OutOfMemoryError) as error:
                say(_plain(error))


def _plain(error: Exception) -> HetkvError:
    """What can be sent: some errors hold more than their text. Those of a handshake say whether to try again."""
    if isinstance(error, (AuthenticationError, HandshakeError)):
        return error
    kind = next((kind for kind in (InputError, PeerLostError) if isinstance(error, kind)), HetkvError)
    return kind(str(error).partition("\n")[0])


def ranks_of(config: RankConfig) -> Any:
    """The ranks of an instance: in this process where it has one, else in processes of their own."""
    from hetkv.runtime.alone import Alone

    return Alone(config) if config.plan.ranks == 1 else RankProcesses(config)
