"""One rank of a serving instance: `Rank`, a part of the model, its pool, and both ends of the transport over it.

It decides nothing: the instance's `Engine` says what to compute, to announce and to receive, as an `Order`, and every
rank of the instance gets the same orders. Ends of transfers are reported as events, in a thread of the transport.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any

import msgspec
import torch

from hetkv.control.secret import SecretFile
from hetkv.control.tls import TlsConfig
from hetkv.errors import HetkvError, InputError
from hetkv.kv.dtypes import DType
from hetkv.kv.pool import KVPool
from hetkv.models import ModelConfig
from hetkv.runtime.batch import Span
from hetkv.runtime.model import Decoder
from hetkv.runtime.paged import Pages
from hetkv.runtime.parallel_group import ParallelGroup
from hetkv.runtime.plan import InstancePlan
from hetkv.runtime.sampling import Draw, Token, sample
from hetkv.runtime.synthetic import random_decoder
from hetkv.runtime.timeline import engine_spans
from hetkv.transport.config import TransferConfig
from hetkv.transport.exchange import Exchange
from hetkv.transport.handle import Handle
from hetkv.transport.instance import Instance
from hetkv.transport.receiver import RecvHandle
from hetkv.transport.sender import SendHandle

PATIENCE_S = 24 * 3600.0
"""Lease and hold of a transfer: the scheduler sees the instances, and gives transfers up where one is gone."""
MOST_NAMES = 4096
"""Transfers whose names are kept for their trace."""
CPU_POOL_BYTES = 256 << 20
"""KV memory of a rank on a host whose size nobody gave."""


class RankConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank is started with."""

    plan: InstancePlan
    rank: int = 0
    meeting: str = ""
    """Where the ranks of the instance meet: see `ParallelGroup.join`."""
    model: str | ModelConfig
    """Checkpoint directory, or the shape of a model of one rank with random weights."""
    compute_dtype: str = "float32"
    kv_tokens: int | None = None
    """Tokens that the pool holds; `None`: what fits, see `Rank.fitting_blocks`."""
    memory_share: float = 0.9
    """Part of a GPU's memory that weights and pool may take together."""
    step_tokens: int = 8192
    """Most tokens of a step: their activations need room, too."""
    threads: int = 1
    secret: bytes | SecretFile
    tls: TlsConfig | None = None
    host: str = "127.0.0.1"
    """Where it listens for instances that its KV goes to, as they reach it."""
    transfer: TransferConfig = TransferConfig(lease_s=PATIENCE_S, hold_s=PATIENCE_S)
    fingerprint: dict[str, str] = {}
    trace: bool = False
    """Record when which layer of which transfer moved: see `Rank.trace`."""

    @property
    def name(self) -> str:
        """`instance/rank`, as in the transport's messages."""
        return f"{self.plan.name}/{self.rank}"


class Facts(msgspec.Struct, frozen=True):
    """What a rank says of itself once it is up."""

    address: str
    blocks: int
    token_bytes: float
    """KV of one token in this rank's pool."""
    device: str


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """Tokens of one sequence, to be computed in this step."""

    id: str
    start: int
    tokens: list[int]
    blocks: list[int]
    """All blocks of a sequence that is `fresh` on the rank, those that are new of any other."""
    fresh: bool
    draw: Draw | None = None
    """How to choose its next token, where these tokens are the last ones."""
    transfer: str = ""
    """Name of the transfer that its KV belongs to."""


class Announce(msgspec.Struct, frozen=True, array_like=True):
    """A transfer begins: KV in these blocks will be sent, layer by layer, as it is computed."""

    transfer: str
    blocks: list[int]
    tokens: int
    content: bytes


class Receive(msgspec.Struct, frozen=True, array_like=True):
    """A transfer may come: its KV goes into these blocks, whose first `cached` tokens are there already."""

    transfer: str
    source: str
    blocks: list[int]
    tokens: int
    cached: int
    content: bytes


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """One step of an instance. An empty one does nothing."""

    forget: list[str] = []
    """Sequences that have left."""
    announce: list[Announce] = []
    receive: list[Receive] = []
    abort: dict[str, str] = {}
    """Transfers to give up, and why."""
    pieces: list[Piece] = []


