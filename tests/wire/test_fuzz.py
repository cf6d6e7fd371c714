"""Both codecs on random and on mutated messages: same bytes, verdicts and texts, and no way to crash the C++ one."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import msgspec
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from hetkv import errors
from hetkv.core import core as _core
from hetkv.kv.dtypes import DType
from hetkv.kv.scale import SCALED
from hetkv.reference import layout, wire
from hetkv.reference import messages as m
from hetkv.reference.payload import payload_parts, scales_of

VECTORS = Path(__file__).parents[1] / "vectors"
KEY = bytes.fromhex(json.loads((VECTORS / "good.json").read_text(encoding="utf-8"))["key"])
GOLDEN = [path.read_bytes() for path in sorted((VECTORS / "good").glob("*.bin"))]
CODES = {errors.MalformedError: 2, errors.UnsupportedError: 3, errors.AuthenticationError: 4}

u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))
names = st.lists(st.tuples(u32, u32), max_size=20, unique_by=lambda name: name[0]).map(tuple)


@st.composite
def intervals(draw: st.DrawFn, bits: int, largest: int) -> tuple[int, int]:
    size = draw(st.integers(1, largest))
    start = draw(st.integers(0, 2**bits - 1 - size))
    return start, start + size


def replaced(values: tuple[int, ...], items: dict[int, int]) -> tuple[int, ...]:
    return tuple(items.get(i, value) for i, value in enumerate(values))


@st.composite
def frames(draw: st.DrawFn) -> m.Frame:
    segments = draw(st.integers(1, 15))
    present = [segments >> i & 1 for i in range(4)]
    heads, tokens = draw(intervals(32, 300)), draw(intervals(64, 5000))
    dtypes = tuple(draw(st.sampled_from(DType)).code if here else 0 for here in present)
    channels = tuple(draw(st.integers(1, 20_000)) if here else 0 for here in present)
    encoding = draw(st.integers(0, 15)) & segments
    scales = scales_of(segments, encoding)
    if any(encoding >> scale & 1 for scale in scales.values()):
        encoding, scales = 0, {}
    for i, scale in scales.items():
        groups = draw(st.integers(1, 64))
        width = groups * draw(st.integers(1, 300))
        dtypes = replaced(dtypes, {i: draw(st.sampled_from(SCALED)).code, scale: DType.FLOAT32.code})
        channels = replaced(channels, {i: width, scale: groups})
    frame = m.Frame(
        draw(u16), segments, draw(u32), *heads, *tokens, dtypes, channels, draw(u32), draw(u32), scale_encoding=encoding
    )
    length = sum((part.bytes + 7) // 8 * 8 for part in payload_parts(frame))
    assume(length <= m.MAX_PAYLOAD_BYTES)
    return msgspec.structs.replace(
        frame, payload_length=length, checksum=draw(u64), saturated=draw(st.integers(0, length // 32))
    )


@st.composite
def bundles(draw: st.DrawFn) -> m.Bundle:
    records, end = [], 0
    for frame in draw(st.lists(frames(), min_size=1, max_size=5)):
        at = (end + 63) // 64 * 64 + 64 * draw(st.integers(0, 2))
        assume(at <= m.MAX_PAYLOAD_BYTES)
        named = msgspec.structs.replace(frame, slot=0, generation=0)
        request_id = draw(st.binary(min_size=16, max_size=16).filter(any))
        records.append(m.Record(request_id, draw(u64), named, at))
        end = at + frame.payload_length
    return m.Bundle(draw(u32), draw(u32), tuple(records))


@st.composite
def slot_grants(draw: st.DrawFn) -> m.Grant:
    slots = []
    for slot, generation in draw(names.filter(bool)):
        address = draw(st.integers(0, 2**64 - 2))
        num_bytes = draw(st.integers(1, 2**64 - 1 - address))
        slots.append(m.SlotGrant(slot, generation, address, num_bytes, draw(st.binary(max_size=40))))
    return m.Grant(tuple(slots))


ranges = st.tuples(u64, u64).map(lambda pair: tuple(sorted(pair)))
bodies = {
    m.Type.FRAME: frames(),
    m.Type.BUNDLE: bundles(),
    m.Type.TICKET: st.builds(m.Ticket, u32, st.lists(ranges, min_size=1, max_size=20).map(tuple)),
    m.Type.BOUND_TICKET: st.builds(
        m.BoundTicket,
        u32,
        st.binary(min_size=16, max_size=16).filter(any),
        st.lists(ranges, min_size=1, max_size=20).map(tuple),
    ),
    m.Type.GRANT: slot_grants(),
    m.Type.RELEASE: st.builds(m.Release, names),
    m.Type.RECALL: st.builds(m.Recall, names),
    m.Type.DONE: st.builds(m.Done, u64, u64),
    m.Type.ABORT: st.builds(m.Abort, st.integers(1, m.MAX_ABORT_CODE), st.text(max_size=128)),
    m.Type.WANT: st.none(),
    m.Type.HEARTBEAT: st.builds(m.Heartbeat, u64),
    m.Type.BYE: st.none(),
    m.Type.HOST_ONLY: st.none(),
}
OF_LINK = {
    m.Type.BUNDLE, m.Type.WANT, m.Type.GRANT, m.Type.RELEASE, m.Type.RECALL, m.Type.HEARTBEAT, m.Type.BYE,
    m.Type.HOST_ONLY,
}  # fmt: skip


@st.composite
def messages(draw: st.DrawFn) -> tuple[m.Prelude, m.Body]:
    kind = draw(st.sampled_from(m.Type))
    request, epoch = (bytes(16), 0) if kind in OF_LINK else (draw(st.binary(min_size=16, max_size=16)), draw(u64))
    assume(kind in OF_LINK or any(request))
    return m.Prelude(kind, draw(u64), request, epoch), draw(bodies[kind])


def python_verdict(data: bytes) -> tuple[int, str, tuple[m.Prelude, m.Body] | None]:
    try:
        return 0, "", wire.decode(data, KEY)
    except (errors.WireError, errors.UnsupportedError, errors.AuthenticationError) as error:
        return CODES[type(error)], str(error), None


def check_same(data: bytes) -> None:
    """Same verdict, text and values from both codecs; what is accepted has one encoding only."""
    code, text, message = python_verdict(data)
    opened = _core.wire_open(data, KEY)
    assert (opened["code"], opened["detail"]) == (code, text)
    for kind in m.Type:
        status, detail = _core.wire_decode_unopened(kind, data)
        assert status in (0, 2, 3)
        assert bool(detail) == bool(status)
    if message is None:
        return
    prelude, body = message
    fields = {} if body is None else msgspec.to_builtins(body, builtin_types=(bytes,))
    assert opened["body"] == (None if body is None else opened["body"])
    assert (
        opened["body"] is None
        or msgspec.convert(opened["body"], m.BODIES[prelude.type], builtin_types=(bytes,)) == body
    )
    again = wire.encode(prelude, body, KEY)
    if data[5] == layout.MINOR:
        assert again == data
    assert _core.wire_encode(prelude.type, prelude.sequence, prelude.request_id, prelude.epoch, fields, KEY) == again


@given(messages())
@settings(max_examples=300, deadline=None)
def test_random_messages(message: tuple[m.Prelude, m.Body]) -> None:
    data = wire.encode(*message, KEY)
    assert python_verdict(data) == (0, "", message)
    check_same(data)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A golden message with a few bytes or whole fields changed, cut or extended; mostly with a MAC that fits."""
    data = bytearray(draw(st.sampled_from(GOLDEN)))
    for _ in range(draw(st.integers(0, 4))):
        width = draw(st.sampled_from([1, 2, 4, 8]))
        at = draw(st.integers(0, (len(data) - 8) // width - 1)) * width
        old = int.from_bytes(data[at : at + width], "little")
        edge = [0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, old + 1, old - 1, old ^ 1 << draw(st.integers(0, 63))]
        value = draw(st.sampled_from(edge) | u64)
        data[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
    body = bytes(data[:-8])
    if draw(st.integers(0, 3)) == 0:
        body = body[: draw(st.integers(0, len(body)))] + draw(st.binary(max_size=24))
    if len(body) >= 12 and draw(st.integers(0, 3)) > 0:
        body = body[:8] + (len(body) + 8).to_bytes(4, "little") + body[12:]
    return wire.seal(body, KEY) if draw(st.integers(0, 7)) else body + bytes(data[-8:])


@given(mutated())
@example(b"")
@settings(max_examples=1500, deadline=None)
def test_mutated_messages(data: bytes) -> None:
    check_same(data)


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_random_bytes(data: bytes) -> None:
    check_same(data)
    check_same(wire.seal(b"HKV1\1" + data, KEY))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ with its sanitizers")
def test_native_codec_under_sanitizers(tmp_path: Path) -> None:
    root = VECTORS.parents[1]
    sources = [root / "tests" / "cpp" / "wire_fuzz.cpp", *sorted((root / "csrc" / "wire").glob("*.cpp"))]
    flags = ["-std=c++17", "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{root}/csrc"]
    subprocess.run(["g++", *flags, *map(str, sources), "-o", str(tmp_path / "wire_fuzz")], check=True)
    corpus = sorted(map(str, VECTORS.glob("*/*.bin")))
    done = subprocess.run([str(tmp_path / "wire_fuzz"), "500000", *corpus], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("500000 messages: ")
