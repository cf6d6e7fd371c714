"""An operator's serving runs as CSV: one line for each closed loop, aggregated or disaggregated."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from hetkv.costmodel.calibration.datasets import ServingRow, Side
from hetkv.costmodel.catalogue import DTYPE_BYTES
from hetkv.errors import InputError

COLUMNS = ("gpu", "engine", "version", "model", "dtype", "tp", "prompt", "output", "concurrency", "tpot_ms")
OPTIONAL = ("ttft_ms", "dp", "workers", "prefill_tp", "prefill_dp", "prefill_workers")


def read_csv(path: Path) -> list[ServingRow]:
    """Rows of `COLUMNS`, and of `OPTIONAL` where there are any; `prefill_tp` makes a disaggregated run.

    Errors name file, line and column; an unknown column is one.
    """
    rows = []
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        for name in COLUMNS:
            if name not in (reader.fieldnames or ()):
                raise InputError(f"{path}: missing column `{name}`; expected {', '.join(COLUMNS)}")
        for name in reader.fieldnames or ():
            if name not in COLUMNS + OPTIONAL:
                raise InputError(f"{path}: unknown column `{name}`; known are {', '.join(COLUMNS + OPTIONAL)}")
        for line, row in enumerate(reader, start=2):
            rows.append(_row(row, f"{path}:{line}", f"{path.name}:{line}"))
    if not rows:
        raise InputError(f"{path}: no rows")
    return rows


def _row(row: dict[str, Any], where: str, name: str) -> ServingRow:
    if row["dtype"] not in DTYPE_BYTES:
        raise InputError(f"{where}: unknown dtype {row['dtype']!r}; known are {', '.join(DTYPE_BYTES)}")

    def whole(column: str, default: int | None = None) -> int:
        if default is not None and not row.get(column):
            return default
        value = _number(row, column, where)
        if value != int(value):
            raise InputError(f"{where}: `{column}` must be positive and whole, got {value:g}")
        return int(value)

    prefill = None
    if row.get("prefill_tp"):
        prefill = Side(whole("prefill_tp"), whole("prefill_dp", 1), whole("prefill_workers", 1))
    return ServingRow(
        id=name,
        source="user",
        gpu=row["gpu"],
        engine=row["engine"],
        version=row["version"],
        model=row["model"],
        dtype=row["dtype"],
        prompt=whole("prompt"),
        output=whole("output"),
        concurrency=whole("concurrency"),
        decode=Side(whole("tp"), whole("dp", 1), whole("workers", 1)),
        prefill=prefill,
        ttft_s=_number(row, "ttft_ms", where) / 1e3 if row.get("ttft_ms") else 0.0,
        tpot_s=_number(row, "tpot_ms", where) / 1e3,
    )


def _number(row: dict[str, Any], column: str, where: str) -> float:
    try:
        value = float(row[column])
    except (TypeError, ValueError):
        raise InputError(f"{where}: `{column}` must be a number, got {row[column]!r}") from None
    if not 0 < value < float("inf"):
        raise InputError(f"{where}: `{column}` must be positive, got {value:g}")
    return value
