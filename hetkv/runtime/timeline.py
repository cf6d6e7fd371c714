"""Time spans of two processes on one clock: as a Perfetto-loadable trace and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from hetkv.errors import InputError

ROWS = {"compute": "prefill", "pack": "prefill", "wire": "prefill", "unpack": "decode"}
"""Row names in the order of a byte's way, and the process that each belongs to."""


class Span(msgspec.Struct, frozen=True):
    """One piece of work. Times are nanoseconds of CLOCK_MONOTONIC, which all processes of a host share."""

    row: str
    layer: int
    start_ns: int
    stop_ns: int
    num_bytes: int = 0
    process: str = ""
    """`instance/rank`; default: the row's process in `ROWS`."""

    @property
    def owner(self) -> str:
        """Whose work it is."""
        return self.process or ROWS[self.row]


def engine_spans(trace: Sequence[tuple[str, int, int, int, int, int]], process: str = "") -> list[Span]:
    """Spans of `engine.take_trace()`: (kind, handle, layer, start, stop, bytes)."""
    return [Span(kind, layer, start, stop, size, process) for kind, _, layer, start, stop, size in trace]


def write_perfetto(path: Path | str, spans: Sequence[Span]) -> None:
    """Chrome trace-event JSON, which Perfetto and chrome://tracing load: one process a side, one row a kind of work."""
    events: list[dict[str, Any]] = []
    processes: dict[str, int] = {}
    origin = min((span.start_ns for span in spans), default=0)
    for span in spans:
        name = span.owner
        if name not in processes:
            processes[name] = len(processes) + 1
            events.append({"ph": "M", "name": "process_name", "pid": processes[name], "args": {"name": name}})
        row = list(ROWS).index(span.row)
        thread = {"pid": processes[name], "tid": row}
        if not any(
            e["ph"] == "M" and e["name"] == "thread_name" and (e["pid"], e["tid"]) == tuple(thread.values())
            for e in events
        ):
            events.append({"ph": "M", "name": "thread_name", **thread, "args": {"name": span.row}})
        events.append(
            {
                "ph": "X",
                "name": f"{span.row} layer {span.layer}",
                "cat": span.row,
                "ts": (span.start_ns - origin) / 1000,
                "dur": (span.stop_ns - span.start_ns) / 1000,
                "args": {"layer": span.layer, "bytes": span.num_bytes},
                **thread,
            }
        )
    Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def read_perfetto(path: Path | str) -> list[Span]:
    """The spans of a trace that `write_perfetto` wrote, to draw them elsewhere. Raises `InputError`."""
    try:
        events = json.loads(Path(path).read_text())["traceEvents"]
        names = {event["pid"]: event["args"]["name"] for event in events if event.get("name") == "process_name"}
        return [
            Span(
                event["cat"], event["args"]["layer"], round(event["ts"] * 1000),
                round((event["ts"] + event["dur"]) * 1000), event["args"]["bytes"], names[event["pid"]],
            )
            for event in events
            if event["ph"] == "X"
        ]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a trace of hetkv: {error}") from None


def picture_rows(spans: Sequence[Span]) -> list[tuple[str, str]]:
    """(process, kind of work) of each row of the picture, from top to bottom: no two ranks share one."""
    found = {(span.owner, span.row) for span in spans}
    sides = {owner: ROWS[row] for owner, row in found}
    return sorted(found, key=lambda at: (sides[at[0]] != "prefill", at[0], list(ROWS).index(at[1])))


def draw(path: Path | str, spans: Sequence[Span], title: str) -> None:
    """The layer timeline as a picture (`.svg`, `.png`, `.pdf`): a row a process and kind of work, a colour a layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import Normalize

    if not spans:
        raise InputError("no spans to draw: was the trace switched on?")
    origin = min(span.start_ns for span in spans)
    layers = max(span.layer for span in spans) + 1
    colours = pyplot.get_cmap("viridis")
    rows = picture_rows(spans)
    height = 0.75 if len(rows) <= 8 else 0.45
    figure, axes = pyplot.subplots(figsize=(11, height * len(rows) + 1.6), layout="constrained")
    total = (max(span.stop_ns for span in spans) - origin) / 1e6
    for span in spans:
        # A pack of microseconds next to a compute of milliseconds is drawn wide enough to be seen.
        left, width = (span.start_ns - origin) / 1e6, max((span.stop_ns - span.start_ns) / 1e6, total * 0.004)
        colour = colours(span.layer / max(layers - 1, 1))
        axes.barh(rows.index((span.owner, span.row)), width, left=left, height=0.72, color=colour)
    axes.set_yticks(range(len(rows)), [f"{row}\n{owner}" for owner, row in rows], fontsize=9 if len(rows) <= 8 else 7)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("milliseconds since the first layer began")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(left=False)
    scale = pyplot.cm.ScalarMappable(Normalize(0, max(layers - 1, 1)), colours)
    figure.colorbar(scale, ax=axes, label="layer", pad=0.01, fraction=0.03)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    finally:
        pyplot.close(figure)
