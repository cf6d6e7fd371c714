"""hetkv's data plane: remap, wire format, transport. Its Python face is the hetkv package."""

from array import array
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from hetkv.kv.segment import SegmentLayout

_EventKind: TypeAlias = Literal["layer", "complete", "packed", "failed", "link_lost", "link_drained"]
_SpanKind: TypeAlias = Literal["pack", "wire", "unpack"]
_Watch: TypeAlias = Literal["end", "packed", "layers"]
_Path: TypeAlias = Literal["rma", "shm", "device", "stream"]
_Buffer: TypeAlias = object  # bytes, numpy arrays: what has the buffer protocol, which Python 3.11 has no type for

class SegmentMap:
    """Where one segment's elements live: csrc/map.h. Strides are bytes."""

    def __init__(
        self,
        *,
        base: int,
        block_stride: int,
        token_stride: int,
        head_stride: int,
        outer_stride: int,
        inner_stride: int,
        block_size: int,
        pack: int,
        dtype: int,
    ) -> None: ...
    @staticmethod
    def of(layout: SegmentLayout, block_size: int, base: int) -> SegmentMap: ...
    @staticmethod
    def canonical(base: int, tokens: int, channels: int, dtype: int) -> SegmentMap: ...

class RemapSide:
    """One side of a job: a map, the block ids where it is paged (copied), where it starts, its scales."""

    def __init__(
        self,
        map: SegmentMap,
        blocks: Sequence[int] | _Buffer | None = None,
        first_token: int = 0,
        first_head: int = 0,
        scales: SegmentMap | None = None,
        channels_per_scale: int = 0,
    ) -> None: ...

class RemapJob:
    """tokens x heads x channels elements from one side to the other: csrc/remap/remap.h."""

    def __init__(
        self,
        src: RemapSide,
        dst: RemapSide,
        *,
        tokens: int,
        heads: int,
        channels: int,
        multipliers: Sequence[float] = ...,
        wire: Literal["", "source", "destination"] = "",
        wire_offset: int = 0,
        joint: bool = False,
        wire_scale_offset: int = 0,
        largest: float = 0.0,
    ) -> None: ...

def remap(jobs: Sequence[RemapJob], seed: int = 0, threads: int = 1) -> tuple[int, int]:
    """Runs the jobs; returns (checksum of the wire sides, elements saturated). Releases the interpreter lock."""

def checksum(data: _Buffer, offset: int = 0, seed: int = 0) -> int:
    """Payload checksum of a contiguous buffer whose first byte is byte `offset` of the payload."""

def copy(dst: _Buffer, src: _Buffer, threads: int = 1) -> None:
    """memcpy on the threads that remap uses: the yardstick of `hetkv bench remap`."""

def ciphers() -> list[str]: ...
def available_isas() -> list[str]:
    """Instruction sets that remap can use here, narrowest first."""

def select_isa(name: str) -> None:
    """Makes remap use the named instruction set from now on."""

def isa() -> str:
    """The instruction set that remap uses."""

def load_backends(folder: str) -> list[tuple[str, int, str]]:
    """Opens the GPU backends in `folder`: (name, devices, why none) of each. The first call counts."""

def device_info(backend: str, device: int) -> dict[str, Any]:
    """What one device is and can do."""

def pointer_info(backend: str, pointer: int) -> dict[str, Any]:
    """What memory an address belongs to."""

# For tests: codes that Python has a definition of its own for, by their names there.
def status_codes() -> dict[str, int]: ...
def dtype_codes() -> dict[str, int]: ...

class DeviceRemap:
    """Jobs on one device. Their memory is device memory, or pinned; their block tables are copied."""

    def __init__(self, backend: str, device: int, jobs: Sequence[RemapJob], frames: Sequence[int] = ...) -> None: ...
    def results(self) -> list[tuple[int, int]]: ...
    def launch(self, stream: int = 0, seed: int = 0, max_blocks: int = 0) -> None:
        """One launch in the order of `stream` (the framework's handle as an integer). Does not wait."""

    def result(self) -> tuple[int, int]:
        """Waits for the last launch: (checksum, elements saturated)."""

