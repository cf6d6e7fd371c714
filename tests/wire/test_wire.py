"""Wire format: both codecs against the golden and malformed vectors, and against each other on single values."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from hetkv import errors
from hetkv.core import core as _core
from hetkv.kv.dtypes import DType
from hetkv.reference import messages as m
from hetkv.reference import wire
from hetkv.reference.checksum import payload_checksum, siphash24

VECTORS = Path(__file__).parents[1] / "vectors"
GOOD = json.loads((VECTORS / "good.json").read_text(encoding="utf-8"))
BAD = json.loads((VECTORS / "bad.json").read_text(encoding="utf-8"))
SIPHASH = json.loads((VECTORS / "siphash.json").read_text(encoding="utf-8"))
KEY = bytes.fromhex(GOOD["key"])
CODES = {"MalformedError": 2, "UnsupportedError": 3, "AuthenticationError": 4}


def body_of(kind: m.Type, value: dict | None) -> m.Body:
    """A body from its JSON description."""
    if kind is m.Type.GRANT:
        return m.Grant(tuple(m.SlotGrant(**{**slot, "rkey": bytes.fromhex(slot["rkey"])}) for slot in value["slots"]))
    if kind is m.Type.BUNDLE:
        records = [{**record, "request_id": bytes.fromhex(record["request_id"])} for record in value["records"]]
        return msgspec.convert({**value, "records": records}, m.Bundle, builtin_types=(bytes,))
    if kind is m.Type.BOUND_TICKET:
        value = {**value, "content": bytes.fromhex(value["content"])}
    return msgspec.convert(value, m.BODIES[kind])


def fields_of(body: m.Body) -> dict:
    """A body as the extension's dict of fields."""
    return {} if body is None else msgspec.to_builtins(body, builtin_types=(bytes,))


def native_body(fields: dict | None, kind: m.Type) -> m.Body:
    """The extension's dict of fields as a body."""
    return None if fields is None else msgspec.convert(fields, m.BODIES[kind], builtin_types=(bytes,))


def test_every_type_and_dtype_has_a_golden_frame() -> None:
    assert {vector["type"] for vector in GOOD["vectors"].values()} == {kind.text for kind in m.Type}
    frames = [vector["body"] for vector in GOOD["vectors"].values() if vector["type"] == "frame"]
    assert {code for frame in frames for code in frame["dtypes"]} == {0, *(dtype.code for dtype in DType)}


def test_every_vector_is_described() -> None:
    assert {path.stem for path in (VECTORS / "good").glob("*.bin")} == set(GOOD["vectors"])
    assert {path.stem for path in (VECTORS / "bad").glob("*.bin")} == set(BAD["vectors"])


@pytest.mark.parametrize("name", GOOD["vectors"])
def test_golden(name: str) -> None:
    vector = GOOD["vectors"][name]
    kind = m.Type[vector["type"].upper()]
    data = (VECTORS / "good" / f"{name}.bin").read_bytes()
    prelude = m.Prelude(kind, vector["sequence"], bytes.fromhex(vector["request_id"]), vector["epoch"])
    body = body_of(kind, vector["body"])
    assert wire.decode(data, KEY) == (prelude, body)
    assert wire.encode(prelude, body, KEY) == data

    opened = _core.wire_open(data, KEY)
    assert (opened["code"], opened["detail"]) == (0, "")
    assert m.Prelude(m.Type(opened["type"]), opened["sequence"], opened["request_id"], opened["epoch"]) == prelude
    assert native_body(opened["body"], kind) == body
    native = _core.wire_encode(kind, prelude.sequence, prelude.request_id, prelude.epoch, fields_of(body), KEY)
    assert native == data


def test_messages_of_the_first_minor_are_read() -> None:
    """1.0 differs by its minor byte alone; a reader judges the codes that it finds."""
    for path in sorted((VECTORS / "good").glob("*.bin")):
        data = path.read_bytes()
        older = wire.seal(data[:5] + bytes([0]) + data[6:-8], KEY)
        assert wire.decode(older, KEY) == wire.decode(data, KEY)
        assert _core.wire_open(older, KEY)["body"] == _core.wire_open(data, KEY)["body"]


@pytest.mark.parametrize("name", BAD["vectors"])
def test_malformed(name: str) -> None:
    vector = BAD["vectors"][name]
    data = (VECTORS / "bad" / f"{name}.bin").read_bytes()
    with pytest.raises(errors.HetkvError) as caught:
        wire.decode(data, KEY)
    assert type(caught.value).__name__ == vector["error"]
    assert vector["text"] in str(caught.value)
    opened = _core.wire_open(data, KEY)
    assert opened["code"] == CODES[vector["error"]]
    assert opened["detail"] == str(caught.value)
    assert opened["body"] is None


def test_vectors_are_what_make_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(VECTORS / "make.py"), str(tmp_path)], check=True, cwd=VECTORS.parents[1],
                   env={"PYTHONPATH": str(VECTORS.parents[1]), "PATH": ""})  # fmt: skip
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert made == {path: (VECTORS / path).read_bytes() for path in made}
    kept = {path.relative_to(VECTORS) for path in VECTORS.rglob("*") if path.suffix in (".bin", ".hkv")}
    assert kept <= set(made)


