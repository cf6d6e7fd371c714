"""Two processes that move the requests of one case of `hetkv bench traffic`, and compare every byte."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from hetkv.bench.child import REPLY_S, Child, ask_all
from hetkv.bench.pair import synchronize, use_device
from hetkv.errors import BenchmarkError
from hetkv.transport.config import TransferConfig

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from hetkv.bench.traffic_cases import Case
    from hetkv.kv.pool import KVPool

LAYOUTS = (("nhd", 16), ("hnd", 64))
TICKETS_S = 0.004
"""Time for the tickets to reach the sender before the clock starts."""
SPIN_US = 50_000
"""Of both sides in latency rows: threads still spin when the clock starts."""


class Moved(NamedTuple):
    """One repetition. Times in seconds since the first call that hands layers over."""

    visible: list[float]
    """When the receiver's caller knew each request complete, in the order of their ends."""
    acked: float
    """When the sender's caller knew all of them complete."""
    calls: list[float]
    """How long each call of the batch took."""
    ends: dict[int, float]
    """`visible` by request."""
    starts: list[float]
    """When each call was made."""


def make_pool(case: Case, side: int, device: str) -> tuple[KVPool, list[list[int]]]:
    """A side's pool, which the requests fill, and each one's block ids in shuffled order."""
    import torch

    from hetkv.kv.pool import KVPool

    layout, size = LAYOUTS[side] if case.heads else ("latent", LAYOUTS[side][1])
    counts = [-(-case.tokens_of(request) // size) for request in range(case.requests)]
    pool = KVPool.allocate(case.spec, sum(counts), layout=layout, block_size=size, dtype=case.dtype, device=device)
    order = iter(torch.randperm(sum(counts), generator=torch.Generator().manual_seed(side)).tolist())
    return pool, [[next(order) for _ in range(count)] for count in counts]


def pattern(tokens: int, heads: int, row: int, device: Any) -> torch.Tensor:
    """Bytes `[token, head, byte]` below 113: another row for each of 113 tokens in sequence."""
    import torch

    token = torch.arange(tokens, dtype=torch.int32, device=device).reshape(-1, 1, 1) * 13
    byte = torch.arange(heads * row, dtype=torch.int32, device=device).reshape(1, heads, row) * 3
    return ((token + byte) % 113).to(torch.uint8)


class _Side:
    """One rank's pool and node."""

    def __init__(self, kind: type[Any], side: int, case: Case, device: str, config: TransferConfig, secret: bytes):
        self.case, self.device = case, use_device(device)
        self.pool, self.blocks = make_pool(case, side, device)
        self.node = kind(self.pool, secret=secret, instance=f"traffic-{kind.role}", config=config)
        self.handles: list[Any] = []

    def parts(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """For each segment of each layer and request: the request, the pool's bytes `[block, token, head, byte]`, the
        request's block ids, and the bytes that its tokens have, blocks filled up."""
        import torch

        made: dict[tuple[int, int, int], torch.Tensor] = {}
        for layer, kind in enumerate(self.pool.spec.layers):
            for number, segment in enumerate(kind.segments):
                view = self.pool.view(layer, segment.name).view(torch.uint8)
                ids = [torch.tensor(blocks, device=view.device) for blocks in self.blocks]
                for request, blocks in enumerate(ids):
                    shape = (len(blocks) * view.shape[1], view.shape[2], view.shape[3])
                    if shape not in made:
                        made[shape] = pattern(*shape, view.device)
                    yield request, view, blocks, (made[shape] + (layer * 31 + request * 7 + number * 17) % 113) % 113

    def stats(self) -> dict[str, int]:
        counters: dict[str, int] = self.node.stats()
        return counters

    def cpu(self) -> tuple[float, float]:
        """Processor seconds of this process, and of the thread that calls hetkv."""
        return time.process_time(), time.thread_time()

    def close(self) -> None:
        self.node.close()


class _SenderSide(_Side):
    def __init__(self, *arguments: Any) -> None:
        from hetkv.transport.sender import Sender

        super().__init__(Sender, 0, *arguments)
        for _, view, blocks, rows in self.parts():
            view[blocks] = rows.reshape(len(blocks), *view.shape[1:])
        synchronize(self.device)

    def listen(self) -> str:
        address: str = self.node.listen()
        return address

    def run(self, name: str, kind: str) -> tuple[float, float, list[float], list[float]]:
        """Send the requests; when it began, when all were acknowledged, when each call was made, how long it took."""
        case = self.case
        handles = [self.node.send(f"{name}-{i}", ids, case.tokens_of(i)) for i, ids in enumerate(self.blocks)]
        batch = self.node.batch(handles)
        calls: list[Callable[[], None]] = [batch.send_layers]
        if kind == "layers":
            calls = [partial(batch.send_layer, layer) for layer in range(case.layers)]
        elif kind == "order":
            calls = [handle.send_layers for handle in handles]
        times = []
        spare = (os.cpu_count() or 1) >= 4
        rest = time.monotonic() + TICKETS_S
        if kind != "latency" or not spare:
            time.sleep(TICKETS_S)
        while time.monotonic() < rest:  # a core that has slept is slow at first
            pass
        began = time.monotonic()
        for call in calls:
            times.append(time.monotonic())
            call()
        times.append(time.monotonic())
        if kind == "latency" and not spare:
            time.sleep(0.002)  # leave the cores to the threads that are measured
        for handle in handles:
            handle.wait(REPLY_S / 2)
        starts = [at - began for at in times]
        return began, time.monotonic(), starts[:-1], [b - a for a, b in itertools.pairwise(starts)]


class _ReceiverSide(_Side):
    def __init__(self, *arguments: Any) -> None:
        from hetkv.transport.receiver import Receiver

        super().__init__(Receiver, 1, *arguments)

    def connect(self, address: str) -> None:
        self.node.connect(address)

    def receive(self, name: str) -> None:
        self.handles = [
            self.node.receive(f"{name}-{i}", ids, self.case.tokens_of(i)) for i, ids in enumerate(self.blocks)
        ]

    def wait(self, kind: str) -> list[tuple[str, float]]:
        """Each request and when it was seen complete."""
        if kind != "order":
            for handle in self.handles:
                handle.wait(REPLY_S / 2)
            now = time.monotonic()
            self.node.poll()
            return [(handle.request_id, now) for handle in self.handles]
        ended: list[tuple[str, float]] = []
        limit = time.monotonic() + REPLY_S / 2
        while len(ended) < len(self.handles):
            found = self.node.poll()
            now = time.monotonic()
            for handle in found:
                handle.wait(0)
            ended += [(handle.request_id, now) for handle in found]
            if now > limit:
                raise BenchmarkError(f"{len(self.handles) - len(ended)} requests did not end")
            time.sleep(0 if found else 20e-6)
        return ended

    def clear(self) -> None:
        for layer, kind in enumerate(self.pool.spec.layers):
            for segment in kind.segments:
                self.pool.view(layer, segment.name).zero_()
        synchronize(self.device)

    def wrong_bytes(self) -> int:
        """Bytes of the requests that are not what the sender's pool holds."""
        wrong = 0
        for request, view, blocks, rows in self.parts():
            found = view[blocks].reshape(rows.shape)
            wrong += int((found != rows)[: self.case.tokens_of(request)].sum())
        return wrong


class TrafficPair:
    """A sender and a receiver of one case, connected. Close it, or use `with`."""

    def __init__(self, case: Case, devices: tuple[str, str], settings: dict[str, Any] | None = None) -> None:
        self.case, self.round = case, 0
        config, secret = TransferConfig(**(settings or {})), os.urandom(32)
        self.sender = Child("sender", _SenderSide, (case, devices[0], config, secret))
        self.receiver = Child("receiver", _ReceiverSide, (case, devices[1], config, secret))
        try:
            self.sender.answer()
            self.receiver.answer()
            self.receiver.ask("connect", self.sender.ask("listen"))
        except BaseException:
            self.close()
            raise

    def move(self, kind: str) -> Moved:
        """All requests once."""
        self.round += 1
        name = f"r{self.round}"
        self.receiver.ask("receive", name)
        self.receiver.pipe.send(("wait", kind))
        began, acked, starts, calls = self.sender.ask("run", name, kind)
        ended = [(int(request.rpartition("-")[2]), at - began) for request, at in self.receiver.answer()]
        return Moved([at for _, at in ended], acked - began, calls, dict(ended), starts)

    def verify(self, kind: str = "ready") -> int:
        """Bytes that are wrong after one more repetition into cleared memory."""
        self.receiver.ask("clear")
        self.move(kind)
        wrong: int = self.receiver.ask("wrong_bytes")
        return wrong

    def stats(self) -> tuple[dict[str, int], dict[str, int]]:
        """Counters of the sender and the receiver."""
        sender, receiver = ask_all([self.sender, self.receiver], "stats")
        return sender, receiver

    def cpu(self) -> list[tuple[float, float]]:
        """Processor seconds of sender and receiver: process, calling thread."""
        return ask_all([self.sender, self.receiver], "cpu")

    def close(self) -> None:
        self.receiver.close()
        self.sender.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def measure(
    case: Case, kinds: Sequence[str], devices: tuple[str, str], settings: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """A row for each kind: medians over the case's repetitions, after three that warm up, and the bytes that were
    wrong."""
    settings = {**({"spin_us": SPIN_US} if "latency" in kinds else {}), **(settings or {})}
    with TrafficPair(case, devices, settings) as pair:
        return [_row(pair, kind) for kind in kinds]


def _row(pair: TrafficPair, kind: str) -> dict[str, Any]:
    case = pair.case
    for _ in range(3):
        pair.move(kind)
    before, cpu = pair.stats(), pair.cpu()
    moved = [pair.move(kind) for _ in range(case.reps)]
    after, later = pair.stats(), pair.cpu()
    visible = sorted(max(one.visible) for one in moved)
    middle = statistics.median(visible)
    frames, bundles = (after[0][name] - before[0][name] for name in ("frames", "bundles"))
    per = 1e6 / (case.reps * case.requests)
    order = {
        "mean_of_ends_over_last": round(
            statistics.median(statistics.mean(at.visible) / max(at.visible) for at in moved), 3
        ),
        "last_call_us": round(1e6 * statistics.median(at.ends[case.requests - 1] - at.starts[-1] for at in moved), 1),
    }
    return {
        **case._asdict(),
        "kinds": list(case.kinds),
        "kind": kind,
        "layer_bytes": case.layer_bytes,
        "bytes": case.payload_bytes,
        "wrong_bytes": pair.verify(kind),
        "visible_us": round(middle * 1e6, 1),
        "visible_us_least": round(visible[0] * 1e6, 1),
        "acked_us": round(statistics.median(one.acked for one in moved) * 1e6, 1),
        "gb_s": round(case.payload_bytes / middle / 1e9, 3),
        "call_us": round(statistics.median(call for one in moved for call in one.calls) * 1e6, 2),
        **(order if kind == "order" else {}),
        "requests_per_s": round(case.requests / middle, 1),
        "frames_per_bundle": round(frames / max(1, bundles), 1),
        "cpu_us_per_request": {
            f"{side} {part}": round(per * value, 1)
            for side, a, b in zip(("sender", "receiver"), cpu, later, strict=True)
            for part, value in (("caller", b[1] - a[1]), ("engine", (b[0] - a[0]) - (b[1] - a[1])))
        },
        "counters": [
            {name: b[name] - a[name] for name in b if b[name] != a[name]} for a, b in zip(before, after, strict=True)
        ],
    }
