"""KV through a link of a given rate between two network namespaces, with each codec and without, in turns."""

from __future__ import annotations

import contextlib
import statistics
from typing import Any

from hetkv.bench import namespaces
from hetkv.bench.pair import Pair, Shape
from hetkv.errors import BenchmarkError
from hetkv.transport.config import TransferConfig

LAYER_TOKENS = 1024
"""Of a layer of 4 MiB."""
LAYERS = {1000: 48, 10_000: 64}
"""Layers of a request at most, by the rate in Mbit/s."""
CODECS = "fp8", "int4", "lossless", "auto"
WARM = 3
"""Requests before the clock counts: by then `auto` has measured."""
LARGEST_ERROR = {"fp8": 0.04, "int4": 0.08}
"""Of an element, against the largest of its group: half of the widest step is 1/28 of that in fp8 and 1/14 in int4, and
bf16 rounds again."""


def measure_link(mbit: float, rounds: int) -> dict[str, Any]:
    """One request a round each way; the same values, compared afterwards."""
    layers = min((count for rate, count in LAYERS.items() if rate >= mbit), default=64)
    shape = Shape(layers, LAYER_TOKENS)
    seconds: dict[str, list[float]] = {name: [] for name in ("none", *CODECS)}
    with namespaces.joined(mbit) as (source, destination):
        places = source._replace(private_shm=True), destination._replace(private_shm=True)
        with contextlib.ExitStack() as stack:
            pairs = {
                name: stack.enter_context(Pair(shape, TransferConfig(codec=name), places=places))  # type: ignore[arg-type]
                for name in seconds
            }
            for pair in pairs.values():
                for _ in range(WARM):
                    pair.send()
            for _ in range(rounds):
                for name, pair in pairs.items():
                    seconds[name].append(pair.send().seconds)
            paths = {name: pair.path() for name, pair in pairs.items()}
            verified = sum(pair.verify(LARGEST_ERROR.get(name, 0.0)) for name, pair in pairs.items())
    if set(paths.values()) != {"stream"}:
        raise BenchmarkError(f"payloads went by {paths}, not by TCP")
    size = shape.payload_bytes / 1e9
    gains = {name: [a / b for a, b in zip(seconds["none"], seconds[name], strict=True)] for name in CODECS}
    return {
        "mbit": mbit,
        "mib": shape.payload_bytes >> 20,
        **{f"{name}_gb_s": round(size / statistics.median(taken), 4) for name, taken in seconds.items()},
        "gain": {name: round(statistics.median(gains[name]), 3) for name in CODECS},
        "gain_rounds": {name: [round(gain, 3) for gain in gains[name]] for name in CODECS},
        "verified_bytes": verified,
    }


def show_links(console: Any, rows: list[dict[str, Any]]) -> None:
    """The table for people."""
    from rich.table import Table

    if not rows:
        return
    table = Table("limit", "codec", "GB/s", "gain", "rounds", box=None)
    for row in rows:
        rate = f"{row['mbit']:g} Mbit/s"
        table.add_row(rate, "none", f"{row['none_gb_s']:.3f}", "", "")
        for name in CODECS:
            rounds = row["gain_rounds"][name]
            spread = f"{min(rounds):.2f}-{max(rounds):.2f}"
            table.add_row(rate, name, f"{row[f'{name}_gb_s']:.3f}", f"{row['gain'][name]:.2f}", spread)
    console.print(table)
