"""What two ranks tell each other after authentication: `Description`, and the few other control messages."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from hetkv.control.handshake import MOST_STREAMS, Role
from hetkv.control.local import is_local_name
from hetkv.control.payloads import Later
from hetkv.errors import InputError, MessageError
from hetkv.kv.layout import KVLayout
from hetkv.kv.reshard import check_shard
from hetkv.kv.spec import KVSpec, Shard

MAX_TEXT = 512
MAX_NAME, MAX_FINGERPRINTS = 64, 32
MAX_WORKER_ADDRESS_BYTES = 64 * 1024
MAX_SOCKETS = 4
MAX_CIPHERS = 8
CIPHERS_SINCE = 5
"""Minor version from which streams may be encrypted."""
MAX_ENGINE_BYTES = 16
MAX_CODECS = 16


class _Memory(Protocol):
    @property
    def layout(self) -> KVLayout: ...
    @property
    def num_blocks(self) -> int: ...


class LayerGroup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Layers of one rank with the same layout and block count."""

    layers: tuple[int, ...]
    """Global layer indices, rising."""
    num_blocks: int
    layout: KVLayout


def group_layers(layers: Mapping[int, _Memory]) -> tuple[LayerGroup, ...]:
    """Groups of `KVPool.layers`, so that equal layers are sent once."""
    groups: list[tuple[KVLayout, int, list[int]]] = []
    for index in sorted(layers):
        layout, num_blocks = layers[index].layout, layers[index].num_blocks
        for known, blocks, members in groups:
            if blocks == num_blocks and known == layout:
                members.append(index)
                break
        else:
            groups.append((layout, num_blocks, [index]))
    return tuple(LayerGroup(tuple(members), blocks, layout) for layout, blocks, members in groups)


class Description(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag="description", kw_only=True
):
    """One rank, as its peer needs to know it. Checked when made and when received: `InputError` names the field."""

    role: Role
    instance: str
    """Name of the engine instance, for people."""
    pid: int
    host: str
    """Equal on both sides where they run on one host: see `host_id`."""
    spec: KVSpec
    shard: Shard
    layers: tuple[LayerGroup, ...]
    slot_bytes: int
    """Receiver: bytes of one window slot. Sender: 0."""
    heartbeat_interval_ms: int
    heartbeat_timeout_ms: int
    """This side gives the peer up after so long without a heartbeat."""
    lease_ms: int
    """Receiver: lease of a ticket. Sender: longest lease that it accepts to wait for."""
    rank: int = 0
    """Index of this rank in `instance_shards`."""
    instance_shards: tuple[Shard, ...] = ()
    """Shards of all ranks of the instance, so that one peer can compute all routes; empty: this rank is alone."""
    device: str = "cpu"
    """Where the pool is: `cpu`, or the backend of its GPU. From minor 1 on."""
    fingerprint: dict[str, str] = {}
    """What made the KV, as values that must be equal where both sides name them: weights, vocabulary, rope, ... From
    minor 2 on."""
    codecs: tuple[str, ...] = ()
    """Codecs that this side takes part in on links whose payloads are sent over a network; one that the peer does not
    name, or that this side does not know, is not used. From minor 5 on."""
    engine: bytes = b""
    """Random number of this engine: a peer of the same name and another number is another one."""
    worker_address: bytes = b""
    """UCX worker address for RDMA; empty: this side does none."""
    ciphers: tuple[str, ...] = ()
    """Ciphers that this side has for streams, best first. From minor 5 on."""
    encrypt: bool = False
    """This side asks for streams that leave the host to be encrypted. From minor 5 on."""
    sockets: tuple[str, ...] = ()
    """Listening side: unix sockets at which it takes streams, in addition to its port."""

    def __post_init__(self) -> None:
        if not 0 < len(self.instance) <= MAX_TEXT or not 0 < len(self.host) <= MAX_TEXT:
            raise InputError(f"instance and host are names of 1 to {MAX_TEXT} characters")
        if len(self.codecs) > MAX_CODECS or not all(0 < len(name) <= MAX_NAME for name in self.codecs):
            raise InputError(f"codecs are up to {MAX_CODECS} names of 1 to {MAX_NAME} characters")
        if len(self.engine) > MAX_ENGINE_BYTES:
            raise InputError(f"engine has {len(self.engine)} bytes, over {MAX_ENGINE_BYTES}")
        if len(self.worker_address) > MAX_WORKER_ADDRESS_BYTES:
            raise InputError(f"worker_address has {len(self.worker_address)} bytes, over {MAX_WORKER_ADDRESS_BYTES}")
        if len(self.sockets) > MAX_SOCKETS or not all(map(is_local_name, self.sockets)):
            raise InputError(f"sockets are {self.sockets}: up to {MAX_SOCKETS} names of hetkv's unix sockets")
        if not 0 < len(self.device) <= MAX_TEXT:
            raise InputError(f"device is a name of 1 to {MAX_TEXT} characters")
        if len(self.fingerprint) > MAX_FINGERPRINTS:
            raise InputError(f"fingerprint has {len(self.fingerprint)} entries, over {MAX_FINGERPRINTS}")
        for name, value in self.fingerprint.items():
            if not 0 < len(name) <= MAX_NAME or not 0 < len(value) <= MAX_TEXT:
                raise InputError(
                    f"fingerprint[{name[:MAX_NAME]!r}]: names have 1 to {MAX_NAME} characters, values 1 to {MAX_TEXT}"
                )
        if len(self.ciphers) > MAX_CIPHERS or not all(0 < len(name) <= MAX_NAME for name in self.ciphers):
            raise InputError(f"ciphers are at most {MAX_CIPHERS} names of 1 to {MAX_NAME} characters")
        for field in ("heartbeat_interval_ms", "heartbeat_timeout_ms", "lease_ms"):
            if getattr(self, field) < 1:
                raise InputError(f"{field} is {getattr(self, field)}, must be at least 1")
        for field in ("pid", "slot_bytes", "rank"):
            if getattr(self, field) < 0:
                raise InputError(f"{field} is {getattr(self, field)}, must not be negative")
        shards = self.shards
        if self.rank >= len(shards) or shards[self.rank] != self.shard:
            raise InputError(f"shard is not that of rank {self.rank} in instance_shards, which has {len(shards)}")
        for index, shard in enumerate(shards):
            check_shard(self.spec, shard, f"instance_shards[{index}]" if self.instance_shards else "shard")
        self._check_layers()

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Shards of the whole instance, by rank."""
        return self.instance_shards or (self.shard,)

    def layout(self, layer: int) -> KVLayout:
        """Layout of a global layer that this rank holds; `KeyError` otherwise."""
        for group in self.layers:
            if layer in group.layers:
                return group.layout
        raise KeyError(layer)

    def _check_layers(self) -> None:
        owned = [index for index in range(*self.shard.layers) if self.spec.layers[index].shares is None]
        given = sorted(index for group in self.layers for index in group.layers)
        if given != owned:
            raise InputError(f"layers are {given}, the shard has {owned}")
        for group in self.layers:
            if group.num_blocks < 1:
                raise InputError(f"layers[{group.layers[0]}].num_blocks is {group.num_blocks}")
            for index in group.layers:
                self._check_layout(index, group.layout)

    def _check_layout(self, index: int, layout: KVLayout) -> None:
        layout.check_fits(self.spec.layers[index], self.shard.heads[index].size, f"layers[{index}]")
        for name, part in layout.segments.items():
            scales = len(part.scale.values) if part.scale is not None else 0
            if scales not in (0, 1, part.heads):
                raise InputError(f"layers[{index}].{name}.scale has {scales} values for {part.heads} heads")


class Accept(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="accept"):
    """The peer's description fits."""