# Errors of the wire codec are returned as `(code, detail)`, `code` as in csrc/status.h.
def wire_encode(
    type: int, sequence: int, request_id: bytes, epoch: int, fields: dict[str, Any], key: bytes
) -> bytes: ...
def wire_open(message: bytes, key: bytes) -> dict[str, Any]: ...
def wire_decode_unopened(type: int, message: bytes) -> tuple[int, str]: ...
def window_key_encode(fields: dict[str, Any]) -> bytes: ...
def window_key_decode(data: bytes) -> tuple[int, str, dict[str, Any] | None]: ...
def wire_checksum_seed(request_id: bytes, epoch: int, fields: dict[str, Any]) -> int: ...
def wire_checksum(payload: bytes, seed: int) -> int: ...
def siphash24(key: bytes, data: bytes) -> int: ...

class EngineConfig:
    """Settings of an engine: csrc/engine/config.h."""

    slot_bytes: int
    window_bytes: int
    staging_slots: int
    max_slots_per_link: int
    threads: int
    max_blocks: int
    copy_engine: bool
    high_priority: bool
    verify_bytes: int
    isolate_peers: bool
    device_scales: bool
    spin_us: int
    heartbeat_ms: int
    peer_timeout_ms: int
    direct: bool
    bundle_frames: int
    layer_groups: list[int]
    trace: bool
    rma: str

    def __init__(self) -> None: ...

class SegmentPlan:
    """One segment of one layer of a route, on this side."""

    def __init__(
        self,
        pool: SegmentMap,
        first_head: int,
        channels: int,
        wire_dtype: int,
        multipliers: Sequence[float],
        *,
        pool_scales: SegmentMap | None = None,
        channels_per_scale: int = 0,
        wire_scales: int = -1,
        joint: bool = False,
        largest: float = 0.0,
        carried: bool = False,
    ) -> None: ...

class ScaleFill:
    """Scales of a receiver's pool that are the same for all tokens."""

    def __init__(self, pool: SegmentMap, first_head: int, groups: int, values: Sequence[float]) -> None: ...

class LayerPlan:
    """One layer of one route, on this side."""

    def __init__(
        self,
        layer: int,
        group: int,
        head_start: int,
        head_stop: int,
        segments: Sequence[SegmentPlan],
        fills: Sequence[ScaleFill] = ...,
        scale_encoding: int = 0,
    ) -> None: ...
    def payload_bytes(self, tokens: int) -> int: ...

def split16(values: _Buffer, upper: _Buffer, lower: _Buffer, turn: bool) -> None:
    """Bytes of 16-bit values in two planes: csrc/codec/split.h."""

def join16(upper: _Buffer, lower: _Buffer, values: _Buffer, turn: bool) -> None:
    """The inverse of `split16`."""

def has_zstd() -> bool:
    """libzstd.so.1 is there, which the codec `lossless` needs."""

def encode_part(data: _Buffer, values: int) -> bytes | None:
    """A coded part (csrc/codec/part.h) of bytes at an even address; None: it is no smaller."""

def decode_part(coded: bytes, most: int) -> bytes:
    """The inverse. Raises MalformedError; parts of over `most` bytes are malformed, too."""

FRAME_BYTES: int
"""Of a frame's message, without its payload."""

def pack_frame(
    plan: LayerPlan,
    blocks: Sequence[int],
    *,
    request_id: bytes,
    sequence: int,
    key: bytes,
    token_start: int,
    token_stop: int,
    pool_token: int,
    payload: _Buffer,
    threads: int = 1,
) -> bytes:
    """Packs tokens of a layer, the pool's from `pool_token` on, into `payload`; returns the frame's message."""

def unpack_frame(
    plan: LayerPlan, blocks: Sequence[int], *, tokens: int, pool_token: int, payload: _Buffer, threads: int = 1
) -> int:
    """Unpacks a payload of `tokens` tokens; returns how many elements saturated."""

