"""Pictures of one simulation: latency distributions, queues and utilisation over time."""

from __future__ import annotations

from io import StringIO
from math import inf, isfinite
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetkv.errors import InputError
from hetkv.simulator.metrics import BY_KEY, Slo, latencies
from hetkv.simulator.run import Result

COLOURS = ("#2f6db3", "#d1722c", "#3c9465", "#8a5bb0", "#b8434e", "#5c7080")
INK, FAINT, GRID = "#22303c", "#6b7885", "#e3e7eb"
FORMATS = (".png", ".svg", ".pdf")
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": FAINT,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "text.color": INK,
    "legend.frameon": False,
    "svg.hashsalt": "hetkv",
    "svg.fonttype": "path",
}


def save(result: Result, slo: Slo, path: str, title: str) -> None:
    """Draw the result into `path`; its ending (.png, .svg, .pdf) says how."""
    import matplotlib

    check_format(path)
    with matplotlib.rc_context(STYLE):
        draw(result, slo, title).savefig(path, dpi=160, metadata=metadata(path))


def svg(result: Result, slo: Slo) -> str:
    """The picture as an `<svg>` element."""
    import matplotlib

    text = StringIO()
    with matplotlib.rc_context(STYLE):
        draw(result, slo, "").savefig(text, format="svg", metadata={"Date": None})
    whole = text.getvalue()
    return whole[whole.index("<svg") :]


def check_format(path: str) -> None:
    """`InputError` where a picture cannot be written as `path` asks."""
    if Path(path).suffix.lower() not in FORMATS:
        raise InputError(f"--plot {path}: the file name must end in {', '.join(FORMATS)}")


def metadata(path: str) -> dict[str, Any]:
    """Metadata for `savefig` with which equal pictures are equal files."""
    return {} if path.lower().endswith(".png") else {"CreationDate" if path.lower().endswith(".pdf") else "Date": None}


def draw(result: Result, slo: Slo, title: str) -> Any:
    """A matplotlib figure: three latency CDFs above queue lengths, running sequences and utilisation over time."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(11.5, 6.4), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    axes = figure.subplots(2, 3)
    times = latencies(result.columns)
    limits = {"ttft_ms": slo.ttft_ms, "tpot_ms": slo.tpot_ms, "e2e_ms": inf}
    for axis, (key, limit), colour in zip(axes[0], limits.items(), COLOURS, strict=False):
        _cdf(axis, key, times[key], limit, colour)
    _timelines(axes[1], result)
    if title:
        figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold")
    return figure


def _cdf(axis: Any, key: str, values: NDArray[np.float64], limit: float, colour: str) -> None:
    metric = BY_KEY[key]
    axis.set_title(f"{metric.symbol}: {metric.definition.split(':')[0]}")
    axis.set_ylabel("share of requests")
    axis.set_ylim(0, 1.02)
    if not values.size:
        axis.text(0.5, 0.5, "no finished requests", transform=axis.transAxes, ha="center", color=FAINT)
        return
    share = np.linspace(0, 1, 801)
    x, unit = np.quantile(values, share), metric.unit
    if x[400] >= 1000:
        x, limit, unit = x / 1e3, limit / 1e3, unit.replace("ms", "s")
    low, high = max(x[8], x[-1] * 1e-6, 1e-9), max(x[792], 1e-9)
    if high > 20 * low:
        axis.set_xscale("log")
        axis.set_xlim(low / 2, x[-1] * 1.3)
    elif high - low < 1e-3 * high:  # as good as constant: a range of rounding errors has no readable ticks
        axis.set_xlim(0.9 * low, 1.1 * high)
    else:
        axis.set_xlim(0.0 if low < 0.5 * high else low - (high - low), high + 0.25 * (high - low))
    axis.plot(x, share, color=colour, linewidth=2, zorder=3)
    axis.fill_between(x, share, color=colour, alpha=0.07, linewidth=0)
    legend = []
    for p in (50, 90, 99):
        at = float(np.interp(p / 100, share, x))
        axis.plot([at], [p / 100], "o", color=colour, markersize=4.5, markeredgecolor="white", zorder=4)
        legend.append(f"p{p}  {_short(at)} {unit.split('/')[0]}")
    if isfinite(limit):
        met = float(np.interp(limit, x, share))
        legend.append(f"SLO  {_short(limit)} {unit.split('/')[0]}: {met:.1%}")
        if limit < axis.get_xlim()[1]:
            axis.axvline(limit, color=COLOURS[4], linewidth=1.2, linestyle=(0, (4, 3)))
    # Where the curve is not: below its end, or above its beginning where it rises late.
    rise = axis.transAxes.inverted().transform(axis.transData.transform((float(np.interp(0.3, share, x)), 0.3)))[0]
    side, end = ("left", "top") if rise > 0.5 else ("right", "bottom")
    axis.text(
        0.04 if side == "left" else 0.97,
        0.94 if side == "left" else 0.06,
        "\n".join(legend),
        transform=axis.transAxes,
        ha=side,
        va=end,
        fontsize=8,
        linespacing=1.5,
        bbox={"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
    ).set_in_layout(False)
    axis.set_xlabel(unit)
    if axis.get_xscale() == "log":
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _timelines(axes: Any, result: Result) -> None:
    waiting, running, use = axes
    waiting.set_title("Waiting requests")
    running.set_title("Running sequences per instance")
    use.set_title("Utilisation")
    end = result.summary["simulated_seconds"]
    unit, scale = ("min", 60.0) if end > 300 else ("s", 1.0)
    for pool, colour in zip(result.pools, COLOURS * len(result.pools), strict=False):
        for axis, series, divisor in (
            (waiting, pool.waiting, 1.0),
            (running, pool.running, float(pool.count)),
            (use, pool.busy, float(pool.count)),
        ):
            x, y = series.averages(result.end)
            _line(axis, x / scale, y / divisor, pool.name, colour)
    if result.links is not None:
        senders = sum(p.count for p in result.pools if p.role == "prefill")
        x, y = result.links.throughput.averages(result.end)
        _line(use, x / scale, y / (min(result.links.port * senders, result.links.fabric)), "KV link", COLOURS[5])
    for axis in axes:
        axis.set_xlabel(f"simulated time ({unit})")
        axis.set_xlim(0, max(end / scale, 1e-9))
        axis.set_ylim(bottom=0)
    use.set_ylim(0, 1.02)
    use.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    waiting.figure.legend(*use.get_legend_handles_labels(), loc="outside lower center", ncols=6, handlelength=1.4)


def _line(axis: Any, x: NDArray[np.float64], y: NDArray[np.float64], label: str, colour: str) -> None:
    if len(x) > 160:  # the series keeps more bins than a panel can show
        step = -(-len(x) // 160)
        whole = len(x) // step * step
        x, y = x[:whole].reshape(-1, step).mean(axis=1), y[:whole].reshape(-1, step).mean(axis=1)
    axis.plot(x, y, color=colour, linewidth=1.4, label=label)
    axis.fill_between(x, y, color=colour, alpha=0.08, linewidth=0)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
