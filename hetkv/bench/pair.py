"""Processes of a sender and a receiver with different pools, for `hetkv bench transfer` and `hetkv probe`."""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hetkv.bench.child import REPLY_S, Child, ask_all
from hetkv.bench.namespaces import HERE, Places
from hetkv.errors import BenchmarkError, InputError
from hetkv.transport.config import TransferConfig

if TYPE_CHECKING:
    from types import TracebackType

    import torch
    from typing_extensions import Self

    from hetkv.kv.pool import KVPool
    from hetkv.kv.spec import KVSpec, Shard

HEADS, HEAD_DIM = 8, 128
TOKEN_BYTES = HEADS * HEAD_DIM * 2
"""Bytes of one token's K, or V: bf16."""
TICKET_S = 0.005
"""Time for the ticket to reach the sender before the clock starts."""


class Shape(NamedTuple):
    """What one request moves, the two layouts, and over how many ranks each side splits its heads."""

    layers: int
    tokens: int
    source: tuple[str, int] = ("nhd", 16)
    """Preset and block size of the sender's pool."""
    destination: tuple[str, int] = ("hnd", 64)
    tp: tuple[int, int] = (1, 1)
    devices: tuple[str, str] = ("cpu", "cpu")
    """The devices of the sender's and the receiver's pools."""

    @property
    def spec(self) -> KVSpec:
        from hetkv.kv.spec import KVSpec

        return KVSpec.uniform(self.layers, HEADS, HEAD_DIM)

    def shards(self, side: int) -> list[Shard]:
        """Of all ranks of the sender (0) or the receiver (1)."""
        from hetkv.kv.spec import Shard

        return [Shard.of(self.spec, self.tp[side], rank) for rank in range(self.tp[side])]

    @property
    def payload_bytes(self) -> int:
        """K and V of every layer, each byte once."""
        return self.layers * self.tokens * 2 * TOKEN_BYTES


class Sent(NamedTuple):
    """One request of one process. Times in seconds of the host's monotonic clock."""

    began: float
    """Before the first `send_layer`."""
    ended: float
    """When the sender knows that the receiver has verified every layer."""
    send_layer_s: list[float]

    @property
    def seconds(self) -> float:
        return self.ended - self.began


def values(tokens: int) -> torch.Tensor:
    """`[tokens, heads, channels]`: what both sides derive layers from."""
    import torch

    return torch.randn(tokens, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(tokens)).to(torch.bfloat16)


def part(base: torch.Tensor, layer: int, segment: str) -> torch.Tensor:
    """The values of one layer's K or V: the base, turned by a number of tokens that no other part has."""
    return base.roll(2 * layer + (segment == "v"), dims=0)


