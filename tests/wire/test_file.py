"""Files of frames: the golden file, every broken copy of it, and payload layout; checked with both codecs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import msgspec
import pytest

from hetkv import errors
from hetkv.core import core as _core
from hetkv.reference.framefile import FILE_KEY, FrameWriter, read_frames, split_payload
from hetkv.reference.messages import Frame, Type
from hetkv.reference.payload import payload_parts
from hetkv.reference.wire import FRAME_BYTES

VECTORS = Path(__file__).parents[1] / "vectors"
FILES = json.loads((VECTORS / "files.json").read_text(encoding="utf-8"))
GOLDEN = (VECTORS / "good" / "frames.hkv").read_bytes()


def native_verdict(data: bytes) -> str:
    """Name of the error that a reader built on the C++ codec finds in a file of frames; empty where there is none."""
    names = {2: "MalformedError", 3: "UnsupportedError", 4: "AuthenticationError"}
    number = 0
    while data:
        opened = _core.wire_open(data[:FRAME_BYTES], FILE_KEY)
        if opened["code"]:
            return names[opened["code"]]
        if opened["type"] != Type.FRAME or len(data) < FRAME_BYTES + opened["body"]["payload_length"]:
            return "MalformedError"
        if opened["sequence"] != number:
            return "AuthenticationError"
        body = opened["body"]
        payload = data[FRAME_BYTES : FRAME_BYTES + body["payload_length"]]
        seed = _core.wire_checksum_seed(opened["request_id"], opened["epoch"], body)
        if _core.wire_checksum(payload, seed) != body["checksum"]:
            return "ChecksumError"
        data = data[FRAME_BYTES + len(payload) :]
        number += 1
    return ""


def test_golden_file_round_trips() -> None:
    frames = list(read_frames(io.BytesIO(GOLDEN)))
    assert [frame for _, frame, _ in frames] == [msgspec.convert(value, Frame) for value in FILES["good"]]
    assert native_verdict(GOLDEN) == ""
    copy = io.BytesIO()
    writer = FrameWriter(copy)
    for prelude, frame, payload in frames:
        assert writer.write(prelude.request_id, prelude.epoch, frame, split_payload(frame, payload)) == frame
    assert copy.getvalue() == GOLDEN


def test_every_file_is_described() -> None:
    assert {path.stem for path in (VECTORS / "bad").glob("*.hkv")} == set(FILES["bad"])


@pytest.mark.parametrize("name", FILES["bad"])
def test_broken_file(name: str) -> None:
    vector = FILES["bad"][name]
    data = (VECTORS / "bad" / f"{name}.hkv").read_bytes()
    with pytest.raises(errors.HetkvError) as caught:
        list(read_frames(io.BytesIO(data)))
    assert type(caught.value).__name__ == vector["error"]
    assert vector["text"] in str(caught.value)
    assert native_verdict(data) == vector["error"]


def test_parts_start_at_multiples_of_8_and_padding_is_zeros() -> None:
    _, frame, payload = list(read_frames(io.BytesIO(GOLDEN)))[1]
    parts = payload_parts(frame)
    assert [(part.segment, part.offset, part.bytes) for part in parts] == [(0, 0, 1533), (1, 1536, 36), (2, 1576, 378)]
    assert payload[1533:1536] == bytes(3)
    assert payload[1572:1576] == bytes(4)
    assert payload[1954:] == bytes(6)
    assert len(payload) == 1960


def test_frames_before_a_fault_are_still_read() -> None:
    reader = read_frames(io.BytesIO(GOLDEN[:-1]))
    assert next(reader)[0].sequence == 0
    assert next(reader)[0].sequence == 1
    with pytest.raises(errors.MalformedError, match="frame 2 at byte"):
        next(reader)


def test_a_header_cannot_make_the_reader_allocate_what_the_file_does_not_have() -> None:
    file = io.BytesIO()
    frame = Frame(0, 1, 0, 0, 1, 0, 8, (9, 0, 0, 0), (1, 0, 0, 0))
    FrameWriter(file).write(b"r" * 16, 1, frame, {0: bytes(8)})
    header = _core.wire_open(file.getvalue()[:FRAME_BYTES], FILE_KEY)["body"]
    huge = {**header, "token_stop": 1 << 40, "payload_length": 1 << 40}
    data = _core.wire_encode(Type.FRAME, 0, b"r" * 16, 1, huge, FILE_KEY) + bytes(64)
    with pytest.raises(errors.MalformedError, match=f"payload is cut short: 64 of {1 << 40} bytes"):
        list(read_frames(io.BytesIO(data)))


def test_writer_names_a_part_of_the_wrong_length() -> None:
    frame = Frame(0, 3, 0, 0, 1, 0, 1, (9, 9, 0, 0), (8, 8, 0, 0))
    with pytest.raises(errors.InputError, match="segment 1 has 7 bytes; the frame makes it 8"):
        FrameWriter(io.BytesIO()).write(b"r" * 16, 1, frame, {0: bytes(8), 1: bytes(7)})


def test_key_is_checked() -> None:
    with pytest.raises(errors.AuthenticationError, match="frame 0 at byte 0: MAC of a frame"):
        list(read_frames(io.BytesIO(GOLDEN), key=b"k" * 16))
