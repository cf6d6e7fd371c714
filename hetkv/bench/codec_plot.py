"""The picture of `hetkv bench codec`: ratio, and effective rate over the link's rate, one line a codec."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def lines(report: dict[str, Any], data: str, dtype: str) -> dict[str, tuple[float, list[tuple[float, float]]]]:
    """Of each codec, on that data: its ratio and points, in rising order: Gbit/s of the link, GB/s that get through."""
    out = {}
    for row in report["results"]:
        if (row["data"], row["dtype"]) == (data, dtype):
            points = sorted((float(link), float(rate)) for link, rate in row["effective_gb_s"].items())
            out[str(row["codec"])] = float(row["ratio"]), points
    return out


def draw(report: dict[str, Any], file: Path) -> None:
    """Write the picture to `file`: one pair of axes for each dtype of each data, ratios in the legend."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys((row["data"], row["dtype"]) for row in report["results"]))
    figure, all_axes = pyplot.subplots(1, len(kinds), figsize=(5.5 * len(kinds), 5), squeeze=False)
    for axes, (data, dtype) in zip(all_axes[0], kinds, strict=True):
        found = lines(report, data, dtype)
        links = [link for link, _ in next(iter(found.values()))[1]]
        axes.plot(links, [link / 8 for link in links], "k--", label="uncoded: the link")
        for codec, (ratio, points) in found.items():
            style = "o-" if codec in ("fp8", "int4", "split + zstd -50") else "s:"
            axes.plot([link for link, _ in points], [rate for _, rate in points], style, label=f"{codec}: {ratio:.2f}")
        for row in report.get("links", []) if dtype == "bf16" else []:
            for codec, mark in (("lossless", "k+"), ("fp8", "kx"), ("int4", "k*")):
                axes.plot([row["mbit"] / 1000], [row[f"{codec}_gb_s"]], mark)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(links, [f"{link:g}" for link in links])
        axes.set_xlabel("link, Gbit/s")
        axes.set_ylabel("GB/s of the pool that get through, one thread a side")
        axes.set_title(f"{data}, {dtype}")
        axes.grid(True, which="both", alpha=0.3)
        axes.legend(title="codec: ratio", fontsize="small")
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)
