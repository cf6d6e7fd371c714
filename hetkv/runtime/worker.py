"""One rank of an instance as a process of its own: a prefill rank sends KV, a decode rank receives it.

The parent (the router) talks to a rank through a pipe: it sends `(operation, arguments)` and reads one answer. It gives
every rank of an instance the same operations in the same order. KV never passes through the parent.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import torch

from hetkv.errors import HetkvError, InputError
from hetkv.kv.dtypes import DType
from hetkv.kv.pool import KVPool
from hetkv.models import ModelConfig
from hetkv.runtime.clock import WorkClock
from hetkv.runtime.forkserver import end_with_parent
from hetkv.runtime.generation import choose, decode, prefill
from hetkv.runtime.model import Decoder
from hetkv.runtime.paged import BlockAllocator, Pages
from hetkv.runtime.parallel_group import ParallelGroup
from hetkv.runtime.plan import InstancePlan
from hetkv.runtime.route_bytes import RouteBytes, route_bytes
from hetkv.runtime.synthetic import random_decoder
from hetkv.runtime.timeline import Span, engine_spans
from hetkv.transport.config import TransferConfig
from hetkv.transport.instance import Instance
from hetkv.transport.receiver import Receiver, RecvHandle
from hetkv.transport.sender import Sender, SendHandle


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank's process is started with."""

    plan: InstancePlan
    rank: int
    meeting: str
    """Where the ranks of the instance meet: see `ParallelGroup.join`."""
    model: str | ModelConfig
    """Checkpoint directory, or the shape of a model of one rank with random weights."""
    compute_dtype: str = "float32"
    max_tokens: int
    """Tokens that the pool must hold for one request."""
    max_requests: int = 2
    """Requests that the pool must hold at once."""
    chunk: int | None = None
    """Prefill chunk in tokens; `None`: the whole prompt in one pass."""
    threads: int = 1
    secret: bytes
    transfer: TransferConfig = msgspec.field(default_factory=TransferConfig)

    @property
    def name(self) -> str:
        """`instance/rank`, as in the transport's messages."""
        return f"{self.plan.name}/{self.rank}"


class PrefillResult(msgspec.Struct, frozen=True):
    """What a rank reports of a prefill: the first token and its times (CLOCK_MONOTONIC, ns)."""

    first_token: int
    start_ns: int
    first_send_ns: int
    stop_ns: int
    spans: list[Span]


class DecodeResult(msgspec.Struct, frozen=True):
    """What a rank reports of a decode. `kv_ns`: when its last layer was verified and in the pool."""

    tokens: list[int]
    kv_ns: int
    first_token_ns: int
    stop_ns: int
    spans: list[Span]


