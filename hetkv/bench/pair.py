"""Two processes, a sender and a receiver with unlike pools, for `hetkv bench transfer` and `hetkv probe`."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from hetkv.config import TransferConfig
from hetkv.errors import HetkvError, InputError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from types import TracebackType

    import torch
    from typing_extensions import Self

    from hetkv.pool import KVPool

HEADS, HEAD_DIM = 8, 128
TOKEN_BYTES = HEADS * HEAD_DIM * 2
"""Bytes of one token's K, or V: bf16."""
TICKET_S = 0.005
"""Time for the ticket to reach the sender before the clock starts."""
REPLY_S = 120.0


class PairError(HetkvError):
    """One of the two processes failed."""


class Shape(NamedTuple):
    """What one request moves, and the two layouts."""

    layers: int
    tokens: int
    source: tuple[str, int] = ("nhd", 16)
    """Preset and block size of the sender's pool."""
    destination: tuple[str, int] = ("hnd", 64)
    devices: tuple[str, str] = ("cpu", "cpu")
    """Where the sender's and the receiver's pool lie."""

    @property
    def payload_bytes(self) -> int:
        """K and V of every layer, each byte once."""
        return self.layers * self.tokens * 2 * TOKEN_BYTES


class Sent(NamedTuple):
    """One request. Times in seconds."""

    seconds: float
    """From the first `send_layer` until the sender knows that the receiver has verified every layer."""
    send_layer_s: list[float]


def values(tokens: int) -> torch.Tensor:
    """`[tokens, heads, channels]`: what both sides derive layers from."""
    import torch

    return torch.randn(tokens, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(tokens)).to(torch.bfloat16)


def part(base: torch.Tensor, layer: int, segment: str) -> torch.Tensor:
    """The values of one layer's K or V: the base, turned by a number of tokens that no other part has."""
    return base.roll(2 * layer + (segment == "v"), dims=0)