class Rejection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="refusal"):
    """The peer's description does not fit; values as the side that rejects sees them."""

    field: str
    mine: str
    theirs: str
    why: str = ""


class Ready(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="ready"):
    """The data plane has the keys of this connection: messages of the link may come from now on."""


class Streaming(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="streaming"):
    """The connecting side has dialled so many streams, all of this kind."""

    kind: Literal["unix", "tcp"]
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MOST_STREAMS:
            raise InputError(f"{self.count} streams: 1 to {MOST_STREAMS}")


class Bye(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="bye"):
    """Orderly end; the last message of its direction."""

    reason: str = ""


Message = Description | Accept | Rejection | Streaming | Ready | Bye | Later

_decoder = msgspec.msgpack.Decoder(Message)
_encoder = msgspec.msgpack.Encoder()


def for_minor(description: Description, minor: int) -> Description:
    """The description without what a reader of an older minor version would reject."""
    if minor < CIPHERS_SINCE:
        description = msgspec.structs.replace(description, ciphers=(), encrypt=False, codecs=())
    if minor < 2:
        description = msgspec.structs.replace(description, fingerprint={})
    return description if minor >= 1 else msgspec.structs.replace(description, device="cpu")


def encode(message: Message) -> bytes:
    """Msgpack of one message, its type under the key `type`."""
    return _encoder.encode(message)


def decode(payload: bytes, peer: str) -> Message:
    """One message; `MessageError` on an unknown type, an unknown or missing field, or a value that cannot be."""
    try:
        message: Message = _decoder.decode(payload)
        return message
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
        raise MessageError(f"{peer}: control message is malformed: {error}") from None


def same_kernel(a: str, b: str) -> bool:
    """Whether two values of `host` are of processes under one kernel, in containers of other names perhaps."""
    return a.partition("/")[0] == b.partition("/")[0]


def host_id() -> str:
    """Boot id and host name: equal for processes that share one running kernel and its host name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = f"{uuid.getnode():012x}"
    return f"{boot}/{socket.gethostname()}"[:MAX_TEXT]
