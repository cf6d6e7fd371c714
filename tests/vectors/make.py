"""Writes the golden and malformed vectors of wire format v1 in this folder, with the Python codec alone.

    python tests/vectors/make.py [FOLDER]

`good.json` and `bad.json` describe `good/*.bin` and `bad/*.bin`; `files.json` describes the files of frames `*.hkv`;
`keys.json` holds keys of slots in device memory whole, in hexadecimal.
A vector is changed only together with docs/wire-format.md and the version.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import msgspec
from bad_vectors import Bad, bad_vectors
from file_vectors import bad_files, frame_file
from good_vectors import GOOD, KEY, message
from window_keys import key_vectors

from hetkv.reference import messages as m


def main(folder: Path) -> None:
    """Writes all vectors into `folder`."""

    def describe(vectors: dict[str, Bad]) -> dict[str, dict[str, str]]:
        return {name: {"about": bad.about, "error": bad.error, "text": bad.text} for name, bad in vectors.items()}

    def dump(name: str, value: object) -> None:
        (folder / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    for kind in ("good", "bad"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    good: dict[str, object] = {}
    for name, (about, body, kind) in GOOD.items():
        data = message(body, kind)
        (folder / "good" / f"{name}.bin").write_bytes(data)
        prelude = {"sequence": 2, "request_id": data[24:40].hex(), "epoch": int.from_bytes(data[40:48], "little")}
        good[name] = {"about": about, "type": kind.text, **prelude, "body": plain(body)}
    dump("good.json", {"key": KEY.hex(), "vectors": good})
    bad = bad_vectors()
    for name, vector in bad.items():
        (folder / "bad" / f"{name}.bin").write_bytes(vector.data)
    dump("bad.json", {"key": KEY.hex(), "vectors": describe(bad)})
    data, frames = frame_file()
    (folder / "good" / "frames.hkv").write_bytes(data)
    broken = bad_files(data, frames)
    for name, vector in broken.items():
        (folder / "bad" / f"{name}.hkv").write_bytes(vector.data)
    dump("keys.json", key_vectors())
    dump("files.json", {"good": [plain(item) for item in frames], "bad": describe(broken)})


def plain(body: m.Body) -> object:
    """A body as JSON: bytes in hexadecimal."""
    value = msgspec.to_builtins(body, builtin_types=(bytes,))
    for slot in value["slots"] if isinstance(body, m.Grant) else []:
        slot["rkey"] = slot["rkey"].hex()
    if isinstance(body, m.BoundTicket):
        value["content"] = body.content.hex()
    for record in value["records"] if isinstance(body, m.Bundle) else []:
        record["request_id"] = record["request_id"].hex()
    return value


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
