"""The two wire codecs and the MAC: a frame, and a bundle of 64."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from hetkv import _core
from hetkv.kv.dtypes import DType
from hetkv.reference import wire
from hetkv.reference.messages import Bundle, Frame, Prelude, Record, Type

KEY = bytes(range(16))
REQUEST = bytes(range(1, 17))
TOKENS, HEADS, CHANNELS = 16, 1, 128


def frame(layer: int) -> Frame:
    code = DType.BFLOAT16.code
    return Frame(
        group=0, segments=3, layer=layer, head_start=0, head_stop=HEADS, token_start=0, token_stop=TOKENS,
        dtypes=(code, code, 0, 0), channels=(CHANNELS, CHANNELS, 0, 0), slot=0, generation=0,
        payload_length=2 * TOKENS * HEADS * CHANNELS * 2, checksum=1, saturated=0,
    )  # fmt: skip


def message(frames: int) -> tuple[Prelude, Any]:
    if frames == 1:
        return Prelude(Type.FRAME, 0, REQUEST, 1), frame(0)
    records = [Record(REQUEST, 1, frame(layer), layer * frame(0).payload_length) for layer in range(frames)]
    return Prelude(Type.BUNDLE, 0), Bundle(0, 0, tuple(records))


@pytest.mark.parametrize("frames", [1, 64])
def test_reference_encode(benchmark: Any, frames: int) -> None:
    benchmark(wire.encode, *message(frames), KEY)


@pytest.mark.parametrize("frames", [1, 64])
def test_reference_decode(benchmark: Any, frames: int) -> None:
    benchmark(wire.decode, wire.encode(*message(frames), KEY), KEY)


@pytest.mark.parametrize("frames", [1, 64])
def test_native_encode(benchmark: Any, frames: int) -> None:
    """With what the conversion of the fields costs."""
    prelude, body = message(frames)
    fields = msgspec.to_builtins(body, builtin_types=(bytes,))
    expected = wire.encode(prelude, body, KEY)
    kind = int(prelude.type)
    assert benchmark(_core.wire_encode, kind, 0, prelude.request_id, prelude.epoch, fields, KEY) == expected


@pytest.mark.parametrize("frames", [1, 64])
def test_native_open(benchmark: Any, frames: int) -> None:
    benchmark(_core.wire_open, wire.encode(*message(frames), KEY), KEY)


@pytest.mark.parametrize("size", [136, 7240])
def test_mac(benchmark: Any, size: int) -> None:
    benchmark(_core.siphash24, KEY, bytes(size))
