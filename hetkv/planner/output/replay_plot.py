"""The picture of a trace that is planned period by period."""

from __future__ import annotations

from typing import Any

import numpy as np

from hetkv.planner.output.plot import canvas
from hetkv.planner.replay import Replan
from hetkv.simulator.output.plot import COLOURS, STYLE


def draw(found: Replan) -> Any:
    """A matplotlib figure over the trace's time: traffic, GPUs by role, and the ratio of prefill to decode GPUs."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, (traffic, gpus, ratio) = canvas(3, 3.9)
        end = max(w.end_s for w in found.periods)
        unit, scale = ("hours", 3600.0) if end > 4 * 3600 else ("min", 60.0)
        edges = [w.start_s / scale for w in found.periods] + [found.periods[-1].end_s / scale]
        traffic.set_title("Traffic (tokens/s)")
        for label, values, colour in (
            ("prompt", [w.rate * w.prompt_mean for w in found.periods], COLOURS[0]),
            ("output", [w.rate * w.output_mean for w in found.periods], COLOURS[1]),
        ):
            traffic.stairs(values, edges, label=label, color=colour, linewidth=1.8)
        traffic.legend(loc="upper right")
        gpus.set_title("GPUs of the plan")
        below = np.zeros(len(found.periods))
        for label, counts, colour in (
            ("prefill", [w.prefill_gpus for w in found.periods], COLOURS[0]),
            ("decode", [w.decode_gpus for w in found.periods], COLOURS[1]),
            ("aggregated", [w.aggregated_gpus for w in found.periods], COLOURS[5]),
        ):
            if any(counts):
                above = below + np.array(counts)
                gpus.stairs(above, edges, baseline=below, label=label, color=colour, fill=True, alpha=0.75)
                below = above
        gpus.legend(loc="upper right")
        ratio.set_title("Prefill to decode GPUs")
        ratio.stairs(
            [np.nan if w.ratio is None else w.ratio for w in found.periods],
            edges,
            baseline=None,
            color=COLOURS[2],
            linewidth=2,
        )
        if all(w.ratio is None for w in found.periods):
            ratio.text(0.5, 0.5, "no period is disaggregated", transform=ratio.transAxes, ha="center")
        for axis in (traffic, gpus, ratio):
            axis.set_xlabel(f"time of the trace ({unit})")
            axis.set_xlim(edges[0], edges[-1])
            axis.set_ylim(bottom=0)
            axis.margins(y=0.25)
        return figure
