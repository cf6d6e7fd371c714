"""Traffic from files: Azure 2023 CSV, Mooncake JSONL, plain CSV."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from math import inf
from pathlib import Path
from typing import NoReturn

import msgspec

from hetkv.errors import InputError
from hetkv.simulator.request import Request

AZURE_HEADER = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
CSV_HEADER = ["arrival_s", "prompt_tokens", "output_tokens"]
MOONCAKE_HASH_TOKENS = 512

Row = tuple[float, int, int, tuple[int, ...] | None]
"""(arrival in seconds, prompt tokens, output tokens, hashes of the prompt's blocks)."""


class Trace:
    """Recorded requests. Arrivals count from the first one, divided by `speedup`; `limit` keeps the first ones."""

    def __init__(self, path: str | Path, speedup: float = 1.0, limit: int | None = None) -> None:
        if not 0 < speedup < inf:
            raise InputError(f"speedup must be greater than 0, got {speedup}")
        if limit is not None and limit < 1:
            raise InputError(f"requests must be at least 1, got {limit}")
        self.path = str(path)
        self.speedup = speedup
        self.rows = read_rows(path)[:limit]
        self.hash_tokens = MOONCAKE_HASH_TOKENS if any(row[3] is not None for row in self.rows) else 0

    @property
    def about(self) -> str:
        faster = f", {self.speedup:g} times as fast" if self.speedup != 1 else ""
        return f"{Path(self.path).name}: {len(self.rows):,} requests{faster}"

    def requests(self, seed: int) -> Iterator[Request]:
        """The requests; `seed` changes nothing."""
        start = self.rows[0][0]
        for number, (arrival, prompt, output, hashes) in enumerate(self.rows):
            yield Request(number, (arrival - start) / self.speedup, prompt, output, hashes)


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a trace file. A broken line is an `InputError` that names file, line and fault."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = _parse(file, str(path))
    if not rows:
        raise InputError(f"{path}: no requests")
    return rows


def _parse(lines: Iterable[str], path: str) -> list[Row]:
    rows: list[Row] = []
    parse: Callable[[str], Row] | None = None
    last = -inf
    number = 0
    try:
        for number, raw in enumerate(lines, 1):
            line = raw.strip()
            if not line:
                continue
            if parse is None:
                parse, header = _format(line, path, number)
                if header:
                    continue
            try:
                row = parse(line)
            except (ValueError, msgspec.DecodeError) as error:
                _broken(path, number, str(error))
            arrival, prompt, output, hashes = row
            if not 0 <= abs(arrival) < inf:
                _broken(path, number, f"arrival {arrival} is not a time")
            if arrival < last:
                _broken(path, number, f"arrives {last - arrival:.6f} s before the request above it")
            if prompt < 1 or output < 1:
                _broken(path, number, f"{prompt} prompt and {output} output tokens; both must be 1 or more")
            if hashes is not None and len(hashes) != -(-prompt // MOONCAKE_HASH_TOKENS):
                _broken(
                    path,
                    number,
                    f"{len(hashes)} hash_ids for {prompt} tokens; blocks of {MOONCAKE_HASH_TOKENS} need "
                    f"{-(-prompt // MOONCAKE_HASH_TOKENS)}",
                )
            last = arrival
            rows.append(row)
    except UnicodeDecodeError as error:
        _broken(path, number + 1, f"not UTF-8 text ({error.reason})")
    return rows


def _format(line: str, path: str, number: int) -> tuple[Callable[[str], Row], bool]:
    """How to parse the file that begins with `line`, and whether that is a header."""
    if line.startswith("{"):
        return _mooncake_row, False
    fields = [f.strip() for f in line.lstrip("\ufeff").split(",")]
    if fields == AZURE_HEADER:
        return _azure_row, True
    if fields == CSV_HEADER:
        return _csv_row, True
    raise InputError(
        f"{path}:{number}: not a known trace: expected JSON objects or one of the headers "
        f"`{','.join(AZURE_HEADER)}` and `{','.join(CSV_HEADER)}`, got {line[:60]!r}"
    )


def _azure_row(line: str) -> Row:
    time, prompt, output = _fields(line)
    # Seconds carry seven decimals, one more than datetime keeps.
    whole, _, fraction = time.partition(".")
    if not fraction.isdigit():
        raise ValueError(f"{time!r} is not a time such as 2023-11-16 18:15:46.6805900")
    seconds = (datetime.fromisoformat(whole) - datetime(2023, 1, 1)).total_seconds()
    return seconds + int(fraction) / 10 ** len(fraction), _count(prompt), _count(output), None


def _csv_row(line: str) -> Row:
    time, prompt, output = _fields(line)
    return float(time), _count(prompt), _count(output), None


def _fields(line: str) -> list[str]:
    fields = line.split(",")
    if len(fields) != 3:
        raise ValueError(f"{len(fields)} fields, expected 3: {line[:60]!r}")
    return [f.strip() for f in fields]


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"{text!r} is not a number of tokens")
    return int(text)


class _Mooncake(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


_decode_mooncake = msgspec.json.Decoder(_Mooncake).decode


def _mooncake_row(line: str) -> Row:
    row = _decode_mooncake(line)
    return row.timestamp / 1e3, row.input_length, row.output_length, row.hash_ids


def _broken(path: str, line: int, fault: str) -> NoReturn:
    raise InputError(f"{path}:{line}: {fault}") from None
