"""`save`: one rank's KV of one sequence into a file."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hetkv.control.conversion import Conversion
from hetkv.errors import InputError
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import Interval
from hetkv.storage.form import StoredPart, check_host, conversions, frame_layout, frame_pool, payload_bytes, stored_part
from hetkv.storage.places import Place, name_of, writing
from hetkv.transport.blocks import BlockIds, per_group
from hetkv.transport.content import check_content
from hetkv.transport.link_plan import layer_plan, wanted_tokens

if TYPE_CHECKING:
    import hetkv._core as _core

FILE_KEY = bytes(16)
"""MAC key of a file without one: its MAC then guards against faults only."""
FRAME_BYTES = 8 << 20
_TOKEN_ALIGNMENT = 64


class Saved(NamedTuple):
    """What `save` wrote."""

    frames: int
    num_bytes: int
    """Of the file, headers included."""


def save(
    place: Place,
    pool: KVPool,
    block_ids: BlockIds,
    num_tokens: int | Sequence[int],
    *,
    content: bytes,
    key: bytes = FILE_KEY,
    frame_bytes: int = FRAME_BYTES,
    threads: int = 1,
    options: dict[str, Any] | None = None,
) -> Saved:
    """Write the KV of one sequence, as far as this rank's pool holds it, in frames of about `frame_bytes` bytes.

    `place` is a path, a URL for fsspec with its `options` (`s3://bucket/key`), or a binary file that the caller opens
    and closes. A path or URL appears whole or not at all. Each rank writes a file of its own. `content` is the digest
    of what the KV is of (`content_digest`), which a reader compares. The pool is in host memory, and its blocks must
    not change meanwhile. Raises `InputError`, and `IncompatibleError` for what a file cannot hold (int8 with a static
    scale).
    """
    check_host(pool)
    pool.check_source()
    check_key(key)
    digest = check_content(content)
    if digest is None:
        raise InputError("content is the digest of what the KV is of: `content_digest` makes it")
    tokens, blocks = per_group(pool.spec, num_tokens, block_ids)
    spans = wanted_tokens(pool.spec, tokens, [0] * len(tokens))
    for group, span in enumerate(spans):
        pool.check_blocks(group, blocks[group], span.start, span.stop)
    written = num_bytes = 0
    with writing(place, options) as file:
        for layer in pool.layers:
            frames = _LayerFrames(pool, layer, blocks[pool.spec.group_of(layer)], digest, key, threads)
            for part in frames.cut(spans[pool.spec.group_of(layer)], frame_bytes):
                num_bytes += frames.write(file, part, written)
                written += 1
    return Saved(written, num_bytes)


def check_key(key: bytes) -> None:
    """Raise `InputError` unless it can be the MAC key of a file."""
    if not isinstance(key, bytes) or len(key) != len(FILE_KEY):
        raise InputError(f"key of a file: {len(FILE_KEY)} bytes")


class _LayerFrames:
    """Packs one layer of a pool, all the heads that it has, into frames."""

    def __init__(self, pool: KVPool, layer: int, blocks: array[int], content: bytes, key: bytes, threads: int) -> None:
        self._pool, self._layer, self._blocks = pool, layer, blocks
        self._content, self._key, self._threads = content, key, threads
        held = pool.layers[layer].layout.segments
        self._parts = tuple(stored_part(held[segment.name]) for segment in pool.spec.layers[layer].segments)
        self._heads = pool.shard.heads[layer]
        stored = frame_layout(pool.spec, layer, self._heads, 1, self._parts).segments
        self._to_file = conversions(held, stored, self._heads, (self._heads, self._heads))
        self._in_file = conversions(stored, stored, self._heads, (self._heads, self._heads))
        self._plan = layer_plan(pool, layer, self._heads, self._to_file, sends=True)
        self._direct = all(map(_ends_packed, self._to_file.values(), self._parts))

    def cut(self, span: Interval, frame_bytes: int) -> Iterator[Interval]:
        """The tokens in pieces whose payloads have at most `frame_bytes` bytes, or one token."""
        token = payload_bytes(self._pool.spec, self._layer, self._heads, 1, self._parts)
        most = max(1, frame_bytes // token)
        most = most // _TOKEN_ALIGNMENT * _TOKEN_ALIGNMENT or most
        for start in range(span.start, span.stop, most):
            yield Interval(start, min(start + most, span.stop))

    def write(self, file: IO[bytes], tokens: Interval, sequence: int) -> int:
        """Appends one frame; returns its bytes."""
        from hetkv.core import core

        plan, blocks, first = self._plan, self._blocks, tokens.start
        if not self._direct:
            plan, blocks, first = self._staged(core, tokens), array("i", [0]), 0
        payload = np.empty(plan.payload_bytes(tokens.size), np.uint8)
        header = core.pack_frame(
            plan,
            blocks,
            request_id=self._content,
            sequence=sequence,
            key=self._key,
            token_start=tokens.start,
            token_stop=tokens.stop,
            pool_token=first,
            payload=payload,
            threads=self._threads,
        )
        _write(file, header)
        _write(file, payload.data)
        return len(header) + len(payload)

    def _staged(self, core: Any, tokens: Interval) -> _core.LayerPlan:
        """The tokens in a frame's form, where a receiver of the pool's codes has something left to do to them."""
        wire = np.empty(self._plan.payload_bytes(tokens.size), np.uint8)
        core.pack_frame(
            self._plan,
            self._blocks,
            request_id=self._content,
            sequence=0,
            key=self._key,
            token_start=tokens.start,
            token_stop=tokens.stop,
            pool_token=tokens.start,
            payload=wire,
            threads=self._threads,
        )
        spec, layer, heads = self._pool.spec, self._layer, self._heads
        memory = np.zeros(payload_bytes(spec, layer, heads, tokens.size, self._parts), np.uint8)
        self._stage = frame_pool(spec, layer, heads, tokens.size, self._parts, memory)
        into = layer_plan(self._stage, layer, heads, self._to_file, sends=False)
        core.unpack_frame(into, [0], tokens=tokens.size, pool_token=0, payload=wire, threads=self._threads)
        return layer_plan(self._stage, layer, heads, self._in_file, sends=True)


def _write(file: IO[bytes], data: bytes | memoryview) -> None:
    """All of it: a file without a buffer may take less at a time. Raises `OSError` where it takes nothing."""
    left = memoryview(data)
    while left:
        taken = file.write(left)
        if not taken:
            raise OSError(f"{name_of(file)} takes no more bytes")
        left = left[taken:]


def _ends_packed(how: Conversion, part: StoredPart) -> bool:
    """What the sender packs is what the file holds."""
    return how.wire is part.dtype and how.unpack is None and how.unpack_scales in ("", "keep") and how.factor == 1.0
