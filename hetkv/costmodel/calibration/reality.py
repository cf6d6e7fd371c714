"""Section of docs/accuracy.md: the simulator against running deployments that bench/reality.py loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hetkv.costmodel.calibration.report import section

RESULTS = Path(__file__).parents[3] / "bench/results"
"""Of a checkout: a wheel has no results."""
LIMITS = {"TTFT p50": 0.15, "TPOT p50": 0.15, "throughput": 0.10}
"""Ratios of simulated to measured are judged by these."""

TEXT = """## Simulation meets reality

`python bench/reality.py` starts an aggregated and a disaggregated deployment of `hetkv serve` side by side, or one of
them, and loads one at a time: at 30, 60 and 90 % of its capacity to judge the simulator, and at others between. Each
judged run is simulated with the time of steps that `hetkv calibrate --bench` fits to those of all other loads, never of
its own rate. (On two H200 it is fitted to those of 20, 45 and 75 % alone, which came before all judged ones.) `common`
is the aggregated deployment at the rate of the disaggregated one's 90 %. "With own steps" is the ratio where the time
of steps is fitted to those of the same run: what is left is queueing and scheduling. The runs on 10 cores and on one
H200 were made at the same time, each with cores of its own."""


@section("reality", 160)
def reality(data: Path) -> str:
    """Every `reality*.json` of bench/results."""
    parts = [TEXT]
    for file in sorted(RESULTS.glob("reality*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        parts += [head(found, file.name), table(found).rstrip()]
    return "\n\n".join(parts)


def head(document: dict[str, Any], name: str) -> str:
    """What ran, where."""
    on_cpu = all(each["device"] == "cpu" for of in document["deployments"].values() for each in of["instances"])
    devices = [gpu.split(",")[0] for gpu in document.get("gpus", [])]
    device = " and ".join(devices) if devices and not on_cpu else f"{document['cpus']} cores of {document['device']}"
    traffic = document["traffic"]
    return (
        f"### {document['model'].removeprefix('shape:')} on {device}\n\n"
        f"Prompts {traffic['prompt_tokens']}, answers {traffic['output_tokens']}, commit {document['commit']}, "
        f"load average {document['load_average_before'][0]:.1f} before (`bench/results/{name}`)."
    )


def table(document: dict[str, Any]) -> str:
    """Both tables as Markdown: simulated against measured, and what was measured."""
    lines = [
        "| deployment | load | requests/s | figure | simulated | measured | ratio | within | with own steps |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | --- | ---: |",
    ]
    for name, found in document["deployments"].items():
        for run in found["runs"]:
            first = f"{name} | {_label(run)}"
            for title, pair in run["compared"].items():
                unit = "tokens/s" if title == "throughput" else "ms"
                ratio = pair["ratio"]
                verdict = "cut" if run["cut"] else "-" if ratio is None else _verdict(ratio, LIMITS[title])
                lines.append(
                    f"| {first} | {run['rate']:.3g} | {title}, {unit} | {_number(pair['simulated'])} | "
                    f"{_number(pair['measured'])} | {_number(ratio)} | {verdict} | {_number(run['own_steps'][title])} |"
                )
                first = " | "
    lines += [
        "",
        "| deployment | capacity | load | requests/s | tokens/s | TTFT p50 / p99, ms | TPOT p50 / p99, ms |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, found in document["deployments"].items():
        for run in found["runs"]:
            real = run["measured"]
            times = " | ".join(
                f"{_number(real[key]['p50'])} / {_number(real[key]['p99'])}" for key in ("ttft_ms", "tpot_ms")
            )
            rates = f"{found['capacity_rps']:.3g} | {_label(run)} | {run['rate']:.3g}"
            lines.append(f"| {name} | {rates} | {real['output_tokens_per_s']:.0f} | {times} |")
    return "\n".join(lines) + "\n"


def _label(run: dict[str, Any]) -> str:
    return "common" if run["label"] == "common" else f"{run['share']:.0%}"


def _verdict(ratio: float, limit: float) -> str:
    return f"{limit:.0%}" if 1 - limit <= ratio <= 1 + limit else f"not {limit:.0%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"
