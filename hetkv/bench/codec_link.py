"""KV through a link of a given rate between two network namespaces, with the codec fp8 and without, in turns."""

from __future__ import annotations

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
LARGEST_ERROR = 0.04
"""Of an element, against the largest of its group: half of fp8's widest step is 1/28 of that, and bf16 rounds again."""


def measure_link(mbit: float, rounds: int) -> dict[str, Any]:
    """One request a round each way; the same values, compared afterwards."""
    layers = min((count for rate, count in LAYERS.items() if rate >= mbit), default=64)
    shape = Shape(layers, LAYER_TOKENS)
    seconds: dict[str, list[float]] = {"none": [], "fp8": []}
    with namespaces.joined(mbit) as (source, destination):
        places = source._replace(private_shm=True), destination._replace(private_shm=True)
        with (
            Pair(shape, TransferConfig(codec="none"), places=places) as plain,
            Pair(shape, TransferConfig(codec="fp8"), places=places) as coded,
        ):
            pairs = {"none": plain, "fp8": coded}
            for pair in pairs.values():
                pair.send()
            for _ in range(rounds):
                for name, pair in pairs.items():
                    seconds[name].append(pair.send().seconds)
            paths = {name: pair.path() for name, pair in pairs.items()}
            verified = plain.verify(), coded.verify(LARGEST_ERROR)
    if set(paths.values()) != {"stream"}:
        raise BenchmarkError(f"payloads went by {paths}, not by TCP")
    size = shape.payload_bytes / 1e9
    return {
        "mbit": mbit,
        "mib": shape.payload_bytes >> 20,
        "none_gb_s": round(size / statistics.median(seconds["none"]), 4),
        "fp8_gb_s": round(size / statistics.median(seconds["fp8"]), 4),
        "gain": round(statistics.median(a / b for a, b in zip(seconds["none"], seconds["fp8"], strict=True)), 3),
        "gain_rounds": [round(a / b, 3) for a, b in zip(seconds["none"], seconds["fp8"], strict=True)],
        "verified_bytes": verified[0] + verified[1],
    }


def show_links(console: Any, rows: list[dict[str, Any]]) -> None:
    """The table for people."""
    from rich.table import Table

    if not rows:
        return
    table = Table("limit", "none GB/s", "fp8 GB/s", "gain", "rounds", box=None)
    for row in rows:
        rounds = f"{min(row['gain_rounds']):.2f}-{max(row['gain_rounds']):.2f}"
        rate = f"{row['mbit']:g} Mbit/s"
        table.add_row(rate, f"{row['none_gb_s']:.3f}", f"{row['fp8_gb_s']:.3f}", f"{row['gain']:.2f}", rounds)
    console.print(table)
