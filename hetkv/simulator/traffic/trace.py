"""Traffic from files, read line by line: a trace of any length takes the memory of one row.

Azure 2023 and 2024, BurstGPT and plain CSV; Mooncake and Qwen-Bailian JSONL. Any of them may be gzipped, begin with a
byte order mark and end its lines with CR LF.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from io import TextIOWrapper
from itertools import islice
from math import inf
from pathlib import Path
from typing import IO, NamedTuple, NoReturn

import msgspec

from hetkv.errors import InputError
from hetkv.simulator.request import Request

AZURE_HEADER = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
CSV_HEADER = ["arrival_s", "prompt_tokens", "output_tokens"]
BURST_HEADER = ["Timestamp", "Model", "Request tokens", "Response tokens", "Total tokens", "Log Type"]
MOONCAKE_HASH_TOKENS, BAILIAN_HASH_TOKENS = 512, 16

Row = tuple[float, int, int, tuple[int, ...] | None]
"""(arrival in seconds, prompt tokens, output tokens, hashes of the prompt's blocks)."""


class Format(NamedTuple):
    """How a line becomes a row (None: a request that failed, left out), and the tokens of a hash; 0 without hashes."""

    parse: Callable[[str], Row | None]
    hash_tokens: int = 0
    header: bool = True


class Trace:
    """Recorded requests. Arrivals count from the first one, divided by `speedup`; `limit` keeps the first ones.

    The file is read twice: here, so that a broken line is said before anything runs, and by `requests`.
    """

    def __init__(self, path: str | Path, speedup: float = 1.0, limit: int | None = None) -> None:
        if not 0 < speedup < inf:
            raise InputError(f"speedup must be greater than 0, got {speedup}")
        if limit is not None and limit < 1:
            raise InputError(f"requests must be at least 1, got {limit}")
        self.path = str(path)
        self.speedup = speedup
        self.limit = limit
        self.count, self.hash_tokens = 0, 0
        for row in islice(iterate(path), limit):
            self.count += 1
            if row[3] is not None and not self.hash_tokens:
                self.hash_tokens = hash_tokens_of(row)
        if not self.count:
            raise InputError(f"{path}: no requests")

    @property
    def about(self) -> str:
        faster = f", {self.speedup:g} times as fast" if self.speedup != 1 else ""
        return f"{Path(self.path).name}: {self.count:,} requests{faster}"

    def requests(self, seed: int) -> Iterator[Request]:
        """The requests; `seed` changes nothing."""
        start: float | None = None
        for number, (arrival, prompt, output, hashes) in enumerate(islice(iterate(self.path), self.limit)):
            start = arrival if start is None else start
            yield Request(number, (arrival - start) / self.speedup, prompt, output, hashes)


def hash_tokens_of(row: Row) -> int:
    """The tokens that one hash of the row stands for; 0 where it has none."""
    if row[3] is None:
        return 0
    return MOONCAKE_HASH_TOKENS if len(row[3]) == -(-row[1] // MOONCAKE_HASH_TOKENS) else BAILIAN_HASH_TOKENS


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a trace file. A broken line is an `InputError` that names file, line and fault."""
    rows = list(iterate(path))
    if not rows:
        raise InputError(f"{path}: no requests")
    return rows


def iterate(path: str | Path) -> Iterator[Row]:
    """The rows of a trace file one by one; errors as for `read_rows`."""
    name, last, number = str(path), -inf, 0
    form: Format | None = None
    try:
        with _open(path) as file:
            for number, raw in enumerate(file, 1):
                line = raw.strip()
                if not line:
                    continue
                if form is None:
                    form = _format(line, name, number)
                    if form.header:
                        continue
                try:
                    row = form.parse(line)
                except (ValueError, msgspec.DecodeError) as error:
                    _broken(name, number, str(error))
                if row is None:
                    continue
                _check(row, form.hash_tokens, last, name, number)
                last = row[0]
                yield row
    except UnicodeDecodeError as error:
        _broken(name, number + 1, f"not UTF-8 text ({error.reason})")
    except (EOFError, gzip.BadGzipFile) as error:
        _broken(name, number + 1, f"the gzip file is broken ({error})")


def _open(path: str | Path) -> IO[str]:
    """The text of a file, unpacked where it begins as gzip does."""
    file = open(path, "rb")  # noqa: SIM115 (the wrapper closes it)
    magic = file.read(2)
    file.seek(0)
    binary = gzip.GzipFile(fileobj=file) if magic == b"\x1f\x8b" else file
    return TextIOWrapper(binary, encoding="utf-8-sig", newline="")


def _check(row: Row, hash_tokens: int, last: float, path: str, number: int) -> None:
    arrival, prompt, output, hashes = row
    if not 0 <= abs(arrival) < inf:
        _broken(path, number, f"arrival {arrival} is not a time")
    if arrival < last:
        _broken(path, number, f"arrives {last - arrival:.6f} s before the request above it")
    if prompt < 1 or output < 1:
        _broken(path, number, f"{prompt} prompt and {output} output tokens; both must be 1 or more")
    if hashes is not None and len(hashes) not in {-(-prompt // hash_tokens), _whole(prompt, hash_tokens)}:
        _broken(
            path,
            number,
            f"{len(hashes)} hash_ids for {prompt} tokens; blocks of {hash_tokens} need {-(-prompt // hash_tokens)}",
        )


def _whole(prompt: int, hash_tokens: int) -> int:
    """Qwen-Bailian may leave the last block out where it is not full; Mooncake has it."""
    return prompt // hash_tokens if hash_tokens == BAILIAN_HASH_TOKENS else -(-prompt // hash_tokens)


def _format(line: str, path: str, number: int) -> Format:
    """How to parse the file that begins with `line`."""
    if line.startswith("{"):
        try:
            keys = msgspec.json.decode(line, type=dict[str, msgspec.Raw]).keys()
        except msgspec.DecodeError as error:
            _broken(path, number, str(error))
        if "chat_id" in keys:
            return Format(_bailian_row, BAILIAN_HASH_TOKENS, header=False)
        if "hash_ids" in keys:
            return Format(_mooncake_row, MOONCAKE_HASH_TOKENS, header=False)
        return Format(_plain_json_row, header=False)
    fields = [f.strip() for f in line.split(",")]
    if fields == AZURE_HEADER:
        return Format(_azure_row)
    if fields == CSV_HEADER:
        return Format(_csv_row)
    if set(BURST_HEADER) <= set(fields):
        return Format(_burst(fields))
    raise InputError(
        f"{path}:{number}: not a known trace: expected JSON objects or one of the headers "
        f"`{','.join(AZURE_HEADER)}`, `{','.join(CSV_HEADER)}` and `{','.join(BURST_HEADER)}`, got {line[:60]!r}"
    )


AZURE_TIME = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d+))?(Z|[+-]\d\d:?\d\d)?")
EPOCH = datetime(2023, 1, 1, tzinfo=timezone.utc)


def _azure_row(line: str) -> Row:
    """`2023-11-16 18:15:46.6805900`, or `2024-05-10 00:00:00.009930+00:00` with the fraction left out where it is 0."""
    time, prompt, output = _fields(line, 3)
    match = AZURE_TIME.fullmatch(time)
    if match is None:
        raise ValueError(f"{time!r} is not a time such as 2023-11-16 18:15:46.6805900")
    whole, fraction, zone = match.groups()
    zone = "+00:00" if zone in (None, "Z") else zone if ":" in zone else f"{zone[:3]}:{zone[3:]}"
    seconds = (datetime.fromisoformat(whole + zone) - EPOCH).total_seconds()
    # Seconds may carry seven decimals, one more than datetime keeps.
    return seconds + (int(fraction) / 10 ** len(fraction) if fraction else 0.0), _count(prompt), _count(output), None


def _csv_row(line: str) -> Row:
    time, prompt, output = _fields(line, 3)
    return float(time), _count(prompt), _count(output), None


def _burst(header: list[str]) -> Callable[[str], Row | None]:
    """BurstGPT, with or without its later columns. A request without a response failed and is left out."""
    time, prompt, output = (header.index(name) for name in ("Timestamp", "Request tokens", "Response tokens"))

    def parse(line: str) -> Row | None:
        fields = _fields(line, len(header))
        if not _count(fields[output]):
            return None
        return float(fields[time]), _count(fields[prompt]), _count(fields[output]), None

    return parse


def _fields(line: str, count: int) -> list[str]:
    fields = line.split(",")
    if len(fields) != count:
        raise ValueError(f"{len(fields)} fields, expected {count}: {line[:60]!r}")
    return [f.strip() for f in fields]


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"{text!r} is not a number of tokens")
    return int(text)


class _Lengths(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int


class _Hashed(_Lengths):
    hash_ids: tuple[int, ...]


_decode_lengths = msgspec.json.Decoder(_Lengths).decode
_decode_hashed = msgspec.json.Decoder(_Hashed).decode


def _mooncake_row(line: str) -> Row:
    row = _decode_hashed(line)
    return row.timestamp / 1e3, row.input_length, row.output_length, row.hash_ids


def _plain_json_row(line: str) -> Row:
    """Mooncake without hashes: the same names, milliseconds."""
    row = _decode_lengths(line)
    return row.timestamp / 1e3, row.input_length, row.output_length, None


def _bailian_row(line: str) -> Row:
    """Qwen-Bailian: seconds, and hashes of 16 tokens."""
    row = _decode_hashed(line)
    return row.timestamp, row.input_length, row.output_length, row.hash_ids


def _broken(path: str, line: int, fault: str) -> NoReturn:
    raise InputError(f"{path}:{line}: {fault}") from None
