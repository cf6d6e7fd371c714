"""Codes are the same in C++, in Python and in the registry `docs/wire-codes.md`."""

from __future__ import annotations

import re
from pathlib import Path

from hetkv.control import handshake
from hetkv.core import core
from hetkv.errors import from_code, to_code
from hetkv.kv.dtypes import DType
from hetkv.reference import layout, messages

REGISTRY = (Path(__file__).parents[2] / "docs" / "wire-codes.md").read_text(encoding="utf-8")


def test_dtypes() -> None:
    assert core.dtype_codes() == {dtype.value: dtype.code for dtype in DType}


def test_errors() -> None:
    codes = core.status_codes()
    assert len(codes) == len(set(codes.values()))
    for name, code in codes.items():
        error = from_code(code, "")
        assert type(error).__name__ == name
        assert to_code(error) == code
    assert type(from_code(max(codes.values()) + 1, "")).__name__ == "TransferError"


def test_registry_of_abort_codes() -> None:
    rows = re.findall(r"^\| (\d+) \| .* \| `(\w+)` \| 1\.\d \|$", REGISTRY, re.MULTILINE)
    local = {"DeviceError", "PoolChecksumError"}  # go over the wire as a transport and as a checksum error
    assert {name: int(code) for code, name in rows} == {k: v for k, v in core.status_codes().items() if k not in local}
    assert len(rows) == messages.MAX_ABORT_CODE


def test_registry_of_messages() -> None:
    rows = re.findall(r"^\| (\w+) \| (\d+) \| [^|]+ \| 1\.\d \|$", REGISTRY, re.MULTILINE)
    assert {name: int(code) for name, code in rows} == {kind.name.lower(): kind.value for kind in messages.Type}


def test_registry_of_versions() -> None:
    assert f"`HKV1`, version {layout.MAJOR}.{layout.MINOR}\n" in REGISTRY
    assert f"`hetkvctl`, version {handshake.MAJOR}.{handshake.MINOR}\n" in REGISTRY
