"""Settings of a `Sender` or `Receiver`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from hetkv.control.handshake import MOST_STREAMS
from hetkv.errors import InputError
from hetkv.transport import device

if TYPE_CHECKING:
    import hetkv._core as _core

MIB = 1 << 20
DEVICE_SLOT, DEVICE_SLOTS = 16 * MIB, 16
MAX_SECONDS = 1e6


class TransferConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How KV is moved. The defaults suit one host; nothing here but `codec` changes what arrives."""

    slot_bytes: int | None = None
    """Bytes of one window slot and of one staging buffer: the largest payload of a frame. Default: 1 MiB, and 16 MiB
    where the pool is on a device, so that a layer is one frame."""
    window_bytes: int | None = None
    """Receiver: memory of all its slots together, for any number of senders. Default: see `default_window`, and
    16 slots where the pool is on a device."""
    verify: Literal["payload", "pool"] = "payload"
    """Receiver: what is compared before a layer counts as complete. `payload`: the bytes that were unpacked with what
    the sender packed. `pool`: also what the pool holds then, read again, so that an unpack that went wrong, or another
    writer, is seen (`PoolChecksumError`). It takes scratch memory of one to five slots."""
    isolate_peers: bool = False
    """Receiver: a slot that goes from one peer to another gets new memory, so that a peer which breaks the rules and
    keeps to its mapping or key reads and spoils nothing of others. Costs an allocation each time, and up to
    `window_bytes` of shared memory for each peer of this host; slots are in host memory."""
    window: Literal["auto", "host", "device"] = "auto"
    """Receiver with a pool on a device: where slots are. `auto`: in the device's memory for peers that can store into
    it (same host, same vendor), in pinned host memory for all others."""
    staging_slots: int | None = None
    """Sender: staging buffers, used where a peer's window cannot be stored into, and for what the copy engine takes
    across. Default: 4, and 6 where the pool is on a device."""
    bundle_frames: int = 64
    """Sender: most frames (layers of requests) that share a slot, a launch and a message; at most 64."""
    max_slots_per_link: int = 8
    """Receiver: most slots that one sender holds at a time."""
    threads: int | None = None
    """CPU threads of one pack or unpack. Default: 1; of links over TCP, where a second one finds time while sockets
    copy, 2 where this process may use as many CPUs."""
    max_blocks: int = 0
    """Thread blocks of one pack or unpack on a device, so that multiprocessors are left to others; 0: all that fit."""
    copy_engine: bool = True
    """Sender on a device, path `device`: pack next to the pool and let the copy engine take it across; otherwise the
    pack kernel stores across by itself, and holds multiprocessors for as long as that takes."""
    high_priority: bool | None = None
    """Packs and unpacks on a device go before other work of the process. Default: a receiver's do, as they are short
    and awaited; a sender's do not, as they run during its compute."""
    spin_us: int = 1000
    """How long the progress thread spins while there is work, before it sleeps."""
    heartbeat_s: float = 0.5
    peer_timeout_s: float = 3.0
    """Silence after which a peer counts as lost."""
    lease_s: float = 60.0
    """Receiver: time in which a request must be complete."""
    hold_s: float = 120.0
    """Sender: time for which a request's blocks are held for its tickets and their completion."""
    handshake_timeout_s: float = 10.0
    direct: bool = True
    """Store into a peer's window where it can be mapped (paths `shm`, `device`); otherwise always stage and send."""
    streams: int = 1
    """Connections of the data plane to a peer on another host, where this side connects; at most 8."""
    encrypt: bool = False
    """Encrypt what goes to peers over TCP, messages and payloads. Either side may ask for it; both need libsodium. Such
    a link does no RDMA. Unix sockets and memory of one host are not encrypted. Without `tls` whoever has the secret and
    recorded the handshake can decrypt."""
    codec: Literal["none", "auto", "lossless", "fp8", "int4"] = "none"
    """Of payloads that are sent over TCP, to peers that name one, too; never where slots are shared memory, or put by
    RDMA. See docs/codecs.md.

    - `auto`: bfloat16 and float16 are coded without loss where the sender measures that more gets through so. A
      receiver decodes; nothing is coded where libzstd is missing.
    - `lossless`: the same, whatever the rates.
    - `fp8`, which is lossy: values of two or four bytes travel as fp8 e4m3 with a float32 scale for each 128 channels
      of a token and head; not where either pool is on a device.
    - `int4`, which loses more: the same as codes of four bits with a scale for each 32 channels."""
    rma: Literal["off", "auto"] = "off"
    """Put payloads through UCX where both sides have RDMA (path `rma`). Off, as UCX lets whoever is on the RDMA network
    and knows the worker's address write to this process without the secret: see SECURITY.md."""
    trace: bool = False
    """Record the time of every pack, put and unpack."""

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("slot_bytes", "staging_slots", "max_slots_per_link", "threads", "streams"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")
        for name in ("heartbeat_s", "peer_timeout_s", "lease_s", "hold_s", "handshake_timeout_s"):
            if not 0.001 <= getattr(self, name) <= MAX_SECONDS:
                raise InputError(f"{name} must be between 0.001 and {MAX_SECONDS:g} seconds, not {getattr(self, name)}")
        if not 1 <= self.bundle_frames <= 64:
            raise InputError(f"bundle_frames must be between 1 and 64, not {self.bundle_frames}")
        for name in ("spin_us", "max_blocks"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must not be negative, but is {getattr(self, name)}")
        if self.streams > MOST_STREAMS:
            raise InputError(f"streams must be at most {MOST_STREAMS}, not {self.streams}")
        if self.rma not in ("off", "auto"):
            raise InputError(f"rma {self.rma!r}: off or auto")
        if self.codec not in ("none", "auto", "lossless", "fp8", "int4"):
            raise InputError(f"codec {self.codec!r}: none, auto, lossless, fp8 or int4")
        if self.verify not in ("payload", "pool"):
            raise InputError(f"verify {self.verify!r}: payload or pool")
        if self.window not in ("auto", "host", "device"):
            raise InputError(f"window {self.window!r}: auto, host or device")
        if self.isolate_peers and self.window == "device":
            raise InputError("isolate_peers has slots in host memory: window is auto or host")
        if self.window_bytes is not None and self.window_bytes < (self.slot_bytes or MIB):
            raise InputError(f"window_bytes {self.window_bytes} holds no slot of {self.slot_bytes or MIB} bytes")

    def slot(self, on_device: bool = False) -> int:
        """`slot_bytes`, or its default for such a pool, which a smaller window bounds."""
        if self.slot_bytes is not None:
            return self.slot_bytes
        return min(DEVICE_SLOT, self.window_bytes or DEVICE_SLOT) if on_device else MIB

    def threads_over(self, kind: Literal["unix", "tcp"]) -> int:
        """`threads`, or its default for a link whose streams are of that kind."""
        return self.threads or (min(2, len(os.sched_getaffinity(0))) if kind == "tcp" else 1)

    def engine(self, on_device: bool = False, role: str = "receiver") -> _core.EngineConfig:
        """The same for the extension, for a pool in host memory or on a device."""
        from hetkv.core import core

        engine = core.EngineConfig()
        engine.slot_bytes = slot = self.slot(on_device)
        engine.window_bytes = self.window_bytes or (DEVICE_SLOTS * slot if on_device else max(slot, default_window()))
        engine.staging_slots = self.staging_slots or (6 if on_device else 4)
        engine.bundle_frames = self.bundle_frames
        engine.max_slots_per_link = self.max_slots_per_link
        engine.threads = self.threads or 1
        engine.max_blocks = self.max_blocks
        engine.copy_engine = self.copy_engine
        engine.high_priority = role == "receiver" if self.high_priority is None else self.high_priority
        engine.spin_us = self.spin_us
        engine.heartbeat_ms = max(1, round(self.heartbeat_s * 1000))
        engine.peer_timeout_ms = max(1, round(self.peer_timeout_s * 1000))
        engine.direct = self.direct
        engine.isolate_peers = self.isolate_peers
        engine.device_scales = device.DEVICE_SCALES
        engine.trace = self.trace
        return engine


def _check_types(config: TransferConfig) -> None:
    """Raise `InputError` for a value that is not of its field's type."""
    for field in msgspec.structs.fields(TransferConfig):
        value = getattr(config, field.name)
        try:
            msgspec.convert(value, field.type)
        except msgspec.ValidationError as error:
            raise InputError(f"{field.name} is {value!r}: {str(error)[0].lower()}{str(error)[1:]}") from None


def default_window() -> int:
    """32 MiB, or half of the last-level cache where that is smaller: slots in flight should stay in it."""
    try:
        text = max(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")).read_text().strip()
        cache = int(text.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 32 * MIB
    return max(4 * MIB, min(32 * MIB, cache // 2))
