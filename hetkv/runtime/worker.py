"""One rank of a deployment as a process of its own: a prefill worker sends KV, a decode worker receives it.

The parent (the router) talks to a worker through a pipe: it sends `(operation, arguments)` and reads one answer.
KV never passes through the parent.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from hetkv.config import TransferConfig
from hetkv.errors import HetkvError, InputError
from hetkv.pool import KVPool
from hetkv.trace import Span, engine_spans
from hetkv.transfer import Reception, Sender, Transmission


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker process is started with."""

    role: str
    """`prefill` or `decode`."""
    instance: str
    model: str
    """Checkpoint directory."""
    layout: str
    block_size: int
    kv_dtype: str
    compute_dtype: str = "float32"
    max_tokens: int
    """Tokens that the pool must hold for one request."""
    chunk: int | None = None
    """Prefill chunk in tokens; `None`: the whole prompt in one pass."""
    threads: int = 1
    secret: bytes
    transfer: TransferConfig = msgspec.field(default_factory=TransferConfig)


class PrefillResult(msgspec.Struct, frozen=True):
    """What a prefill tells: its first token and its times (CLOCK_MONOTONIC, ns)."""

    first_token: int
    start_ns: int
    first_send_ns: int
    stop_ns: int
    spans: list[Span]


class DecodeResult(msgspec.Struct, frozen=True):
    """What a decode tells. `kv_ns`: when the last layer was verified and in the pool."""

    tokens: list[int]
    kv_ns: int
    first_token_ns: int
    stop_ns: int
    spans: list[Span]


