"""Pictures of a sweep: latency and goodput along its first axis, one line per point of the others."""

from __future__ import annotations

from typing import Any

from hetkv.simulator.metrics import Slo
from hetkv.simulator.output.plot import COLOURS, FAINT, STYLE, metadata


def save_sweep(rows: list[dict[str, Any]], axes: list[tuple[str, list[Any]]], slo: Slo, path: str) -> None:
    """Draw `rows` (a summary each, with its `point`) into `path`."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        draw_sweep(rows, axes, slo).savefig(path, dpi=160, metadata=metadata(path))


def draw_sweep(rows: list[dict[str, Any]], axes: list[tuple[str, list[Any]]], slo: Slo) -> Any:
    """A matplotlib figure with TTFT p90, TPOT p90 and goodput over the first axis."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    name, values = axes[0]
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        rest = ", ".join(f"{k} {v}" for k, v in row["point"].items() if k != name)
        lines.setdefault(rest, []).append(row)
    figure = Figure(figsize=(11.5, 3.9), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    panels = figure.subplots(1, 3)
    numeric = all(isinstance(v, (int, float)) for v in values)
    for axis, (title, unit, key, limit) in zip(
        panels,
        (
            ("TTFT p90", "ms", "ttft_ms", slo.ttft_ms),
            ("TPOT p90", "ms/token", "tpot_ms", slo.tpot_ms),
            ("Goodput", "requests/s", "goodput_rps", float("inf")),
        ),
        strict=True,
    ):
        axis.set_title(f"{title} ({unit})")
        axis.set_xlabel("rate (requests/s)" if name == "rate" else name.replace("_", " "))
        highest = 0.0
        for (label, points), colour in zip(lines.items(), COLOURS * len(lines), strict=False):
            y = [row[key]["p90"] if isinstance(row[key], dict) else row[key] for row in points]
            x = [row["point"][name] if numeric else str(row["point"][name]) for row in points]
            axis.plot(x, y, "o-", color=colour, linewidth=1.8, markersize=4, label=label, zorder=3, clip_on=False)
            highest = max([highest, *(v for v in y if v is not None)])
        if limit < float("inf"):
            axis.axhline(limit, color=COLOURS[4], linewidth=1.2, linestyle=(0, (4, 3)))
            axis.set_title(f"{title} ({unit}), SLO {limit:g}")
            highest = max(highest, min(limit, 2 * highest))
        if highest > 50 * max(
            min((row[key]["p90"] or 0.0) if isinstance(row[key], dict) else 1e18 for row in rows), 1e-9
        ):
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, highest * 1.1 or 1)
        axis.tick_params(colors=FAINT)
    if len(lines) > 1:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(lines), 6))
    return figure
