"""`load`: KV of one sequence out of files into one rank's pool, whatever pools wrote them."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING, Any, NamedTuple, SupportsIndex, cast

import numpy as np

from hetkv.control.conversion import Conversion
from hetkv.errors import (
    AuthenticationError,
    ChecksumError,
    ContentError,
    HetkvError,
    IncompatibleError,
    InputError,
    MalformedError,
    TransferError,
    from_code,
)
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import Interval
from hetkv.storage.form import FrameHeader, StoredPart, check_host, conversions, frame_layout, frame_pool, header_of
from hetkv.storage.places import Place, name_of, reading
from hetkv.storage.save import FILE_KEY, check_key
from hetkv.storage.wanted import Wanted
from hetkv.transport.blocks import BlockIds, integers, per_group
from hetkv.transport.content import check_content
from hetkv.transport.link_plan import layer_plan, wanted_tokens

if TYPE_CHECKING:
    import hetkv._core as _core

_CHUNK_BYTES = 1 << 24


def load(
    places: Place | Iterable[Place],
    pool: KVPool,
    block_ids: BlockIds,
    num_tokens: int | Sequence[int],
    *,
    content: bytes,
    num_cached_tokens: int | Sequence[int] = 0,
    key: bytes = FILE_KEY,
    threads: int = 1,
    options: dict[str, Any] | None = None,
) -> int:
    """Read the KV of one sequence into this rank's pool; returns how many elements saturated while they were converted.

    `places` are the files of all ranks that wrote it, in any order: each gives what the pool wants of it, the first one
    where several have the same (replicas). `block_ids` cover `num_tokens` tokens, of which the first
    `num_cached_tokens` are in the pool already. Each payload is verified before a byte of it reaches the pool; no byte
    outside the wanted tokens ever changes, and when this raises those are undefined.

    Raises `InputError`; `MalformedError`, `UnsupportedError`, `AuthenticationError` or `ChecksumError` for a damaged
    file; `ContentError` where a file is of other content; `IncompatibleError` where it is of another model, or has a
    dtype or scales that this pool cannot hold; `TransferError` where the files lack something. The texts name the file
    and the frame.
    """
    check_host(pool)
    pool.check_destination()
    check_key(key)
    digest = check_content(content)
    if digest is None:
        raise InputError("content is the digest of what the KV is of: `content_digest` makes it")
    tokens, blocks = per_group(pool.spec, num_tokens, block_ids)
    cached = integers("num_cached_tokens", num_cached_tokens, len(tokens))
    if isinstance(num_cached_tokens, SupportsIndex):  # the record of a `state` group belongs to the last token
        cached = [0 if group in pool.spec.state_groups else count for group, count in enumerate(cached)]
    if len(cached) != len(tokens) or any(not 0 <= kept <= count for kept, count in zip(cached, tokens, strict=True)):
        raise InputError(f"num_cached_tokens is {num_cached_tokens} of {num_tokens} tokens")
    spans = wanted_tokens(pool.spec, tokens, cached)
    for group, span in enumerate(spans):
        pool.check_blocks(group, blocks[group], span.start, span.stop)
    wanted = Wanted({layer: (pool.shard.heads[layer], spans[pool.spec.group_of(layer)]) for layer in pool.layers})
    saturated = 0
    for place in _each(places):
        with reading(place, options) as file:
            reader = _FileReader(file, name_of(place), pool, blocks, wanted, digest, key, threads)
            saturated += reader.run()
    if (lack := wanted.lack()) is not None:
        raise TransferError(f"the files lack {lack}: one is missing, or was cut off between two frames")
    return saturated


def _each(places: Place | Iterable[Place]) -> list[Place]:
    """One place or several, as a list; an open file is one."""
    if isinstance(places, str | os.PathLike) or hasattr(places, "read"):
        return [cast(Place, places)]
    return list(places)


class _Route(NamedTuple):
    """How some heads of frames of one form go into the pool."""

    found: dict[str, Conversion]
    plan: _core.LayerPlan
    as_it_is: bool
    """The wire's form is the file's."""


class _FileReader:
    """Reads one file."""

    def __init__(
        self,
        file: IO[bytes],
        name: str,
        pool: KVPool,
        blocks: list[array[int]],
        wanted: Wanted,
        content: bytes,
        key: bytes,
        threads: int,
    ) -> None:
        self._file, self._name, self._pool, self._blocks = file, name, pool, blocks
        self._wanted, self._content, self._key, self._threads = wanted, content, key, threads
        self._routes: dict[tuple[int, Interval, Interval, tuple[StoredPart, ...]], _Route] = {}

    def run(self) -> int:
        """Reads to the end; returns how many elements saturated."""
        self._wanted.begin_file()
        saturated = number = offset = 0
        try:
            while (header := self._header(number)) is not None:
                pieces = self._wanted.take(header)
                if pieces or not self._file.seekable():
                    payload = self._payload(header)
                    saturated += sum(self._move(header, payload, heads, tokens) for heads, tokens in pieces)
                else:
                    self._file.seek(header.payload_length, 1)
                number, offset = number + 1, offset + self._message_bytes + header.payload_length
        except IncompatibleError as error:
            where = f"{self._name}: frame {number} at byte {offset}: {error.field}"
            raise IncompatibleError(where, error.mine, error.theirs, error.why) from None
        except HetkvError as error:
            raise type(error)(f"{self._name}: frame {number} at byte {offset}: {error}") from None
        return saturated

    def _header(self, number: int) -> FrameHeader | None:
        """The next frame's message, checked; `None` at the end of the file."""
        from hetkv.core import core

        self._message_bytes = core.FRAME_BYTES
        message = bytes(_read(self._file, core.FRAME_BYTES))
        if not message:
            return None
        if len(message) < core.FRAME_BYTES:
            raise MalformedError(f"header is cut short: {len(message)} of {core.FRAME_BYTES} bytes")
        opened = core.wire_open(message, self._key)
        if opened["code"]:
            raise from_code(opened["code"], opened["detail"])
        if "payload_length" not in opened["body"]:
            raise MalformedError("the message is not a frame; a file holds frames alone")
        if opened["sequence"] != number:
            raise AuthenticationError(f"sequence is {opened['sequence']}, not {number}")
        if opened["request_id"] != self._content:
            raise ContentError(f"its content is {opened['request_id'].hex()}, not {self._content.hex()}")
        header = header_of(self._pool.spec, opened["body"])
        self._seed = core.wire_checksum_seed(opened["request_id"], opened["epoch"], opened["body"])
        return header

    def _payload(self, header: FrameHeader) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The frame's payload, verified. Nothing is allocated that the file does not have."""
        from hetkv.core import core

        payload = _read(self._file, header.payload_length)
        if len(payload) < header.payload_length:
            raise MalformedError(f"payload is cut short: {len(payload)} of {header.payload_length} bytes")
        found = core.checksum(payload, seed=self._seed)
        if found != header.checksum:
            raise ChecksumError(f"payload has the checksum {found:#018x}, its header says {header.checksum:#018x}")
        return np.frombuffer(payload, np.uint8)

    def _route(self, header: FrameHeader, heads: Interval) -> _Route:
        """How `heads` of such frames go into the pool."""
        form = header.layer, header.heads, heads, header.parts
        if form not in self._routes:
            spec, mine = self._pool.spec, self._pool.layers[header.layer].layout.segments
            stored = frame_layout(spec, header.layer, header.heads, 1, header.parts).segments
            found = conversions(stored, mine, heads, (header.heads, self._pool.shard.heads[header.layer]))
            plan = layer_plan(self._pool, header.layer, heads, found, sends=False)
            as_it_is = heads == header.heads and all(
                how.wire is part.dtype and how.pack is None and how.scale_groups == part.scale_groups
                for how, part in zip(found.values(), header.parts, strict=True)
            )
            self._routes[form] = _Route(found, plan, as_it_is)
        return self._routes[form]

    def _move(
        self, header: FrameHeader, payload: np.ndarray[Any, np.dtype[np.uint8]], heads: Interval, tokens: Interval
    ) -> int:
        """Some heads and tokens of a verified payload into the pool; returns how many elements saturated."""
        from hetkv.core import core

        route, wire = self._route(header, heads), payload
        if not route.as_it_is or tokens != header.tokens:
            spec, layer = self._pool.spec, header.layer
            source = frame_pool(spec, layer, header.heads, header.tokens.size, header.parts, payload)
            plan = layer_plan(source, layer, heads, route.found, sends=True)
            wire = np.empty(plan.payload_bytes(tokens.size), np.uint8)
            message = core.pack_frame(
                plan,
                [0],
                request_id=self._content,
                sequence=0,
                key=FILE_KEY,
                token_start=tokens.start,
                token_stop=tokens.stop,
                pool_token=tokens.start - header.tokens.start,
                payload=wire,
                threads=self._threads,
            )
            saturated = int(core.wire_open(message, FILE_KEY)["body"]["saturated"])
        else:
            saturated = 0
        blocks = self._blocks[self._pool.spec.group_of(header.layer)]
        return saturated + core.unpack_frame(
            route.plan, blocks, tokens=tokens.size, pool_token=tokens.start, payload=wire, threads=self._threads
        )


def _read(file: IO[bytes], length: int) -> bytearray:
    """`length` bytes, or as many as there are."""
    data = bytearray()
    while len(data) < length and (chunk := file.read(min(_CHUNK_BYTES, length - len(data)))):
        data += chunk
    return data
