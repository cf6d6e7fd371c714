"""Writes what the fuzzers in this folder begin with, from the golden vectors: `python -m tests.fuzz.seeds [FOLDER]`.

The fuzzer of messages begins with the vectors themselves. The formats of the others are in the head of each `.cpp`.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

from hetkv.control.description import Accept, Description, Ready, Rejection, Streaming, encode
from hetkv.control.handshake import MINOR
from hetkv.kv.spec import KVSpec
from tests.control.peers import describe

VECTORS = Path(__file__).parents[1] / "vectors"
MESSAGE, PAYLOAD, WINDOW, CODED = 1, 2, 3, 4
SPEC = KVSpec.uniform(2, 2, 16)


def description(role: str, **changes: object) -> Description:
    """A description without anything of this machine."""
    return describe(role, SPEC, **{"host": "kernel/namespace", "engine": b"\1" * 16, **changes})  # type: ignore[arg-type]


def frame(kind: int, body: bytes, number: int = 0, offset: int = 0, flags: int = 0) -> bytes:
    """One frame of the data plane, as the stream fuzzer reads it."""
    return struct.pack("<BIB3xQIIQ", flags, len(body), kind, number, 3, 1, offset) + body


def streams() -> dict[str, bytes]:
    """Frames in the order in which a sender sends them."""
    ticket, commit = ((VECTORS / "good" / f"{name}.bin").read_bytes() for name in ("ticket", "frame"))
    window = frame(WINDOW, b"", 0, 4096, flags=2)
    parts = [frame(PAYLOAD, bytes(range(64)) * 4, number, number * 256) for number in range(3)]
    parts_of = json.loads((VECTORS / "coded_parts.json").read_text(encoding="utf-8"))
    good, bad = ({name: bytes.fromhex(part["coded"]) for name, part in parts_of[kind].items()} for kind in parts_of)
    codes = json.loads((VECTORS / "int4_parts.json").read_text(encoding="utf-8"))
    good |= {f"int4 {name}": bytes.fromhex(part["coded"]) for name, part in codes["good"].items()}
    coded = [frame(CODED, part, number, number * 8192) for number, part in enumerate(good.values())]
    return {
        "coded": b"\3" + b"".join(coded) + frame(MESSAGE, commit, len(coded)),
        "coded-cut": b"\0" + frame(CODED, bad["cut-stream"]),
        "coded-less": b"\0" + frame(CODED, bad["less"]),
        "coded-int4": b"\0" + frame(CODED, bytes.fromhex(codes["bad"]["bit-too-many"]["coded"])),
        "message": b"\0" + frame(MESSAGE, ticket),
        "payloads": b"\1" + b"".join(parts) + frame(MESSAGE, commit, 3),
        "window": b"\0" + window + frame(MESSAGE, ticket),
        "turns": b"\7" + frame(MESSAGE, ticket, flags=4) + frame(PAYLOAD, b"x" * 100, flags=4) + frame(MESSAGE, commit),
        "foreign": b"\0" + frame(7, b"abc") + frame(MESSAGE, ticket),
        "mac": b"\0" + frame(MESSAGE, ticket, flags=1),
    }


def keys() -> dict[str, bytes]:
    """Keys of slots in device memory and in host memory."""
    golden = json.loads((VECTORS / "keys.json").read_text(encoding="utf-8"))["good"]
    out = {name: bytes.fromhex(vector["hex"]) for name, vector in golden.items()}
    for name, flags, rma in (("host-shared", 1, b""), ("host-rma", 0, b"ucx's own")):
        out[name] = struct.pack("<8sIIII", b"hetkvmem", 1, flags, len(rma), 0) + rma
    return out


def pair(first: bytes, second: bytes) -> bytes:
    """Two messages of the control channel."""
    return struct.pack("<H", len(first)) + first + second


def control() -> dict[str, bytes]:
    """Pairs of messages."""
    mine, theirs = encode(description("receiver")), encode(description("sender"))
    other = encode(description("sender", instance="other", fingerprint={"weights": "a"}, slot_bytes=0))
    return {
        "fit": pair(mine, theirs),
        "other": pair(mine, other),
        "short": pair(encode(Accept()), encode(Ready())),
        "rejection": pair(encode(Rejection("role", "a", "b", "why")), encode(Streaming("unix", 1))),
    }


def records(*payloads: bytes, spoilt: bool = False) -> bytes:
    """A peer with the secret."""
    head = b"\1" + struct.pack("<H32s", MINOR, b"1.0")
    return head + b"".join(struct.pack("<H", len(one) | spoilt << 15) + one for one in payloads)


def handshakes() -> dict[str, bytes]:
    """A stranger, peers and calls for streams."""
    hello = struct.pack("<8sHHIB7x32s32s", b"hetkvctl", 2, MINOR, 88, 1, b"\x11" * 32, b"1.0")
    call = struct.pack("<HHIQH6x", 2, MINOR, 64, 7, 0)
    mine = encode(description("sender"))
    return {
        "stranger": b"\0" + hello + struct.pack("<B3x32s", 1, bytes(32)),
        "web": b"\0GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        "stream-of-a-stranger": b"\0hetkvdat" + call + bytes(32),
        "peer": records(mine, encode(Accept()), encode(Streaming("unix", 1))),
        "peer-streams": records(mine, encode(Accept()), encode(Streaming("tcp", 1))),
        "peer-rejects": records(mine, encode(Rejection("role", "a", "b", "why"))),
        "peer-spoilt": records(mine, spoilt=True),
        "call": b"\2\0" + call,
        "call-wrong-tag": b"\2\1" + call,
    }


def main(folder: Path) -> None:
    """Writes one folder for each fuzzer."""
    for name, made in {"stream": streams(), "keys": keys(), "control": control(), "handshake": handshakes()}.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for seed, data in made.items():
            (folder / name / seed).write_bytes(data)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "seeds")
