"""`hetkv bench codec`: what codecs of payloads save, what they cost, and from which link rate on they stop helping.

On the wire (`TransferConfig.codec`) are fp8, int4 and, as `lossless` and `auto`, split + zstd -50; `--mbit` moves KV
with each and without between two network namespaces. See docs/codecs.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hetkv.bench.coders import Lz4, Split, Zstd
from hetkv.bench.kv_samples import Sample, samples
from hetkv.errors import BenchmarkError, InputError

LINKS_GBIT = 1, 10, 25, 100, 400
CHUNK_BYTES = 1 << 20
"""A slot's: what one call of a coder gets."""
CODERS: dict[str, Callable[[Literal["bf16", "fp16"]], Any]] = {
    "lz4": lambda _: Lz4(),
    "zstd 1": lambda _: Zstd(1),
    "split + lz4": lambda dtype: Split(Lz4(), dtype),
    "split + zstd 1": lambda dtype: Split(Zstd(1), dtype),
    "split + zstd 3": lambda dtype: Split(Zstd(3), dtype),
    "split + zstd -50": lambda dtype: Split(Zstd(-50), dtype),
}
LOSSY: tuple[Literal["fp8", "int4"], ...] = ("fp8", "int4")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `hetkv bench codec`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw what gets through over the link's rate")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds (default 5)")
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="a checkpoint whose KV transformers computes (default: the demo's)"
    )
    parser.add_argument(
        "--mbit",
        type=float,
        action="append",
        metavar="N",
        help="a link of that rate, by tbf, with each codec; repeatable",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, write the JSON."""
    from hetkv import terminal
    from hetkv.bench import namespaces
    from hetkv.bench.codec_link import measure_link, show_links
    from hetkv.bench.environment import environment

    if args.rounds < 1:
        raise InputError("--rounds: at least 1")
    if args.mbit and (why := namespaces.why_not(True)):
        raise BenchmarkError(why)
    terminal.check_outputs({"json": args.json, "plot": args.plot})
    console, load, rows = terminal.console(args.json), os.getloadavg()[0], []
    for sample in samples(args.model):
        rows += [measure(sample, name, make, args.rounds) for name, make in CODERS.items()]
        rows += [measure_lossy(sample, name, args.rounds) for name in LOSSY]
    show(console, rows)
    links = [measure_link(rate, args.rounds) for rate in args.mbit or []]
    show_links(console, links)
    if args.plot:
        from hetkv.bench.codec_plot import draw

        draw({"results": rows, "links": links}, args.plot)
    if args.json:
        note = (
            "GB/s: 10^9 bytes of the pool a second of one thread's CPU time, medians of rounds; effective_gb_s: "
            "min(encode, link x ratio, decode) by link rate in Gbit/s, stages that overlap; links: seconds of the clock"
        )
        report = {**environment(), "rounds": args.rounds, "load_average": round(load, 2), "note": note}
        terminal.write_json(args.json, {**report, "results": rows, "links": links})
    return 0


def measure(sample: Sample, name: str, make: Callable[..., Any], rounds: int) -> dict[str, Any]:
    """One lossless coder on one sample, chunk by chunk; every bit is compared."""
    coder = make(sample.dtype)
    chunks = [sample.data[at : at + CHUNK_BYTES] for at in range(0, len(sample.data), CHUNK_BYTES)]
    encode_s, decode_s, size = [], [], 0
    for _ in range(rounds):
        taken = [0.0, 0.0]
        size = 0
        for chunk in chunks:
            began = time.thread_time()
            coded = coder.encode(chunk)
            middle = time.thread_time()
            plain = coder.decode(coded, len(chunk))
            taken = [taken[0] + middle - began, taken[1] + time.thread_time() - middle]
            size += coded.size
            if not np.array_equal(plain, chunk):
                raise BenchmarkError(f"{name} has not given back the bits of {sample.name}")
        encode_s.append(taken[0])
        decode_s.append(taken[1])
    return _row(sample, name, len(sample.data) / size, encode_s, decode_s)


def measure_lossy(sample: Sample, name: Literal["fp8", "int4"], rounds: int) -> dict[str, Any]:
    """The wire's own: pack to codes and scales, unpack to the pool's dtype. The pack is what would run anyway."""
    from hetkv.bench.lossy_stage import LossyStage

    stage = LossyStage(sample, name)
    encode_s, decode_s = [], []
    for _ in range(rounds):
        began = time.thread_time()
        stage.pack()
        middle = time.thread_time()
        stage.unpack()
        encode_s.append(middle - began)
        decode_s.append(time.thread_time() - middle)
    row = _row(sample, name, stage.pool_bytes / stage.wire_bytes, encode_s, decode_s, stage.pool_bytes)
    return {**row, "lossless": False, "relative_error_rms": round(stage.relative_error(), 5)}


def _row(
    sample: Sample, name: str, ratio: float, encode_s: list[float], decode_s: list[float], size: int = 0
) -> dict[str, Any]:
    encode, decode = ((size or len(sample.data)) / statistics.median(taken) / 1e9 for taken in (encode_s, decode_s))
    return {
        "codec": name,
        "data": sample.name,
        "dtype": sample.dtype,
        "lossless": True,
        "ratio": round(ratio, 3),
        "encode_gb_s": round(encode, 3),
        "decode_gb_s": round(decode, 3),
        "effective_gb_s": {str(link): round(min(encode, decode, link / 8 * ratio), 3) for link in LINKS_GBIT},
        "gain": {str(link): round(min(encode, decode, link / 8 * ratio) / (link / 8), 2) for link in LINKS_GBIT},
    }


def show(console: Any, rows: list[dict[str, Any]]) -> None:
    """The table for people: gains below 1 are losses."""
    from rich.table import Table

    table = Table(
        "data", "codec", "ratio", "encode GB/s", "decode", *(f"{link} Gbit/s" for link in LINKS_GBIT), box=None
    )
    for row in rows:
        table.add_row(
            f"{row['data']}, {row['dtype']}",
            row["codec"],
            f"{row['ratio']:.2f}",
            f"{row['encode_gb_s']:.2f}",
            f"{row['decode_gb_s']:.2f}",
            *(f"{row['effective_gb_s'][str(link)]:.2f} ({row['gain'][str(link)]:.2f}x)" for link in LINKS_GBIT),
        )
    console.print(table)