class Event(msgspec.Struct, frozen=True, array_like=True):
    """What became of a transfer on a rank."""

    kind: str
    """`packed`: its blocks are not read any more; `sent`, `received`: it has ended."""
    transfer: str
    error: str = ""


class Moved(msgspec.Struct, frozen=True, array_like=True):
    """One layer's pack, wire or unpack of one transfer, as the transport recorded it. Times are CLOCK_MONOTONIC."""

    kind: str
    transfer: str
    layer: int
    start_ns: int
    stop_ns: int
    num_bytes: int


class Rank:
    """See the module. `on_event` is called in a thread of the transport, and must return at once."""

    def __init__(self, config: RankConfig, on_event: Callable[[Event], None]) -> None:
        torch.set_num_threads(config.threads)
        self.config, plan = config, config.plan
        self._on_event = on_event
        self._stack = ExitStack()
        self.device = plan.rank_device(config.rank)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        group = ParallelGroup.join(config.meeting, plan.tp, plan.pp, config.rank, self.device)
        self._stack.callback(group.leave)
        dtype = DType.parse(config.compute_dtype).torch
        if isinstance(config.model, ModelConfig):
            self.model = random_decoder(config.model, dtype, self.device)
        else:
            self.model = Decoder.load(config.model, dtype, self.device, group=group, stages=plan.stages)
        pool = plan.pool
        kinds = {"layout": pool.layout, "block_size": pool.block_size, "dtype": pool.dtype, "shard": self.model.shard}
        one = KVPool.allocate(self.model.kv_spec, 1, **kinds)  # type: ignore[arg-type]
        block_bytes = sum(tensor.nbytes for at in one.layers.values() for tensor in at.tensors.values())
        self.blocks = self.fitting_blocks(block_bytes)
        if self.blocks < 1:
            raise InputError(f"{config.name}: no room for a block of {block_bytes} bytes after the weights")
        self.pool = KVPool.allocate(self.model.kv_spec, self.blocks, device=self.device, **kinds)  # type: ignore[arg-type]
        self.token_bytes = block_bytes / pool.block_size
        self.exchange = self._stack.enter_context(
            Exchange(
                self.pool,
                secret=config.secret,
                tls=config.tls,
                instance=plan.name,
                rank=config.rank,
                instance_shards=plan.shards(self.model.config),
                config=msgspec.structs.replace(config.transfer, trace=config.trace),
                fingerprint=config.fingerprint,
            )
        )
        self.address = self.exchange.sender.listen(f"{config.host}:0")
        self._names: tuple[OrderedDict[int, str], OrderedDict[int, str]] = OrderedDict(), OrderedDict()
        self._pages: dict[str, Pages] = {}
        self._sending: dict[str, SendHandle] = {}
        self._receiving: dict[str, RecvHandle] = {}

    def fitting_blocks(self, block_bytes: int) -> int:
        """Blocks of the pool: for `kv_tokens`, else what the device's memory has left, else `CPU_POOL_BYTES`."""
        if self.config.kv_tokens is not None:
            return self.config.kv_tokens // self.config.plan.pool.block_size
        if self.device.type != "cuda":
            return CPU_POOL_BYTES // block_bytes
        model = self.model.config
        # The widest tensors of a step: hidden states, the MLP's inner ones, and logits in fp32 for sampling.
        wide = (
            self.config.step_tokens * (4 * model.hidden_size + 3 * model.intermediate_size) * self.model.dtype.itemsize
        )
        free, total = torch.cuda.mem_get_info(self.device)
        room = free - (1 - self.config.memory_share) * total - wide
        return int(room // block_bytes)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """End tokens of the checkpoint."""
        return self.model.config.eos_ids

    def facts(self) -> Facts:
        """See `Facts`."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return Facts(self.address, self.blocks, self.token_bytes, name)

    def close(self) -> None:
        """End all transfers, then leave the group."""
        self._stack.close()

    def link(self, source: Instance) -> None:
        """Link to an instance that KV may come from. Raises what `Node.connect` does."""
        self.exchange.receiver.connect(source)

    def work(self, order: Order) -> list[Token]:
        """Do an order; the chosen tokens, one for each piece with a `draw`, on the rank that has the logits."""
        for name in order.forget:
            self._pages.pop(name, None)
        for transfer, reason in order.abort.items():
            handle = self._sending.get(transfer) or self._receiving.get(transfer)
            if handle is not None:
                handle.abort(reason)
        for begin in order.announce:
            self._announce(begin)
        for ticket in order.receive:
            self._receive(ticket)
        return self._compute(order.pieces) if order.pieces else []

    def _announce(self, begin: Announce) -> None:
        groups = [begin.blocks] * self.pool.spec.num_groups
        sending = self.exchange.sender.send(begin.transfer, groups, begin.tokens, content=begin.content)
        self._sending[begin.transfer] = sending
        self._remember(0, sending, begin.transfer)
        sending.packed.add_done_callback(lambda done: self._tell("packed", begin.transfer, done))
        sending.future.add_done_callback(lambda done: self._ended(self._sending, "sent", begin.transfer, done))

    def _receive(self, ticket: Receive) -> None:
        try:
            receiving = self.exchange.receiver.receive(
                ticket.transfer,
                [ticket.blocks] * self.pool.spec.num_groups,
                ticket.tokens,
                num_cached_tokens=ticket.cached,
                src_instance=ticket.source,
                content=ticket.content,
            )
        except HetkvError as error:  # the source has gone
            self._on_event(Event("received", ticket.transfer, f"{type(error).__name__}: {error}"))
            return
        self._receiving[ticket.transfer] = receiving
        self._remember(1, receiving, ticket.transfer)
        receiving.future.add_done_callback(lambda done: self._ended(self._receiving, "received", ticket.transfer, done))

    def _remember(self, end: int, handle: Handle, transfer: str) -> None:
        names = self._names[end]
        if self.config.trace:
            names[handle.handle] = transfer
            if len(names) > MOST_NAMES:
                names.popitem(last=False)

    def trace(self) -> list[Moved]:
        """What the transport did since the last call, where the configuration says `trace`. Any thread may call it."""
        found = []
        engines: list[Any] = [self.exchange.sender.engine, self.exchange.receiver.engine]
        for names, engine in zip(self._names, engines, strict=True):
            spans = engine.take_trace()
            for span, (_, handle, *_) in zip(engine_spans(spans), spans, strict=True):
                found.append(
                    Moved(span.row, names.get(handle, ""), span.layer, span.start_ns, span.stop_ns, span.num_bytes)
                )
        return found

    def _ended(self, table: dict[str, Any], kind: str, transfer: str, done: Future[None]) -> None:
        table.pop(transfer, None)
        self._tell(kind, transfer, done)

    def _tell(self, kind: str, transfer: str, done: Future[None]) -> None:
        error = done.exception()
        self._on_event(Event(kind, transfer, "" if error is None else f"{type(error).__name__}: {error}"))

    def _compute(self, pieces: list[Piece]) -> list[Token]:
        groups = self.pool.spec.num_groups
        spans = []
        for piece in pieces:
            pages = self._pages.get(piece.id)
            if pages is None or piece.fresh:
                pages = self._pages[piece.id] = Pages(self.pool, [piece.blocks] * groups)
            elif piece.blocks:
                pages.extend([piece.blocks] * groups)
            spans.append(Span(pages, piece.start, piece.tokens))
        moving = [(self._sending.get(piece.transfer), piece) for piece in pieces if piece.transfer]
        # What a prefix cache held is sent with the first chunk, whose layers follow it.
        parts = [
            (tx, (0 if piece.fresh else piece.start, piece.start + len(piece.tokens))) for tx, piece in moving if tx
        ]
        send = self.exchange.sender.batch(parts).send_layer if parts else None
        with torch.inference_mode():
            logits = self.model.forward(spans, send)
            draws = [(row, piece.draw) for row, piece in enumerate(pieces) if piece.draw is not None]
            if logits is None or not draws or self.model.part.tp_rank > 0:
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)  # blocks that are free by the next order are not read any more
                return []
            rows = [row for row, _ in draws]
            return sample(logits if len(rows) == len(spans) else logits[rows], [draw for _, draw in draws])