class LinkConfig:
    """One link to one peer rank."""

    def __init__(
        self,
        *,
        address: bytes,
        number: int,
        minor: int,
        send_key: bytes,
        receive_key: bytes,
        name: str,
        instance: str,
        instance_links: int,
        plans: Sequence[LayerPlan],
        device_windows: bool = False,
        rdma_windows: bool = False,
        streams: Sequence[tuple[int, bytes, bytes, str]],
        coded_values: int = 0,
        always_code: bool = False,
        accept: int = 0,
        threads: int = 0,
        frame_ms: int = 0,
    ) -> None: ...

RMA_TRANSPORTS: str

def load_ucx(path: str) -> None: ...

class Device:
    """One device of a GPU backend."""

    @property
    def info(self) -> dict[str, Any]: ...
    def pointer_info(self, address: int) -> dict[str, Any]: ...

def open_device(folder: str, name: str, index: int) -> Device: ...
def process_number() -> bytes: ...
def open_test_device(path: str, index: int) -> Device: ...

class Outcome:
    """What becomes of one request: asked and waited for without a thread in between."""

    @property
    def handle(self) -> int: ...
    @property
    def packed(self) -> bool: ...
    @property
    def ended(self) -> bool: ...
    @property
    def failure(self) -> tuple[int, str] | None: ...
    def arrived(self, layer: int) -> bool: ...
    def watch(self, what: _Watch) -> None: ...
    def wait(self, timeout: float | None = None) -> bool: ...
    def wait_packed(self, timeout: float | None = None) -> bool: ...
    def wait_layer(self, layer: int, timeout: float | None = None) -> bool: ...

class _Engine:
    def __init__(self, config: EngineConfig, device: Device | None = None) -> None: ...
    @property
    def address(self) -> bytes: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def add_link(self, config: LinkConfig) -> int: ...
    def activate_link(self, link: int) -> None: ...
    def drop_link(self, link: int, code: int, reason: str) -> None: ...
    def wait_events(self) -> list[tuple[_EventKind, int, int, int, int, str]]: ...
    def take_ended(self) -> list[int]: ...
    @property
    def open_requests(self) -> int: ...
    def take_trace(self) -> list[tuple[_SpanKind, int, int, int, int, int]]: ...
    def stats(self) -> dict[str, int]: ...
    def inject(self, link: int, message: bytes) -> None: ...
    def next_sequence(self, link: int) -> int: ...
    def abort(self, handle: int, reason: str) -> None: ...

class SendBatch:
    """What one step computes of several requests: for each cache group one range of tokens a handle."""

    def __init__(self, handles: Sequence[int], tokens: Sequence[Sequence[tuple[int, int]]]) -> None: ...

class Sender(_Engine):
    def submit(
        self,
        id: bytes,
        tokens: Sequence[tuple[int, int]],
        blocks: Sequence[array[int]],
        hold_ms: int,
        content: bytes | None = None,
        priority: int = 0,
    ) -> Outcome: ...
    def extend(self, handle: int, group: int, blocks: array[int]) -> None: ...
    def send_layer(self, handle: int, layer: int, start: int, stop: int, stream: int | None = None) -> None: ...
    def send_batch(self, batch: SendBatch, layer: int, stream: int | None = None) -> None: ...
    def path(self, link: int) -> _Path | None: ...
    def reject(self, id: bytes, reason: str) -> None: ...

class Receiver(_Engine):
    def receive(
        self,
        id: bytes,
        want: Sequence[tuple[int, int]],
        blocks: Sequence[array[int]],
        links: Sequence[int],
        lease_ms: int,
        content: bytes | None = None,
    ) -> Outcome: ...
    def epoch(self, handle: int) -> int: ...
    def wait_stream(self, outcome: Outcome, layer: int, stream: int) -> None: ...
    def retire_link(self, link: int) -> None: ...