class Worker:
    """The state of a worker process."""

    def __init__(self, config: WorkerConfig) -> None:
        import torch

        from hetkv.dtypes import DType
        from hetkv.runtime.model import Decoder
        from hetkv.runtime.paged import BlockAllocator
        from hetkv.transfer import Receiver

        torch.set_num_threads(config.threads)
        self.config = config
        self.model = Decoder.load(config.model, DType.parse(config.compute_dtype).torch)
        if config.block_size < 1:
            raise InputError(f"block size {config.block_size}: must be at least 1")
        # A few blocks more than one request needs, so that its block ids are not simply 0, 1, 2, ...
        num_blocks = 2 * -(-config.max_tokens // config.block_size) + 2
        self.pool = KVPool.allocate(
            self.model.kv_spec, num_blocks, layout=config.layout, block_size=config.block_size, dtype=config.kv_dtype
        )
        self.allocator = BlockAllocator(self.pool)
        make = Sender if config.role == "prefill" else Receiver
        self.node: Any = make(self.pool, secret=config.secret, instance=config.instance, config=config.transfer)
        self.sending: dict[str, tuple[Transmission, list[list[int]]]] = {}
        self.kv_ns: dict[str, int] = {}
        self.accepted: dict[str, tuple[Reception, list[list[int]], int]] = {}

    def listen(self) -> str:
        """Address at which the node takes peers."""
        address: str = self.node.listen()
        return address

    def connect(self, address: str) -> None:
        """Link to a listening peer."""
        self.node.connect(address)

    def prefill(self, request_id: str, prompt: list[int]) -> PrefillResult:
        """Compute a prompt; its KV leaves layer by layer. Returns when the compute is done: see `finish`."""
        from hetkv.runtime.generate import greedy, prefill
        from hetkv.runtime.paged import Pages

        blocks = self.allocator.allocate(len(prompt))
        start = time.monotonic_ns()
        try:
            sending: Transmission = self.node.send(request_id, blocks, len(prompt))
        except BaseException:
            self.allocator.free(blocks)
            raise
        self.sending[request_id] = (sending, blocks)
        times: list[tuple[int, int]] = []

        def on_layer(layer: int, first: int, last: int) -> None:
            times.append((layer, time.monotonic_ns()))
            sending.send_layer(layer, (first, last))

        try:
            logits = prefill(self.model, prompt, Pages(self.pool, blocks), chunk=self.config.chunk, on_layer=on_layer)
        except BaseException:
            sending.abort("the prefill failed")
            raise
        stop = time.monotonic_ns()
        edges = [start, *(at for _, at in times[:-1]), stop]
        spans = [Span("compute", layer, edges[i], edges[i + 1]) for i, (layer, _) in enumerate(times)]
        return PrefillResult(greedy(logits), start, times[0][1], stop, spans)

    def finish(self, request_id: str) -> tuple[list[Span], dict[str, int]]:
        """Wait until the receiver has verified the request, and free its blocks. Spans and counters of the transfer."""
        sending, blocks = self.sending.pop(request_id)
        try:
            sending.wait()
        finally:
            self.allocator.free(blocks)
        return engine_spans(self.node.engine.take_trace()), self.node.stats()

    def accept(self, request_id: str, num_tokens: int, max_new_tokens: int) -> None:
        """Make room for a request and give its ticket; returns at once."""
        blocks = self.allocator.allocate(num_tokens + max_new_tokens - 1)
        try:
            reception = self.node.receive(request_id, blocks, num_tokens)
        except BaseException:
            self.allocator.free(blocks)
            raise
        self.accepted[request_id] = (reception, blocks, num_tokens)
        reception.future.add_done_callback(lambda _: self.kv_ns.__setitem__(request_id, time.monotonic_ns()))

    def decode(self, request_id: str, first_token: int, max_new_tokens: int) -> DecodeResult:
        """Continue an accepted request behind its first token, once its KV is there."""
        from hetkv.runtime.generate import decode
        from hetkv.runtime.paged import Pages

        reception, blocks, num_tokens = self.accepted.pop(request_id)
        try:
            reception.wait()
            ready = time.monotonic_ns()
            tokens = list(decode(self.model, first_token, num_tokens, Pages(self.pool, blocks), max_new_tokens))
        finally:
            self.allocator.free(blocks)
        stop = time.monotonic_ns()
        spans = engine_spans(self.node.engine.take_trace())
        done = self.kv_ns.pop(request_id, ready)
        return DecodeResult(tokens, done, ready, stop, spans)


def serve(config: WorkerConfig, pipe: Connection) -> None:
    """Body of a worker process: answer `("ok", result)` or `("error", kind, text)` to each call until the pipe ends."""
    try:
        worker = Worker(config)
    except HetkvError as error:
        pipe.send(("error", type(error).__name__, str(error)))
        return
    pipe.send(("ok", None))
    with worker.node:
        while True:
            try:
                operation, arguments = pipe.recv()
            except (EOFError, KeyboardInterrupt):
                return
            try:
                pipe.send(("ok", getattr(worker, operation)(*arguments)))
            except HetkvError as error:
                pipe.send(("error", type(error).__name__, str(error)))


class WorkerHandle:
    """The parent's end of a worker process. `call` raises what the worker raised, as a `HetkvError`."""

    def __init__(self, config: WorkerConfig) -> None:
        import multiprocessing

        context = multiprocessing.get_context("spawn")
        self.config = config
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(config, theirs), name=config.instance, daemon=True)
        self._process.start()
        theirs.close()

    def call(self, operation: str, *arguments: Any) -> Any:
        """Run one operation of `Worker` and wait for its result."""
        self.start(operation, *arguments)
        return self.result()

    def start(self, operation: str, *arguments: Any) -> None:
        """Begin an operation; `result` must be called before the next."""
        self._pipe.send((operation, arguments))

    def result(self) -> Any:
        """Answer of the operation that was started (or, the first time, of the start of the process)."""
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join(1)
            raise HetkvError(f"worker {self.config.instance} ended with status {self._process.exitcode}") from None
        if answer[0] == "ok":
            return answer[1]
        raise _error(answer[1])(f"{self.config.instance}: {answer[2]}")

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _error(name: str) -> Callable[[str], HetkvError]:
    return InputError if name == "InputError" else HetkvError
