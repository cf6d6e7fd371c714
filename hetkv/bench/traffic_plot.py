"""The picture of `hetkv bench traffic`: GB/s over the payload of one layer of one request, one line a system."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def lines(report: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """Points `(bytes of a layer, GB/s)` by system, in rising order; the best where a size was measured twice."""
    points: dict[str, dict[int, float]] = {}

    def add(system: str, size: int, value: Any) -> None:
        if isinstance(value, (int, float)):
            at = points.setdefault(system, {})
            at[size] = max(at.get(size, 0.0), float(value))

    for size, value in report["ceiling"].items():
        add("ceiling: UCX put, contiguous", int(size), value)
    for row in report["results"]:
        if row["kind"] == "ready" and "gb_s" in row:
            requests = "1 request" if row["requests"] == 1 else f"{row['requests']} requests"
            add(f"hetkv, {requests}", row["layer_bytes"], row["gb_s"])
    for row in report["nixl"]:
        if "runs" in row:
            add("NIXL, best settings", row["layer_bytes"], row["gb_s"])
            add("NIXL, defaults", row["layer_bytes"], row["default_gb_s"])
    return {system: sorted(at.items()) for system, at in points.items()}


def draw(report: dict[str, Any], file: Path) -> None:
    """Write the picture to `file`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for system, points in lines(report).items():
        style = "k--" if system.startswith("ceiling") else "o-" if system.startswith("hetkv") else "s:"
        axes.plot([size / 1024 for size, _ in points], [value for _, value in points], style, label=system)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("payload of one layer of one request, KiB")
    axes.set_ylabel("GB/s, pool to pool, all layers ready")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)
