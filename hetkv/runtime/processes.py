"""The parent's hold on rank processes: `Instance` calls all ranks of one instance, `running` starts and ends all."""

from __future__ import annotations

import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

from hetkv.errors import HetkvError, InputError, PeerLostError
from hetkv.models import ModelConfig
from hetkv.runtime.forkserver import forkserver_context, interrupt_later
from hetkv.runtime.plan import InstancePlan
from hetkv.runtime.worker import WorkerConfig, serve
from hetkv.transport.config import TransferConfig

PATIENCE_S = 24 * 3600.0
"""Lease of a request whose instances are processes that are watched: a long prefill is not a fault."""
JOIN_S, ERROR_S = 10.0, 2.0
"""Time that ranks have to close their links and end by themselves, at the end and after an error."""


class Instance:
    """The processes of one instance. `call` raises what a rank raised; one thread at a time is served."""

    def __init__(self, ranks: Sequence[WorkerConfig]) -> None:
        self.plan = ranks[0].plan
        self._lock = threading.Lock()
        self._ranks = ranks
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []

    def start(self) -> None:
        """Start the processes; `ready` waits for them."""
        context = forkserver_context()
        for config in self._ranks:
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(config, theirs), name=config.name, daemon=True)
            self._pipes.append(ours)
            with interrupt_later():  # a process that is not in the list would not be ended
                process.start()
                self._processes.append(process)
            theirs.close()

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [process.pid or 0 for process in self._processes]

    def ready(self) -> None:
        """Wait until every rank has loaded its part of the model and opened its node."""
        with self._lock:
            self._answers()

    def call(self, operation: str, *arguments: Any) -> list[Any]:
        """Run one operation of `Worker` on all ranks; their results in the order of ranks."""
        with self._lock:
            for rank, pipe in enumerate(self._pipes):
                try:
                    pipe.send((operation, arguments))
                except OSError:
                    raise self._ended(rank) from None
            return self._answers()

    def hang_up(self) -> None:
        """Ask the ranks to end."""
        for pipe in self._pipes:
            pipe.close()

    def join(self, deadline: float) -> None:
        """Wait until `deadline` (of `time.monotonic`) for the ranks to end, then kill those that have not."""
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()

    def _answers(self) -> list[Any]:
        """One answer of each rank. A failure is raised at once: the others may wait for the rank that failed."""
        answers: dict[Connection, Any] = {}
        while waiting := [pipe for pipe in self._pipes if pipe not in answers]:
            for ready in wait(waiting):
                assert isinstance(ready, Connection)
                rank = self._pipes.index(ready)
                try:
                    answer = ready.recv()
                except (EOFError, OSError):
                    raise self._ended(rank) from None
                if answer[0] != "ok":
                    raise self._cause(HetkvError if answer[1] != "InputError" else InputError, rank, answer)
                answers[ready] = answer[1]
        return [answers[pipe] for pipe in self._pipes]

    def _cause(self, kind: type[HetkvError], rank: int, answer: Any) -> HetkvError:
        """A rank that lost another reports it; the user wants to know which one was lost."""
        if answer[1] == PeerLostError.__name__:
            wait([process.sentinel for process in self._processes], timeout=1)
            for other, process in enumerate(self._processes):
                if process.exitcode is not None:
                    return self._ended(other)
        return kind(f"{self._ranks[rank].name}: {answer[2]}")

    def _ended(self, rank: int) -> HetkvError:
        process = self._processes[rank]
        process.join(1)
        code = process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with {code}"
        return PeerLostError(f"rank {self._ranks[rank].name} {how}")


@contextmanager
def running(
    plans: Sequence[InstancePlan], *, model: str | ModelConfig, max_tokens: int, max_requests: int = 2,
    chunk: int | None = None, compute_dtype: str = "float32", threads: int = 1, transfer: TransferConfig | None = None,
) -> Iterator[list[Instance]]:  # fmt: skip
    """Start all ranks of all instances; `link` them before the first use. On leaving, error or not, none is left."""
    secret = secrets.token_bytes(32)
    instances: list[Instance] = []
    with tempfile.TemporaryDirectory(prefix="hetkv-") as folder:
        patience = ERROR_S
        try:
            for plan in plans:
                ranks = [
                    WorkerConfig(
                        plan=plan,
                        rank=rank,
                        meeting=f"file://{folder}/{plan.name}",
                        model=model,
                        compute_dtype=compute_dtype,
                        max_tokens=max_tokens,
                        max_requests=max_requests,
                        chunk=chunk,
                        threads=threads,
                        secret=secret,
                        transfer=transfer or TransferConfig(),
                    )
                    for rank in range(plan.ranks)
                ]
                instances.append(Instance(ranks))
                instances[-1].start()
            yield instances
            patience = JOIN_S
        finally:
            for instance in instances:
                instance.hang_up()
            deadline = time.monotonic() + patience
            for instance in instances:
                instance.join(deadline)


def link(instances: Sequence[Instance]) -> None:
    """Wait for all ranks, and link every decode instance to every prefill instance, rank by rank."""
    for instance in instances:
        instance.ready()
    for source in instances:
        if source.plan.role == "prefill":
            addresses = source.call("listen")
            for destination in instances:
                if destination.plan.role == "decode":
                    destination.call("connect", source.plan, addresses)
