"""The byte tables of docs/wire-format.md say what the codecs do."""

from __future__ import annotations

import json
import re
from pathlib import Path

from hetkv.kv.dtypes import DType
from hetkv.reference import wire
from hetkv.reference.messages import MAX_ABORT_CODE, Type

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "wire-format.md").read_text(encoding="utf-8")
GOOD = json.loads((ROOT / "tests" / "vectors" / "good.json").read_text(encoding="utf-8"))["vectors"]
KEYS = json.loads((ROOT / "tests" / "vectors" / "keys.json").read_text(encoding="utf-8"))["good"]
WIDTHS = {"u8": 1, "u16": 2, "u32": 4, "u64": 8, "u8 x 4": 4, "u32 x 4": 16}
WIDTHS |= {f"{count} bytes": count for count in (4, 8, 16, 64)}


def byte_table(heading: str) -> list[tuple[int, str, int]]:
    """Rows `(offset, field, width)` of the first byte table after `heading`."""
    rows = []
    for line in TEXT[TEXT.index(heading) :].splitlines()[1:]:
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 4 and cells[0].isdigit() and cells[2] in WIDTHS:
            rows.append((int(cells[0]), cells[1], WIDTHS[cells[2]]))
        elif rows:
            break
    return rows


def test_tables_are_gapless_and_aligned() -> None:
    rows = byte_table("Prelude, bytes 0 to 47:") + byte_table("**frame**")
    at = 0
    for offset, name, width in rows:
        assert offset == at, name
        assert offset % min(width, 8 if name != "dtypes" else 1) == 0, name
        at += width
    assert at == wire.FRAME_BYTES


def test_tables_read_the_golden_frames() -> None:
    for name, vector in GOOD.items():
        data = (ROOT / "tests" / "vectors" / "good" / f"{name}.bin").read_bytes()
        fields = {field: data[at : at + width] for at, field, width in byte_table("Prelude, bytes 0 to 47:")}
        assert int.from_bytes(fields["length"], "little") == len(data)
        assert Type(int.from_bytes(fields["type"], "little")).text == vector["type"]
        assert fields["request_id"].hex() == vector["request_id"]
        if vector["type"] != "frame":
            continue
        for at, field, width in byte_table("**frame**")[:-1]:
            value = vector["body"].get(field, 0)
            if isinstance(value, list):
                encoded = b"".join(item.to_bytes(width // 4, "little") for item in value)
            else:
                encoded = value.to_bytes(width, "little")
            assert data[at : at + width] == encoded, f"{name}: {field}"


def test_the_key_s_table_reads_the_golden_keys() -> None:
    rows = byte_table("cannot reach one sends host_only")
    assert [field for _, field, _ in rows][-1] == "length"
    for name, vector in KEYS.items():
        data, end = bytes.fromhex(vector["hex"]), 0
        fields = {**vector["fields"], "version": 1, "reserved": 0, "magic": b"hetkvwin".hex()}
        fields["backend"] = fields["backend"].encode().ljust(16, b"\0").hex()
        fields["ucx_length"] = len(fields["ucx"]) // 2
        for at, field, width in rows:
            assert at == end, field
            end = at + width
            value = fields[field]
            encoded = bytes.fromhex(value) if isinstance(value, str) else value.to_bytes(width, "little")
            assert data[at:end] == encoded, f"{name}: {field}"
        assert data[end:].hex() == fields["ucx"], name


def test_codes() -> None:
    types = re.findall(r"^\| (\d+) \| (\w+) \| (?:S|R|both) \|", TEXT, re.MULTILINE)
    assert {int(code): name for code, name in types} == {int(kind): kind.text for kind in Type}
    dtypes = dict(re.findall(r"\| (\d) \| ((?:float|bfloat|int|uint)\w+)", TEXT))
    assert {int(code): name for code, name in dtypes.items()} == {dtype.code: dtype.value for dtype in DType}
    codes = [int(code) for code in re.findall(r"(\d+) [a-zA-Z ]+", TEXT[TEXT.index("Codes: 1 ") :].split(".")[0])]
    assert codes == list(range(1, MAX_ABORT_CODE + 1))
    status = (ROOT / "csrc" / "status.h").read_text(encoding="utf-8").splitlines()
    own = [line for line in status if "on the wire it is" not in line]  # the others travel as one of these
    native = re.findall(r"k\w+ = (\d+),", "\n".join(own))
    assert max(map(int, native)) == MAX_ABORT_CODE
