"""The picture of a frontier, a line per fleet: cost and prefill to decode GPUs over the rate, and tokens/s."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from io import StringIO
from typing import Any

from hetkv.planner.frontier import MIXED, Frontier, Point
from hetkv.simulator.output.plot import COLOURS, FAINT, STYLE, check_format, metadata

MIXED_COLOUR = COLOURS[2]
MARKS = "osD^vPX"


def save_frontier(found: Frontier, path: str, title: str) -> None:
    """Draw the frontier into `path`; its ending (.png, .svg, .pdf) says how."""
    save(draw(found), path, title)


def save(figure: Any, path: str, title: str = "") -> None:
    """Write a figure with the project's style; equal figures are equal files."""
    import matplotlib

    check_format(path)
    with matplotlib.rc_context(STYLE):
        if title:
            figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold")
        figure.savefig(path, dpi=120, metadata=metadata(path))


def svg(figure: Any) -> str:
    """A figure as an `<svg>` element."""
    import matplotlib

    text = StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(text, format="svg", metadata={"Date": None})
    whole = text.getvalue()
    # Its metadata names the sites of vocabularies; the report is to have no address in it.
    return re.sub(r"<metadata>.*?</metadata>", "", whole[whole.index("<svg") :], flags=re.DOTALL)


def canvas(panels: int, height: float = 4.0) -> tuple[Any, Any]:
    """A figure with `panels` axes side by side, in the project's style."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.5, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
        return figure, figure.subplots(1, panels, squeeze=False)[0]


def draw(found: Frontier) -> Any:
    """A matplotlib figure of the three panels."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, (cost, users, ratio) = canvas(3)
        cost.set_title("Cost against rate (USD/hour)")
        cost.set_xlabel("rate (requests/s)")
        _lines(cost, found.rates, lambda p: p.rate, lambda p: p.cost_per_hour)
        cost.set_xscale("log")
        cost.set_yscale("log")
        _plain(cost.xaxis, sorted({p.rate for p in found.rates}))
        _plain(cost.yaxis, None)
        users.set_title("Output tokens/s per GPU")
        users.set_xlabel("output tokens/s per user (slowest class, its percentile)")
        _lines(users, found.users, lambda p: p.user_tokens_per_s, lambda p: p.gpu_tokens_per_s)
        _from_zero(users)
        ratio.set_title("Prefill to decode GPUs")
        ratio.set_xlabel("rate (requests/s)")
        ratio.set_xscale("log")
        _lines(ratio, found.rates, lambda p: p.rate, lambda p: p.ratio, "no plan is disaggregated")
        _plain(ratio.xaxis, sorted({p.rate for p in found.rates}))
        _from_zero(ratio)
        handles, labels = cost.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=max(len(labels), 1), handlelength=1.6)
        return figure


def _lines(
    axis: Any,
    points: Sequence[Point],
    x: Callable[[Point], float | None],
    y: Callable[[Point], float | None],
    nothing: str = "no plan meets the targets",
) -> None:
    names = list(dict.fromkeys(p.fleet for p in points))
    single = [c for c in COLOURS if c != MIXED_COLOUR]
    for index, name in enumerate(names):
        mixed = name == MIXED
        own = [(x(p), y(p)) for p in points if p.fleet == name]
        known = sorted((a, b) for a, b in own if a is not None and b is not None)
        axis.plot(
            [a for a, _ in known],
            [b for _, b in known],
            marker=MARKS[index % len(MARKS)],
            # The mixed fleet is often on the best single one: it is drawn below, wide and pale.
            color=MIXED_COLOUR if mixed else single[index % len(single)],
            linewidth=7 if mixed else 1.8,
            alpha=0.35 if mixed else 1.0,
            markersize=9 if mixed else 4.5,
            label=name,
            zorder=2 if mixed else 3,
        )
    if not any(x(p) is not None and y(p) is not None for p in points):
        axis.text(0.5, 0.5, nothing, transform=axis.transAxes, ha="center", color=FAINT)
    axis.tick_params(colors=FAINT)


def _from_zero(axis: Any) -> None:
    """From nothing to a little above the highest point."""
    highest = max((float(y) for line in axis.get_lines() for y in line.get_ydata()), default=0.0)
    axis.set_ylim(0, 1.12 * highest or 1.0)


def _plain(axis: Any, ticks: Sequence[float] | None) -> None:
    """Plain numbers on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullFormatter

    if ticks is None:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    else:
        axis.set_ticks(list(ticks))
    axis.set_major_formatter(lambda value, _: f"{value:,.4g}")
    axis.set_minor_formatter(NullFormatter())
