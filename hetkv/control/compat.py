"""Can two ranks exchange KV, slot by slot and layer by layer? `check`. How segments convert is in `conversion.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from hetkv.control.conversion import Conversion, scale_text, segment_conversion
from hetkv.control.description import CIPHERS_SINCE, Description
from hetkv.control.handshake import MINOR
from hetkv.errors import IncompatibleError, InputError
from hetkv.kv.dtypes import DType
from hetkv.kv.reshard import overlap, routes
from hetkv.kv.scale import FLOAT32_BYTES
from hetkv.kv.spec import Interval, LayerSpec

SCALES_SINCE = 1
"""Minor version from which scales in memory travel."""
PART_ALIGNMENT = 8
"""Each segment's part of a payload begins at a multiple of this (`RemapJob.wire_offset`)."""

MAX_PARTS = 4
"""Segments and scales that one frame can hold (`docs/wire-format.md`)."""


def layer_conversions(sender: Description, receiver: Description, layer: int, heads: Interval) -> dict[str, Conversion]:
    """How each segment of a layer travels, for the global `heads` of a route. Raises `IncompatibleError`."""
    held = sender.shard.heads[layer], receiver.shard.heads[layer]
    found = {}
    for segment in sender.spec.layers[layer].segments:
        src, dst = (side.layout(layer).segments[segment.name] for side in (sender, receiver))
        try:
            found[segment.name] = segment_conversion(src, dst, heads, *held)
        except IncompatibleError as error:
            raise IncompatibleError(f"{segment.name}.{error.field}", error.mine, error.theirs, error.why) from None
    return found