@pytest.mark.parametrize("length", range(64))
def test_siphash_matches_its_published_vectors(length: int) -> None:
    key, data = bytes.fromhex(SIPHASH["key"]), bytes(range(length))
    digest = int.from_bytes(bytes.fromhex(SIPHASH["digests"][length]), "little")
    assert siphash24(key, data) == digest
    assert _core.siphash24(key, data) == digest


@pytest.mark.parametrize("data", [b"", b"\1", bytes(8), bytes(range(256)), b"\xff" * 4099])
def test_checksums_agree(data: bytes) -> None:
    for seed in (0, 1, 2**64 - 1):
        assert payload_checksum(data, seed) == _core.wire_checksum(data, seed)
    assert payload_checksum(data, 7) == payload_checksum(data + bytes(-len(data) % 8), 7)


def test_checksum_is_the_documented_formula() -> None:
    step, seed, words = 0x9E3779B97F4A7C15, 0x1234, [5, 0, 2**64 - 1]
    total = 0
    for index, word in enumerate(words):
        x = word ^ (seed + (index + 1) * step) % 2**64
        total += x % 2**32 * (x >> 32) + word
    assert payload_checksum(b"".join(word.to_bytes(8, "little") for word in words), seed) == total % 2**64


def golden_frame() -> tuple[m.Prelude, m.Frame]:
    prelude, body = wire.decode((VECTORS / "good" / "frame.bin").read_bytes(), KEY)
    assert isinstance(body, m.Frame)
    return prelude, body


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"slot": 9}, True),
        ({"generation": 9}, True),
        ({"checksum": 9}, True),
        ({"saturated": 9}, True),
        ({"layer": 9}, False),
        ({"group": 9}, False),
        ({"head_start": 5}, False),
        ({"head_stop": 9}, False),
        ({"token_start": 33}, False),
        ({"token_stop": 99}, False),
        ({"dtypes": (2, 3, 0, 0)}, False),
        ({"channels": (64, 64, 0, 0)}, False),
    ],
)
def test_seed_says_what_a_frame_is_and_not_where_it_travels(changes: dict, same: bool) -> None:
    prelude, frame = golden_frame()
    changed = msgspec.structs.replace(frame, **changes)
    seed = wire.checksum_seed(prelude, changed)
    assert (seed == wire.checksum_seed(prelude, frame)) is same
    assert seed == _core.wire_checksum_seed(prelude.request_id, prelude.epoch, fields_of(changed))


def test_seed_depends_on_request_and_epoch_but_not_on_the_sequence() -> None:
    prelude, frame = golden_frame()
    seed = wire.checksum_seed(prelude, frame)
    replace = msgspec.structs.replace
    assert wire.checksum_seed(replace(prelude, sequence=99), frame) == seed
    assert wire.checksum_seed(replace(prelude, epoch=99), frame) != seed
    assert wire.checksum_seed(replace(prelude, request_id=bytes(15) + b"\1"), frame) != seed


@pytest.mark.parametrize(
    ("prelude", "body", "text"),
    [
        (m.Prelude(m.Type.HEARTBEAT), None, "body of a heartbeat is a NoneType"),
        (m.Prelude(m.Type.HEARTBEAT, -1), m.Heartbeat(1), "not a valid heartbeat"),
        (m.Prelude(m.Type.HEARTBEAT), m.Heartbeat(2**64), "not a valid heartbeat"),
        (
            m.Prelude(m.Type.HEARTBEAT, 0, b"short"),
            m.Heartbeat(1),
            "request_id has 5 bytes, not 16",
        ),
        (
            m.Prelude(m.Type.TICKET, 0, b"r" * 16, 1),
            m.Ticket(1, ()),
            "not a valid ticket: ticket: num_groups is 0",
        ),
        (
            m.Prelude(m.Type.TICKET, 0, b"r" * 16, 1),
            m.Ticket(1, ((0, 1),) * 4093),
            "length 65552 is over the limit of 65536",
        ),
        (
            m.Prelude(m.Type.ABORT, 0, b"r" * 16, 1),
            m.Abort(1, "x" * 513),
            "reason_length 513 is over the limit",
        ),
        (m.Prelude(m.Type.ABORT, 0, b"r" * 16, 1), m.Abort(1, "\ud800"), "surrogates not allowed"),
    ],
)
def test_encode_rejects_what_decode_would(prelude: m.Prelude, body: m.Body, text: str) -> None:
    with pytest.raises(errors.InputError, match=text):
        wire.encode(prelude, body, KEY)


@pytest.mark.parametrize(
    ("reason", "kept"),
    [
        (b"x" * 600, "x" * 512),
        (b"x" * 511 + "\u00e9".encode(), "x" * 511),
        (b"a\xffb\xc3", "a?b?"),
        ("\U0001f600".encode() * 200, "\U0001f600" * 128),
        (b"\xed\xa0\x80", "???"),
    ],
)
def test_native_abort_reason_is_always_valid(reason: bytes, kept: str) -> None:
    message = _core.wire_encode(m.Type.ABORT, 0, b"r" * 16, 0, {"code": 1, "reason": reason}, KEY)
    assert wire.decode(message, KEY)[1] == m.Abort(1, kept)
