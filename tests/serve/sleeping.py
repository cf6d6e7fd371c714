"""Instances whose ranks sleep for as long as a step model says: schedulers, engines and transfers without any compute.

What the simulator predicts for that model is what they do, up to what Python's threads and the machine's load add.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from hetkv.costmodel.interface import StepModel
from hetkv.runtime.batching import Limits
from hetkv.runtime.plan import InstancePlan, SideOptions
from hetkv.runtime.rank import Event, Facts, Order, RankConfig
from hetkv.runtime.sampling import Sampling, Token
from hetkv.serve.gate import Gate
from hetkv.serve.generation import Generation
from hetkv.serve.instance import Instance, InstanceConfig
from hetkv.serve.scheduler import Scheduler
from hetkv.simulator.records import Records
from hetkv.simulator.request import FINISHED
from hetkv.simulator.traffic.workload import Workload

LIMITS = Limits(256, 2048)
KV_TOKENS = 64_000


class Wire:
    """Transfers take no time: one has arrived once all of its prompt is computed and its blocks are there."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ends: dict[str, dict[str, Callable[[int, Event], None]]] = {}
        self._computed: set[str] = set()

    def enter(self, transfer: str, kind: str, tell: Callable[[int, Event], None]) -> None:
        """One end of a transfer: `sent` or `received`."""
        with self._lock:
            self._ends.setdefault(transfer, {})[kind] = tell
        self._deliver(transfer)

    def computed(self, transfer: str, tell: Callable[[int, Event], None]) -> None:
        """The last of its prompt is there."""
        tell(0, Event("packed", transfer))
        with self._lock:
            self._computed.add(transfer)
        self._deliver(transfer)

    def _deliver(self, transfer: str) -> None:
        with self._lock:
            if transfer not in self._computed or len(self._ends.get(transfer, ())) < 2:
                return
            ends = self._ends.pop(transfer)
            self._computed.discard(transfer)
        for kind, tell in ends.items():
            tell(0, Event(kind, transfer))


class Sleeping:
    """Implements `Ranks` of the engine."""

    count = 1
    eos_ids: tuple[int, ...] = ()

    def __init__(self, config: RankConfig, model: StepModel, wire: Wire) -> None:
        self._model, self._wire = model, wire
        blocks = (config.kv_tokens or 0) // config.plan.pool.block_size
        self.facts = [Facts("127.0.0.1:1", blocks, 1.0, "sleeping")]
        self._ready = time.monotonic()

    def start(self, on_event: Callable[[int, Event], None]) -> None:
        self._tell = on_event

    def link(self, source: Any) -> None:
        """There is nothing to link."""

    def trace(self) -> list[Any]:
        return []

    def close(self) -> None:
        """There is nothing to end."""

    def work(self, order: Order) -> list[Token]:
        begin = time.monotonic()
        for begun in order.announce:
            self._wire.enter(begun.transfer, "sent", self._tell)
        for ticket in order.receive:
            self._wire.enter(ticket.transfer, "received", self._tell)
        decodes = [p for p in order.pieces if len(p.tokens) == 1 and p.start and not p.fresh and not p.transfer]
        prompts = [p for p in order.pieces if p not in decodes]
        if order.pieces:
            pairs = sum(len(p.tokens) * p.start + len(p.tokens) * (len(p.tokens) + 1) / 2 for p in prompts)
            tokens, context = sum(len(p.tokens) for p in prompts), float(sum(p.start for p in decodes))
            seconds = self._model.step_seconds(len(decodes), context, tokens, pairs)
            time.sleep(max(0.0, begin + seconds - time.monotonic()))
        for piece in order.pieces:
            if piece.transfer and piece.draw is not None:
                self._wire.computed(piece.transfer, self._tell)
        return [Token(7) for piece in order.pieces if piece.draw is not None]


@contextmanager
def sleeping(model: StepModel) -> Iterator[None]:
    """Instances that are made meanwhile have such ranks."""
    wire = Wire()
    with patch("hetkv.serve.instance.ranks_of", lambda config: Sleeping(config, model, wire)):
        yield


def run(
    model: StepModel, roles: tuple[str, ...], workload: Workload, seed: int, secret: Path, steps: Path
) -> dict[str, Any]:
    """A workload on instances of these roles; columns of its requests, as the simulator's. `steps`: see `StepLog`."""
    records = Records()

    async def one(scheduler: Scheduler, request: Any, begin: float) -> None:
        await asyncio.sleep(max(0.0, begin + request.arrival - time.monotonic()))
        generation = Generation([5] * request.prompt, Sampling(max_tokens=request.output, ignore_eos=True))
        scheduler.submit(generation)
        async for _ in generation:
            pass
        assert generation.first_token is not None
        assert generation.last_token is not None
        request.first_token, request.last_token = generation.first_token - begin, generation.last_token - begin
        records.add(request, FINISHED)

    async def serve() -> None:
        scheduler = Scheduler()
        gate = Gate(scheduler, secret.read_bytes())
        await gate.open("127.0.0.1:0")
        with sleeping(model):
            instances = [
                Instance(_config(f"{role}-{i}", role, gate.address, secret, steps)) for i, role in enumerate(roles)
            ]
        threads = [threading.Thread(target=instance.run, daemon=True) for instance in instances]
        for thread in threads:
            thread.start()
        while sum(member.up for member in scheduler.members.values()) < len(roles):
            await asyncio.sleep(0.01)
        begin = time.monotonic()
        await asyncio.gather(*(one(scheduler, request, begin) for request in workload.requests(seed)))
        for instance in instances:
            instance.leave()
        while scheduler.members:
            await asyncio.sleep(0.01)
        await gate.close()
        await asyncio.to_thread(lambda: [thread.join() for thread in threads])

    asyncio.run(serve())
    columns = records.columns()
    assert np.isfinite(columns["last_token"]).all()
    return columns


def _config(name: str, role: str, gate: str, secret: Path, steps: Path) -> InstanceConfig:
    return InstanceConfig(
        plan=InstancePlan(name=name, role=role, pool=SideOptions(block_size=16, layout="nhd", dtype="float32")),
        model="shape:llama-2-7b", scheduler=gate, limits=LIMITS, kv_tokens=KV_TOKENS, secret_file=str(secret),
        steps=str(steps),
    )  # fmt: skip
