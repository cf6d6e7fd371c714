"""What an instance and its scheduler say to each other, in addition to the engine's own commands and reports."""

from __future__ import annotations

from typing import Literal

import msgspec

from hetkv.runtime.commands import Abort, Begin, Compute, Expect, Link, Report, Reset
from hetkv.runtime.rank import Moved

Role = Literal["prefill", "decode", "aggregated"]


class Hello(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """An instance registers."""

    name: str
    """Different from every other instance's, also from one that had its place before."""
    role: Role
    pool: str
    """Line of the plan that it belongs to."""
    gpu: str
    device: str
    """What its ranks run on."""
    model: str
    fingerprint: dict[str, str]
    addresses: tuple[str, ...]
    """Where its ranks listen for those that its KV goes to, in order of rank."""
    blocks: int
    block_size: int
    token_bytes: float
    """KV of one token in its pool, all ranks together."""
    unit: int
    """Tokens of a prefix that its cache can share; 0: none."""
    max_num_seqs: int
    max_context: int
    vocabulary: int
    weight: float = 1.0
    kv: str = ""
    """Its pool, for people."""
    tp: int = 1
    pp: int = 1


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """The instance is known; it gets requests once it is linked to those of the other role."""


class Rejected(msgspec.Struct, frozen=True, tag=True):
    """The instance does not fit here. It should end."""

    reason: str


class Leaving(msgspec.Struct, frozen=True, tag=True):
    """The instance takes no new requests, and asks for `Goodbye` once those that are there have ended."""


class Goodbye(msgspec.Struct, frozen=True, tag=True):
    """The instance may end."""


class Beat(msgspec.Struct, frozen=True, tag=True):
    """The instance's process is alive, whatever its engine is computing."""


class Trace(msgspec.Struct, frozen=True, tag=True):
    """What the transport did since the last one."""

    moved: list[Moved]
    clock_ns: int
    """CLOCK_REALTIME minus CLOCK_MONOTONIC of the instance's host."""


ToInstance = Welcome | Rejected | Goodbye | Compute | Expect | Begin | Abort | Link | Reset
ToScheduler = Hello | Report | Beat | Leaving | Trace