def make_pool(
    shape: Shape, side: tuple[str, int], seed: int, shard: Shard | None = None, device: str = "cpu"
) -> tuple[KVPool, list[int]]:
    """A rank's pool that holds one request exactly, and the request's block ids in shuffled order."""
    import torch

    from hetkv.kv.pool import KVPool

    layout, block_size = side
    blocks = -(-shape.tokens // block_size)
    pool = KVPool.allocate(
        shape.spec, blocks, layout=layout, block_size=block_size, dtype="bf16", shard=shard, device=device
    )
    return pool, torch.randperm(blocks, generator=torch.Generator().manual_seed(seed)).tolist()


def check_device(name: str) -> int:
    """The index of a device. Raises `InputError` where it is not there."""
    import torch

    if name == "cpu":
        return 0
    index = torch.device(name).index or 0
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise InputError(f"device {name}: PyTorch sees {torch.cuda.device_count()} GPUs here")
    return index


def use_device(name: str) -> str:
    """Make a device PyTorch's current one. Raises `InputError` where it is not there."""
    import torch

    index = check_device(name)
    if name != "cpu":
        torch.cuda.set_device(index)
    return name


def synchronize(device: str) -> None:
    """Wait for all work of the device."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize()


class _Side:
    """Some ranks of one side, in this process."""

    def __init__(
        self,
        kind: type[Any],
        index: int,
        shape: Shape,
        config: TransferConfig,
        secret: bytes,
        places: Places,
        ranks: Sequence[int],
    ) -> None:
        places[index].enter()
        self.shape, self.ranks, self.address = shape, ranks, places[index].address
        shards = shape.shards(index)
        self.device = use_device(shape.devices[index])
        side = (shape.source, shape.destination)[index]
        made = [make_pool(shape, side, 1 + index, shards[r], self.device) for r in ranks]
        self.pools, self.blocks = [pool for pool, _ in made], made[0][1]
        self.nodes = [
            kind(
                pool,
                secret=secret,
                instance=f"bench-{kind.role}",
                rank=rank,
                instance_shards=shards if len(shards) > 1 else (),
                config=config,
            )
            for rank, pool in zip(ranks, self.pools, strict=True)
        ]

    def stats(self) -> dict[str, int]:
        """Counters, added over the ranks."""
        counters: Counter[str] = Counter()
        for node in self.nodes:
            counters.update(node.stats())
        return dict(counters)

    def cipher(self) -> str:
        """Of the first link; empty: none."""
        return str(self.nodes[0].peers[0].cipher)

    def trace(self) -> list[Any]:
        return [span for node in self.nodes for span in node.engine.take_trace()]

    def cpu(self) -> float:
        return time.process_time()

    def close(self) -> None:
        for node in self.nodes:
            node.close()


class _SenderSide(_Side):
    def __init__(self, *arguments: Any) -> None:
        from hetkv.transport.sender import Sender

        super().__init__(Sender, 0, *arguments)
        shape = self.shape
        base = values(shape.tokens).to(self.device)
        whole, rest = divmod(shape.tokens, shape.source[1])
        for pool in self.pools:
            for layer in range(shape.layers):
                heads = slice(*pool.shard.heads[layer])
                for segment in "kv":
                    view = pool.view(layer, segment)
                    rows = part(base, layer, segment)[:, heads]
                    view[self.blocks[:whole]] = rows[: shape.tokens - rest].reshape(whole, *view.shape[1:])
                    if rest:
                        tail = view[self.blocks[whole]][:rest]
                        tail.copy_(rows[shape.tokens - rest :].reshape(tail.shape))
        synchronize(self.device)

    def listen(self) -> list[str]:
        return [node.listen(f"{self.address}:0") for node in self.nodes]

    def run(self, request: str) -> Sent:
        handles = [node.send(request, self.blocks, self.shape.tokens) for node in self.nodes]
        time.sleep(TICKET_S)
        calls = []
        began = time.monotonic()
        for layer in range(self.shape.layers):
            for handle in handles:
                before = time.perf_counter()
                handle.send_layer(layer)
                calls.append(time.perf_counter() - before)
        for handle in handles:
            handle.wait(REPLY_S / 2)
        return Sent(began, time.monotonic(), calls)


class _ReceiverSide(_Side):
    def __init__(self, *arguments: Any) -> None:
        from hetkv.transport.receiver import Receiver

        super().__init__(Receiver, 1, *arguments)
        self.handles: list[Any] = []

    def connect(self, addresses: list[str]) -> None:
        """To every rank of the sender that holds heads of a rank here."""
        for node in self.nodes:
            node.connect(addresses)

    def receive(self, request: str) -> None:
        self.handles = [node.receive(request, self.blocks, self.shape.tokens) for node in self.nodes]

    def wait(self) -> None:
        for handle in self.handles:
            handle.wait(REPLY_S / 2)

    def verify(self, tolerance: float = 0.0) -> int:
        """Compare every value of the pools with what the sender's pools hold; returns the bytes compared.

        `tolerance`: of an element, against the largest of its token and head.
        """
        import torch

        base, compared = values(self.shape.tokens).to(self.device), 0
        for pool in self.pools:
            for layer in range(self.shape.layers):
                heads = slice(*pool.shard.heads[layer])
                for segment in "kv":
                    found = pool.view(layer, segment)[self.blocks].flatten(3).flatten(0, 1)[: self.shape.tokens]
                    want = part(base, layer, segment)[:, heads]
                    beyond = (found - want).abs() > tolerance * want.abs().amax(dim=2, keepdim=True)
                    if beyond.any() if tolerance else not torch.equal(found, want):
                        raise BenchmarkError(f"layer {layer}, {segment}: the receiver's pool differs from the sender's")
                    compared += found.numel() * found.element_size()
        return compared

    def clear(self) -> None:
        """Zero the pools, so that `verify` sees only what comes afterwards."""
        for pool in self.pools:
            for layer in range(self.shape.layers):
                for segment in "kv":
                    pool.view(layer, segment).zero_()
        synchronize(self.device)


class Pair:
    """A connected sender and receiver, a process a rank, or (`together`) a process a side. Close it, or use `with`."""

    def __init__(
        self,
        shape: Shape,
        config: TransferConfig | None = None,
        environment: dict[str, str] | None = None,
        *,
        together: bool = False,
        places: Places = HERE,
    ) -> None:
        """`environment`: set in all processes. `places`: where those of the sender and of the receiver are."""
        if shape.layers < 1 or shape.tokens < 1:
            raise InputError(f"{shape.layers} layers of {shape.tokens} tokens: at least one of each")
        self.shape = shape
        self.requests = 0
        arguments = (shape, config or TransferConfig(), os.urandom(32), places)

        def children(name: str, make: Callable[..., Any], tp: int) -> list[Child]:
            ranks = [list(range(tp))] if together else [[rank] for rank in range(tp)]
            return [Child(name, make, (*arguments, held), environment) for held in ranks]

        self.senders = children("sender", _SenderSide, shape.tp[0])
        self.receivers = children("receiver", _ReceiverSide, shape.tp[1])
        try:
            for child in self.senders + self.receivers:
                child.answer()
            addresses = [address for sender in self.senders for address in sender.ask("listen")]
            ask_all(self.receivers, "connect", addresses)
        except BaseException:
            self.close()
            raise

    def send(self) -> Sent:
        """Move one whole request, pool to pool; its ticket is there before the clock starts.

        It begins with the first rank that sends and ends with the last that knows its part verified.
        """
        self.requests += 1
        request = f"bench-{self.requests}"
        ask_all(self.receivers, "receive", request)
        sent: list[Sent] = ask_all(self.senders, "run", request)
        ask_all(self.receivers, "wait")
        calls = [call for one in sent for call in one.send_layer_s]
        return Sent(min(one.began for one in sent), max(one.ended for one in sent), calls)

    def verify(self, tolerance: float = 0.0) -> int:
        """Send once more into zeroed pools and compare all of them; returns the bytes compared.

        `tolerance`: of an element, against the largest of its token and head; 0: bytes are equal.
        """
        ask_all(self.receivers, "clear")
        self.send()
        return sum(ask_all(self.receivers, "verify", tolerance))

    def path(self) -> str:
        """How payloads got there, by the senders' own count: `device`, `shm`, `stream`, or `mixed`."""
        stats = ask_all(self.senders, "stats")
        names = ("direct_frames", "device_frames", "frames")
        direct, device, frames = (sum(one[name] for one in stats) for name in names)
        if device not in (0, frames) or direct not in (0, frames):
            return "mixed"
        return "device" if device else "shm" if direct else "stream"

    def cipher(self) -> str:
        """Of what goes from the senders to the receivers; empty: it is not encrypted."""
        return str(ask_all(self.senders, "cipher")[0])

    def idle_cpu(self, seconds: float) -> list[float]:
        """Share of a core that each process uses while nothing is sent: senders, receivers."""
        before = self.cpu()
        time.sleep(seconds)
        return [(b - a) / seconds for a, b in zip(before, self.cpu(), strict=True)]

    def cpu(self) -> list[float]:
        """Processor seconds that each process has used: senders, receivers."""
        return ask_all(self.senders + self.receivers, "cpu")

    def close(self) -> None:
        """End all processes."""
        for child in self.receivers + self.senders:
            child.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def gb_s(payload_bytes: int, seconds: list[float]) -> float:
    """10^9 payload bytes a second at the median time."""
    return payload_bytes / statistics.median(seconds) / 1e9