def make_pool(shape: Shape, side: tuple[str, int], seed: int, device: str = "cpu") -> tuple[KVPool, list[int]]:
    """A pool that holds one request exactly, and the request's block ids in shuffled order."""
    import torch

    from hetkv.pool import KVPool
    from hetkv.spec import KVSpec

    layout, block_size = side
    blocks = -(-shape.tokens // block_size)
    pool = KVPool.allocate(
        KVSpec.uniform(shape.layers, HEADS, HEAD_DIM),
        blocks,
        layout=layout,
        block_size=block_size,
        dtype="bf16",
        device=device,
    )
    return pool, torch.randperm(blocks, generator=torch.Generator().manual_seed(seed)).tolist()


def use_device(name: str) -> str:
    """Make a device PyTorch's current one. Raises `InputError` where it is not there."""
    import torch

    if name != "cpu":
        index = torch.device(name).index or 0
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            raise InputError(f"device {name}: PyTorch sees {torch.cuda.device_count()} GPUs here")
        torch.cuda.set_device(index)
    return name


def synchronize(device: str) -> None:
    """Wait for all work of the current stream."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize()


class _SenderSide:
    def __init__(self, shape: Shape, config: TransferConfig, secret: bytes) -> None:
        from hetkv.transfer import Sender

        self.shape = shape
        self.device = use_device(shape.devices[0])
        self.pool, self.blocks = make_pool(shape, shape.source, 1, self.device)
        base = values(shape.tokens).to(self.device)
        whole, rest = divmod(shape.tokens, shape.source[1])
        for layer in range(shape.layers):
            for segment in "kv":
                view = self.pool.view(layer, segment)
                rows = part(base, layer, segment)
                view[self.blocks[:whole]] = rows[: shape.tokens - rest].reshape(whole, *view.shape[1:])
                if rest:
                    tail = view[self.blocks[whole]][:rest]
                    tail.copy_(rows[shape.tokens - rest :].reshape(tail.shape))
        synchronize(self.device)
        self.node = Sender(self.pool, secret=secret, instance="bench-sender", config=config)

    def listen(self) -> str:
        return self.node.listen()

    def run(self, request: str) -> Sent:
        transmission = self.node.send(request, self.blocks, self.shape.tokens)
        time.sleep(TICKET_S)
        calls = []
        began = time.perf_counter()
        for layer in range(self.shape.layers):
            before = time.perf_counter()
            transmission.send_layer(layer)
            calls.append(time.perf_counter() - before)
        transmission.wait(REPLY_S / 2)
        seconds = time.perf_counter() - began
        return Sent(seconds, calls)

    def stats(self) -> dict[str, int]:
        return dict(self.node.stats())


class _ReceiverSide:
    def __init__(self, shape: Shape, config: TransferConfig, secret: bytes) -> None:
        from hetkv.transfer import Receiver

        self.shape = shape
        self.device = use_device(shape.devices[1])
        self.pool, self.blocks = make_pool(shape, shape.destination, 2, self.device)
        self.node = Receiver(self.pool, secret=secret, instance="bench-receiver", config=config)
        self.reception: Any = None

    def connect(self, address: str) -> None:
        self.node.connect(address)

    def receive(self, request: str) -> None:
        self.reception = self.node.receive(request, self.blocks, self.shape.tokens)

    def wait(self) -> None:
        self.reception.wait(REPLY_S / 2)

    def verify(self) -> int:
        """Compare every value of the pool with what the sender's pool holds; returns the bytes compared."""
        import torch

        base, compared = values(self.shape.tokens).to(self.device), 0
        for layer in range(self.shape.layers):
            for segment in "kv":
                found = self.pool.view(layer, segment)[self.blocks].flatten(3).flatten(0, 1)[: self.shape.tokens]
                if not torch.equal(found, part(base, layer, segment)):
                    raise PairError(f"layer {layer}, {segment}: the receiver's pool differs from the sender's")
                compared += found.numel() * found.element_size()
        return compared

    def clear(self) -> None:
        """Zero the pool, so that `verify` sees only what comes afterwards."""
        for layer in range(self.shape.layers):
            for segment in "kv":
                self.pool.view(layer, segment).zero_()
        synchronize(self.device)

    def stats(self) -> dict[str, int]:
        return dict(self.node.stats())


def _serve(
    connection: Connection, make: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str]
) -> None:
    """Body of a child: answers `(method, *arguments)` until the pipe closes."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.update(environment)  # before UCX is loaded
    try:
        side = make(*arguments)
        connection.send((True, None))
    except Exception as error:  # told to the parent, which raises it
        connection.send((False, f"{type(error).__name__}: {error}"))
        return
    try:
        while True:
            method, *rest = connection.recv()
            if method == "close":
                break
            try:
                answer = time.process_time() if method == "cpu" else None
                if method == "trace":
                    answer = side.node.engine.take_trace()
                elif method != "cpu":
                    answer = getattr(side, method)(*rest)
                connection.send((True, answer))
            except Exception as error:
                connection.send((False, f"{type(error).__name__}: {error}"))
    except EOFError:
        pass
    side.node.close()


class _Child:
    """A child process with a pipe to it."""

    def __init__(
        self, name: str, make: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str] | None = None
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, arguments, environment or {}), daemon=True)
        self.process.start()
        theirs.close()

    def answer(self) -> Any:
        try:
            if not self.pipe.poll(REPLY_S):
                raise PairError(f"the {self.name} did not answer within {REPLY_S:.0f} s")
            done, value = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join(5)
            raise PairError(f"the {self.name} ended with exit code {self.process.exitcode}") from None
        if not done:
            raise PairError(f"the {self.name}: {value}")
        return value

    def ask(self, *message: Any) -> Any:
        self.pipe.send(message)
        return self.answer()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(("close",))
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class Pair:
    """A connected sender and receiver in two processes of their own. Close it, or use it with `with`."""

    def __init__(
        self, shape: Shape, config: TransferConfig | None = None, environment: dict[str, str] | None = None
    ) -> None:
        """`environment`: set in both processes before UCX is loaded."""
        if shape.layers < 1 or shape.tokens < 1:
            raise InputError(f"{shape.layers} layers of {shape.tokens} tokens: at least one of each")
        self.shape = shape
        self.requests = 0
        arguments = (shape, config or TransferConfig(), os.urandom(32))
        self.sender = _Child("sender", _SenderSide, arguments, environment)
        self.receiver = _Child("receiver", _ReceiverSide, arguments, environment)
        try:
            self.sender.answer()
            self.receiver.answer()
            self.receiver.ask("connect", self.sender.ask("listen"))
        except BaseException:
            self.close()
            raise

    def send(self) -> Sent:
        """Move one whole request, pool to pool; its ticket is there before the clock starts."""
        self.requests += 1
        request = f"bench-{self.requests}"
        self.receiver.ask("receive", request)
        sent: Sent = self.sender.ask("run", request)
        self.receiver.ask("wait")
        return sent

    def verify(self) -> int:
        """Send once more into a zeroed pool and compare every byte of it; returns the bytes compared."""
        self.receiver.ask("clear")
        self.send()
        compared: int = self.receiver.ask("verify")
        return compared

    def reach(self) -> str:
        """How payloads got there, by the sender's own count: `peer`, `shared`, `put`, or `mixed`."""
        stats = self.sender.ask("stats")
        direct, peer, frames = stats["direct_frames"], stats["peer_frames"], stats["frames"]
        if peer not in (0, frames) or direct not in (0, frames):
            return "mixed"
        return "peer" if peer else "shared" if direct else "put"

    def idle_cpu(self, seconds: float) -> list[float]:
        """Share of a core that each process uses while nothing is sent: sender, receiver."""
        before = [child.ask("cpu") for child in (self.sender, self.receiver)]
        time.sleep(seconds)
        after = [child.ask("cpu") for child in (self.sender, self.receiver)]
        return [(b - a) / seconds for a, b in zip(before, after, strict=True)]

    def close(self) -> None:
        """End both processes."""
        for child in (self.receiver, self.sender):
            child.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def gb_s(payload_bytes: int, seconds: list[float]) -> float:
    """10^9 payload bytes a second at the median time."""
    return payload_bytes / statistics.median(seconds) / 1e9