def pool_blocks(max_tokens: int, max_requests: int, block_size: int) -> int:
    """Blocks of a rank's pool: a few more than the requests need, so that their block ids are not 0, 1, 2, ..."""
    return max_requests * -(-max_tokens // block_size) + 2


class Worker:
    """The state of a rank's process."""

    def __init__(self, config: WorkerConfig) -> None:
        torch.set_num_threads(config.threads)
        self.config, plan = config, config.plan
        self._stack = ExitStack()
        device = plan.rank_device(config.rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        group = ParallelGroup.join(config.meeting, plan.tp, plan.pp, config.rank, device)
        self._stack.callback(group.leave)
        dtype = DType.parse(config.compute_dtype).torch
        if isinstance(config.model, ModelConfig):
            self.model = random_decoder(config.model, dtype, device)
        else:
            self.model = Decoder.load(config.model, dtype, device, group=group, stages=plan.stages)
        self.pool = KVPool.allocate(
            self.model.kv_spec,
            pool_blocks(config.max_tokens, config.max_requests, plan.pool.block_size),
            layout=plan.pool.layout,
            block_size=plan.pool.block_size,
            dtype=plan.pool.dtype,
            shard=self.model.shard,
            device=device,
        )
        self.allocator = BlockAllocator(self.pool)
        make = Sender if plan.role == "prefill" else Receiver
        self.node: Any = self._stack.enter_context(
            make(
                self.pool,
                secret=config.secret,
                instance=plan.name,
                rank=config.rank,
                instance_shards=plan.shards(self.model.config),
                config=config.transfer,
            )
        )
        self.sending: dict[str, tuple[SendHandle, list[list[int]]]] = {}
        self.kv_ns: dict[str, int] = {}
        self.trace: list[tuple[str, int, int, int, int, int]] = []
        self.accepted: dict[str, tuple[RecvHandle, list[list[int]], int]] = {}

    def close(self) -> None:
        """End the node's links, then leave the group."""
        self._stack.close()

    def listen(self) -> str:
        """Address at which this rank takes peers."""
        address: str = self.node.listen()
        return address

    def connect(self, source: InstancePlan, addresses: list[str]) -> None:
        """Link to those ranks of a listening instance that hold something this rank holds too."""
        self.node.connect(Instance(source.name, tuple(addresses)))

    def prefill(self, request_id: str, prompt: list[int]) -> PrefillResult:
        """Compute a prompt; its KV leaves layer by layer. Returns when the compute is done: see `finish`."""
        blocks = self.allocator.allocate(len(prompt))
        clock = WorkClock(self.model.device)
        handed_over: list[int] = []
        computed: list[tuple[int, int, int]] = []  # layer, and the marks of its beginning and end
        try:
            sending: SendHandle = self.node.send(request_id, blocks, len(prompt))
        except BaseException:
            self.allocator.free(blocks)
            raise
        self.sending[request_id] = (sending, blocks)

        def on_layer(layer: int, first: int, last: int) -> None:
            handed_over.append(clock.mark())
            sending.send_layer(layer, (first, last))

        @contextmanager
        def around_layer(layer: int) -> Iterator[None]:
            begin = clock.mark()
            yield
            computed.append((layer, begin, clock.mark()))

        try:
            logits = prefill(
                self.model, prompt, Pages(self.pool, blocks), chunk=self.config.chunk, on_layer=on_layer,
                around_layer=around_layer,
            )  # fmt: skip
            token = choose(self.model, logits)
        except BaseException:
            sending.abort("the prefill failed")
            raise
        stop, times = time.monotonic_ns(), clock.times()
        spans = [self._span(layer, times[begin], times[end]) for layer, begin, end in computed]
        return PrefillResult(token, clock.start_ns, times[handed_over[0]], stop, spans)

    def finish(self, request_id: str) -> list[Span]:
        """Wait until the receivers have verified the request, and free its blocks. Spans of its transfer."""
        sending, blocks = self.sending.pop(request_id)
        try:
            sending.wait()
        finally:
            self.allocator.free(blocks)
        return self._transfer_spans(sending.handle)

    def accept(self, request_id: str, source: str, num_tokens: int, max_new_tokens: int) -> None:
        """Make room for a request of instance `source` and give its ticket; returns at once."""
        blocks = self.allocator.allocate(num_tokens + max_new_tokens - 1)
        try:
            receiving = self.node.receive(request_id, blocks, num_tokens, src_instance=source)
        except BaseException:
            self.allocator.free(blocks)
            raise
        self.accepted[request_id] = (receiving, blocks, num_tokens)
        receiving.future.add_done_callback(lambda _: self.kv_ns.__setitem__(request_id, time.monotonic_ns()))

    def decode(self, request_id: str, first_token: int, max_new_tokens: int) -> DecodeResult:
        """Continue an accepted request after its first token, once its KV is there."""
        receiving, blocks, num_tokens = self.accepted.pop(request_id)
        try:
            receiving.wait()
            ready = time.monotonic_ns()
            tokens = list(decode(self.model, first_token, num_tokens, Pages(self.pool, blocks), max_new_tokens))
        finally:
            self.allocator.free(blocks)
        stop = time.monotonic_ns()
        done = self.kv_ns.pop(request_id, ready)
        return DecodeResult(tokens, done, ready, stop, self._transfer_spans(receiving.handle))

    def routes(self, source: str, num_tokens: int) -> list[RouteBytes]:
        """What a request of instance `source` moves to this rank."""
        return route_bytes(self.node, source, num_tokens)

    def stats(self) -> dict[str, int]:
        """Counters of the node since its start."""
        counters: dict[str, int] = self.node.stats()
        return counters

    def _span(self, layer: int, start_ns: int, stop_ns: int) -> Span:
        return Span("compute", layer, start_ns, stop_ns, process=self.config.name)

    def _transfer_spans(self, handle: int) -> list[Span]:
        """What the engine did for one request; what it did for others is kept until they are asked for."""
        self.trace += self.node.engine.take_trace()
        mine = [work for work in self.trace if work[1] == handle]
        self.trace = [work for work in self.trace if work[1] != handle]
        return engine_spans(mine, self.config.name)


def serve(config: WorkerConfig, pipe: Connection) -> None:
    """Body of a rank's process: answer `("ok", result)` or `("error", kind, text)` to each call until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets Ctrl-C too, and ends its ranks
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this host, and no other host should reach them
    with suppress(EOFError, OSError):  # the parent has hung up
        _serve(config, pipe)


def _serve(config: WorkerConfig, pipe: Connection) -> None:
    try:
        worker = Worker(config)
    except (HetkvError, torch.OutOfMemoryError) as error:
        pipe.send(_failure(error))
        return
    with closing(worker):
        pipe.send(("ok", None))
        while True:
            operation, arguments = pipe.recv()
            answer: tuple[Any, ...]
            try:
                answer = ("ok", getattr(worker, operation)(*arguments))
            except (HetkvError, torch.OutOfMemoryError) as error:
                answer = _failure(error)
            pipe.send(answer)


def _failure(error: HetkvError | torch.OutOfMemoryError) -> tuple[str, str, str]:
    """A device without room for what the caller asked for is reported to the caller in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "error", InputError.__name__, str(error).partition("\n")[0]
    return "error", type(error).__name__, str(error)