def token_bytes(layer: LayerSpec, conversions: Mapping[str, Conversion], num_heads: int) -> int:
    """Payload bytes of one token of `num_heads` heads of a layer: the least that a slot must hold."""
    total = 0
    for segment in layer.segments:
        how = conversions[segment.name]
        for size in (segment.channels * how.wire.itemsize, how.scale_groups * FLOAT32_BYTES):
            total += -(-num_heads * size // PART_ALIGNMENT) * PART_ALIGNMENT
    return total


def check(mine: Description, theirs: Description, minor: int = MINOR) -> None:
    """Raise `IncompatibleError` with the first field that keeps two ranks from exchanging KV, and both sides' values.

    `minor` is the version that the hellos agreed on. Pure, and the same from both sides except that `mine` and `theirs`
    are exchanged.
    """
    if mine.role == theirs.role:
        raise IncompatibleError("role", mine.role, theirs.role)
    for path, ours, other in differences(mine.spec, theirs.spec, "spec"):
        raise IncompatibleError(path, ours, other)
    for name in sorted(mine.fingerprint.keys() & theirs.fingerprint.keys()):
        if mine.fingerprint[name] != theirs.fingerprint[name]:
            raise IncompatibleError(f"fingerprint.{name}", mine.fingerprint[name], theirs.fingerprint[name])
    _check_heartbeat(mine, theirs)
    cipher(mine, theirs)
    sender, receiver = (mine, theirs) if mine.role == "sender" else (theirs, mine)
    shared = list(overlap(mine.spec, mine.shard, theirs.shard))
    if not shared:
        raise IncompatibleError("shard", shard_text(mine), shard_text(theirs), "no layer and head is on both sides")
    need = 0
    for layer, heads in shared:
        try:
            need = max(need, _check_layer(sender, receiver, layer, heads, minor))
        except IncompatibleError as error:
            ours, other = (error.mine, error.theirs) if mine is sender else (error.theirs, error.mine)
            raise IncompatibleError(f"layers[{layer}].{error.field}", ours, other, error.why) from None
    if receiver.slot_bytes < need:
        values = f"frames of at least {need} bytes", f"slots of {receiver.slot_bytes} bytes"
        ours, other = values if mine is sender else values[::-1]
        raise IncompatibleError("slot_bytes", ours, other, "a slot holds one token of a layer")


def cipher(mine: Description, theirs: Description) -> str:
    """The cipher of the link's streams where either side asks for one: the sender's best that the receiver has, too.
    Empty where neither asks. Raises `IncompatibleError`."""
    if not (mine.encrypt or theirs.encrypt):
        return ""
    sender, receiver = (mine, theirs) if mine.role == "sender" else (theirs, mine)
    for name in sender.ciphers:
        if name in receiver.ciphers:
            return name
    asks = "this side asks for encryption" if mine.encrypt else "the peer asks for encryption"
    raise IncompatibleError("ciphers", _names(mine.ciphers), _names(theirs.ciphers), asks)


def _names(ciphers: tuple[str, ...]) -> str:
    return ", ".join(ciphers) or "none: no libsodium"


def check_minor(mine: Description, minor: int) -> None:
    """Raise `IncompatibleError` where a description says what a reader of that minor version does not know."""
    if mine.encrypt and minor < CIPHERS_SINCE:
        raise IncompatibleError("encrypt", True, f"version 1.{minor}", "its streams cannot be encrypted")
    if minor >= SCALES_SINCE:
        return
    for group in mine.layers:
        for name, part in group.layout.segments.items():
            if part.scale_groups:
                field = f"layers[{group.layers[0]}].{name}.scale"
                raise IncompatibleError(field, scale_text(part), f"version 1.{minor}", "it carries static scales only")


def differences(mine: object, theirs: object, path: str) -> Iterator[tuple[str, object, object]]:
    """(path, value, value) of every leaf in which two descriptions of one type differ, in field order."""
    if mine == theirs:
        return
    if isinstance(mine, msgspec.Struct) and type(mine) is type(theirs):
        for name in mine.__struct_fields__:
            yield from differences(getattr(mine, name), getattr(theirs, name), f"{path}.{name}")
    elif isinstance(mine, tuple) and isinstance(theirs, tuple):
        names = getattr(mine, "_fields", None)
        if len(mine) != len(theirs):
            yield f"len({path})", len(mine), len(theirs)
        for index, (ours, other) in enumerate(zip(mine, theirs, strict=False)):
            yield from differences(ours, other, f"{path}.{names[index]}" if names else f"{path}[{index}]")
    else:
        yield path, mine, theirs


def _check_heartbeat(mine: Description, theirs: Description) -> None:
    """Each side must wait for at least two of the other's heartbeats."""
    why = "a timeout must be at least twice the other side's interval"
    if mine.heartbeat_timeout_ms < 2 * theirs.heartbeat_interval_ms:
        ours, other = f"timeout {mine.heartbeat_timeout_ms}", f"interval {theirs.heartbeat_interval_ms}"
    elif theirs.heartbeat_timeout_ms < 2 * mine.heartbeat_interval_ms:
        ours, other = f"interval {mine.heartbeat_interval_ms}", f"timeout {theirs.heartbeat_timeout_ms}"
    else:
        return
    raise IncompatibleError("heartbeat_ms", ours, other, why)


def _check_layer(sender: Description, receiver: Description, layer: int, heads: Interval, minor: int) -> int:
    """Every segment of a layer must convert; opaque state must be bytes on both sides. Returns bytes of one token."""
    spec = sender.spec.layers[layer]
    sides = sender.layout(layer).segments, receiver.layout(layer).segments
    for name, src in sides[0].items():
        dst = sides[1][name]
        if spec.kind == "state" and not (src.dtype is dst.dtype is DType.UINT8):
            why = "state is opaque bytes, uint8"
            raise IncompatibleError(f"{name}.dtype", src.dtype.value, dst.dtype.value, why)
        if minor < SCALES_SINCE and (src.scale_groups or dst.scale_groups):
            why = f"version 1.{minor}, the lower of the two sides', carries static scales only"
            raise IncompatibleError(f"{name}.scale", scale_text(src), scale_text(dst), why)
    routed = [heads]
    sharing = next((name for name, part in sides[1].items() if part.shares_scales), None)
    if sharing is not None:
        routed = _routed(sender, receiver, layer) or routed
        if routed != [receiver.shard.heads[layer]]:
            _check_alike(sender, receiver, layer, sharing)
    for part in routed:
        found = layer_conversions(sender, receiver, layer, part)
    count = len(found) + sum(how.scale_groups > 0 for how in found.values())
    if count > MAX_PARTS:
        mine, theirs = (", ".join(f"{name} {scale_text(part)}" for name, part in side.items()) for side in sides)
        raise IncompatibleError("scale", mine, theirs, f"a frame holds {MAX_PARTS} segments and scales, not {count}")
    return token_bytes(spec, found, heads.size)


def _check_alike(sender: Description, receiver: Description, layer: int, name: str) -> None:
    """Replicas that each send some of the heads which share a scale must hold the same heads, so the same scale."""
    wanted = receiver.shard.heads[layer]
    shards = [shard for shard in sender.shards if layer in range(*shard.layers)]
    held = {shard.heads[layer] for shard in shards if (shard.heads[layer] & wanted).size}
    if len(held) > 1:
        ours, other = (scale_text(side.layout(layer).segments[name]) for side in (sender, receiver))
        why = "ranks of the sender that hold different heads share other scales"
        raise IncompatibleError(f"{name}.scale", ours, other, why)


def _routed(sender: Description, receiver: Description, layer: int) -> list[Interval]:
    """Heads of a layer that really travel between these two ranks: replicas of the sender share them."""
    try:
        between = routes(sender.spec, sender.shards, receiver.shards)
    except InputError:
        return []  # a rank is missing on the sender's side, which the link finds
    pair = (sender.rank, receiver.rank)
    return [r.heads for r in between if (r.source, r.destination) == pair and layer in range(*r.layers)]


def shard_text(side: Description) -> str:
    start, stop = side.shard.layers
    heads = {side.shard.heads[layer] for layer in range(start, stop)}
    return f"layers [{start}, {stop}), heads " + " and ".join(f"[{a}, {b})" for a, b in sorted(heads))
