"""What the scheduler side tells the workers, and what a worker reports to the scheduler side at start."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

Blocks = tuple[list[int], ...]
"""Block ids of one request in token order, a list for each cache group that takes part in transfers."""


@dataclass(frozen=True)
class Send:
    """A producer's request: tokens `[0, stop)` of it are, or will be after this step, in `blocks`."""

    request_id: str
    name: str
    """Of the sequence on the wire: `Sequence.name`."""
    content: bytes
    num_tokens: int
    """Tokens of the whole prompt."""
    stop: int
    blocks: Blocks
    priority: int = 0
    """Of 32 bits: lower ones leave first."""
    payload: bytes | None = None
    """What crosses with it: in the request's first order, and in the first one after its preemption."""


@dataclass(frozen=True)
class Load:
    """A consumer's request: tokens `[cached, stop)` are asked for; none where the producer is only let go."""

    request_id: str
    name: str
    """Of the sequence on the wire: `Sequence.name`."""
    content: bytes
    source: str
    """Engine id of the producer."""
    addresses: tuple[str, ...]
    """Where the producer's ranks listen, by rank."""
    cached: int
    stop: int
    blocks: Blocks
    wants_payload: bool = False

    @property
    def awaited(self) -> bool:
        """There are blocks to fill, and the scheduler waits for it."""
        return self.cached < self.stop

    @property
    def let_go(self) -> Load:
        """The same, asking for nothing."""
        return replace(self, cached=self.stop, blocks=tuple([] for _ in self.blocks), wants_payload=False)


@dataclass
class Metadata(KVConnectorMetadata):
    """One step's orders."""

    computing: list[Send] = field(default_factory=list)
    """Mode `concurrent`: requests whose layers leave while this step computes them."""
    preempted: set[str] = field(default_factory=set)
    """Of those, the ones whose blocks are taken away in this step."""
    held: list[Send] = field(default_factory=list)
    """Requests whose prefill is done: their blocks are held until sent."""
    dropped: set[str] = field(default_factory=set)
    """Requests that ended otherwise while their layers were leaving: blocks are held until nothing reads them."""
    rejected: list[str] = field(default_factory=list)
    """Mode `concurrent`: names of sequences that ended before anything of them was computed."""
    loads: list[Load] = field(default_factory=list)
    aborted_loads: set[str] = field(default_factory=set)
    computes: bool = False
    """This step runs the model."""

    @property
    def any_orders(self) -> bool:
        """Whether the workers have something to do but compute."""
        sends = self.computing or self.preempted or self.held or self.dropped or self.rejected
        return bool(sends or self.loads or self.aborted_loads)


@dataclass(frozen=True)
class WorkerAddress(KVConnectorHandshakeMetadata):
    """Where a producer's worker listens; empty for a consumer's."""

    address: str


@dataclass
class Reported(KVConnectorWorkerMetadata):
    """What a step's workers report to the scheduler side."""

    repeated: set[str]
    """Loads for which a rank asked the producer once more."""
    payloads: dict[str, bytes]
    """What came with requests."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Reported:
        assert isinstance(other, Reported)
        return Reported(self.repeated | other.repeated, self.payloads | other.payloads)
