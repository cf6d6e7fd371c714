"""The simulator on what bench/reality.py measured: calibration, one simulation for each judged run, the table.

python bench/reality_predict.py DIR
python bench/reality_predict.py bench/results/reality.json     # the tables alone, of a result file

Reads DIR/measured.json, the rows of requests and the steps; writes calibration_input.json, calibration.json (by
`hetkv calibrate --bench`), reality.json and table.md there. Each judged run has steps of its own, calibrated on all
other loads; those that only warm the system up are in none.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from hetkv.cli import main as hetkv  # noqa: E402
from hetkv.costmodel import model_shape  # noqa: E402
from hetkv.costmodel.calibration.reality import table  # noqa: E402
from hetkv.costmodel.calibration.step_constants import COLUMNS, FEWEST, fit  # noqa: E402
from hetkv.costmodel.measured_steps import MeasuredSteps  # noqa: E402
from hetkv.simulator.deployment import Engine, LinkPlan, Plan, PoolPlan, Routing  # noqa: E402
from hetkv.simulator.measured import measured_steps, with_measured_link  # noqa: E402
from hetkv.simulator.run import simulate  # noqa: E402
from hetkv.simulator.traffic.sources import Traffic  # noqa: E402

BLOCKS = {"aggregated": 64, "prefill": 16, "decode": 64}
"""Tokens of a KV block: the defaults of `hetkv serve`."""
WARMING = ("warm", "warm_full")
FIGURES = (("TTFT p50", "ttft_ms", "p50"), ("TPOT p50", "tpot_ms", "p50"), ("throughput", "output_tokens_per_s", ""))


def predict(folder: Path) -> dict[str, Any]:
    """Make the files of `folder` anew; what reality.json holds."""
    measured = json.loads((folder / "measured.json").read_text())
    shape = str(measured["model"])
    model = shape.removeprefix("shape:").title() if shape.startswith("shape:") else str(ROOT / shape)
    entries, links, fronts = [], [], {}
    for name, found in measured["deployments"].items():
        if not found["runs"]:
            continue
        width = 4 if found["instances"][0]["device"].startswith("cpu") else 2
        kv_bytes = model_shape(model).kv_elements_per_token(1) * width
        steps = _steps(folder / name / "steps")
        for run in found["runs"]:
            others = [load for label, load in found["loads"].items() if label != run["label"] and label not in WARMING]
            for pool, rows in steps.items():
                kept = [row for row in rows if any(load["start"] <= row["end"] <= load["end"] for load in others)]
                entries.append({"name": _entry(pool, run), "kv_bytes_per_token": kv_bytes, "rows": kept})
        front, exposed = _probes(folder / name, found, steps)
        fronts[name] = front
        if name == "aggregated":
            continue
        # The last layer's KV goes when the prompt is computed; the others' went before.
        sizes = np.array(list(exposed)) * kv_bytes / model_shape(model).layers
        for size, seconds in zip(sizes.tolist(), _line(sizes, np.array(list(exposed.values()))), strict=True):
            links.append({"case": name, "bytes": size, "seconds": seconds})
    head = {key: measured[key] for key in ("device", "commit", "time") if key in measured}
    head["device"] = (measured.get("gpus") or [measured["device"]])[0]
    source = folder / "calibration_input.json"
    source.write_text(json.dumps({**head, "results": links, "steps": entries}) + "\n")
    calibration = folder / "calibration.json"
    code = hetkv(["calibrate", "--bench", str(source), "--out", str(calibration)])
    if code:
        raise RuntimeError(f"hetkv calibrate ended with {code}")
    document = {key: measured[key] for key in measured if key != "deployments"}
    document["deployments"] = {}
    for name, found in measured["deployments"].items():
        if name in fronts:
            rows = _steps(folder / name / "steps")
            runs = []
            for run in found["runs"]:
                plan = _plan(name, run, found, measured, model, fronts[name], calibration)
                runs.append(_run(plan, run, found["loads"][run["label"]], measured["traffic"], rows))
            document["deployments"][name] = {
                "instances": found["instances"],
                "capacity_rps": found["capacity_rps"],
                "front_ms": 1e3 * fronts[name],
                "runs": runs,
            }
    (folder / "reality.json").write_text(json.dumps(document, indent=1) + "\n")
    text = table(document)
    (folder / "table.md").write_text(text)
    print(text)
    return document


def _steps(folder: Path) -> dict[str, list[dict[str, float]]]:
    """Rows by pool."""
    found: dict[str, list[dict[str, float]]] = {}
    origins: list[int] = []
    for number, path in enumerate(sorted(folder.glob("*.csv"))):
        pool = next(role for role in BLOCKS if path.name.startswith(role))
        with path.open() as file:
            for row in csv.DictReader(file):
                found.setdefault(pool, []).append({key: float(value) for key, value in row.items()})
                origins.append(number)
    # How many other instances were busy during each step.
    every = [row for rows in found.values() for row in rows]
    ends = np.array([row["end"] for row in every])
    starts, files = ends - [row["seconds"] for row in every], np.array(origins)
    for place, row in enumerate(every):
        other = files != files[place]
        both = np.minimum(ends[other], ends[place]) - np.maximum(starts[other], starts[place])
        row["others"] = float(np.maximum(both, 0.0).sum() / row["seconds"])
    return found


def _probes(
    folder: Path, found: dict[str, Any], steps: dict[str, list[dict[str, float]]]
) -> tuple[float, dict[int, float]]:
    """Seconds between client and engine; and, by prompt tokens, those between first and second token beyond a step."""
    fronts, exposed = [], {}
    for length in found["probes"]:
        load = found["loads"][f"probe_{length}"]
        rows = [row for each in steps.values() for row in each if load["start"] <= row["end"] <= load["end"]]
        prompts = [row["seconds"] for row in rows if row["prompt"]]
        decodes = [row["seconds"] for row in rows if not row["prompt"]]
        requests = _requests(folder / f"probe_{length}.csv")
        ttft = np.array([float(r["first_token"]) - float(r["arrival"]) for r in requests])
        gaps = np.array([float(r["last_token"]) - float(r["first_token"]) for r in requests])
        parts = len(prompts) / max(1, len(requests))
        fronts.append(float(np.median(ttft) - parts * np.median(prompts)))
        exposed[length] = float(np.median(gaps) - np.median(decodes))
    return max(0.0, float(np.median(fronts))), exposed


def _line(sizes: Any, seconds: Any) -> list[float]:
    """The line through the points that neither falls nor starts below a microsecond, at these sizes."""
    slope = max(float(np.polyfit(sizes, seconds, 1)[0]), 1e-13)
    return [max(1e-6, float(np.mean(seconds - slope * sizes))) + slope * size for size in sizes.tolist()]


def _requests(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return [row for row in csv.DictReader(file) if row["status"] == "finished"]


def _entry(pool: str, run: dict[str, Any]) -> str:
    return f"{pool} for {run['label']}"


def _plan(
    name: str,
    run: dict[str, Any],
    found: dict[str, Any],
    measured: dict[str, Any],
    model: str,
    front: float,
    calibration: Path,
) -> Plan:
    """The deployment as a plan of the simulator, with the steps for a judged run."""
    pools = []
    for role in dict.fromkeys(each["role"] for each in found["instances"]):
        mine = [each for each in found["instances"] if each["role"] == role]
        pools.append(
            PoolPlan(
                role=role, gpu=mine[0]["device"], name=role, count=len(mine), kv_tokens=mine[0]["kv_tokens"],
                engine={"block_size": BLOCKS[role]}, steps=_entry(role, run),
            )
        )  # fmt: skip
    link = None
    if name == "disaggregated":
        document = with_measured_link({"link": {"measured": name}, "calibration": [str(calibration)]}, Path(), name)
        link = LinkPlan(**document["link"])
    engine = Engine(name="hetkv", **measured["engine"])
    return Plan(
        model, pools, engine, link,
        Routing("balanced", "balanced"), first_token_at="prefill", front_ms=1e3 * front, calibration=[str(calibration)],
    )  # fmt: skip


def _run(
    plan: Plan,
    run: dict[str, Any],
    real: dict[str, Any],
    lengths: dict[str, str],
    steps: dict[str, list[dict[str, float]]],
) -> dict[str, Any]:
    """One judged run: both sides' figures and their ratio, and everything that was measured under load.

    `step_drift` is measured over predicted time of all steps of the run, by pool: what of a ratio is the steps' and not
    the scheduling's. `own_steps` are the ratios where the steps are fitted to those of the run itself.
    """
    workload = Traffic(rate=run["rate"], duration=run["duration"], **lengths).build()
    simulated = simulate(plan, workload, run["seed"]).summary
    models = {pool.name: measured_steps(plan.calibration, pool) for pool in plan.pools}
    drift, own = {}, {}
    for name, model in models.items():
        rows = [row for row in steps[name] if real["start"] <= row["end"] <= real["end"]]
        expected = sum(
            model.step_seconds(int(row["decoding"]), row["context"], int(row["prompt"]), row["pairs"])
            * (1 + model.crowding * row["others"])
            for row in rows
        )
        drift[name] = sum(row["seconds"] for row in rows) / expected if expected else None
        table = np.array([[row[column] for column in COLUMNS] for row in rows])
        if len(rows) >= FEWEST:
            own[name] = MeasuredSteps(fit(name, table, model.fit.kv_bytes_per_token, ""), model.kv_capacity_tokens)
    again = simulate(plan, workload, run["seed"], models=lambda pool, _: own.get(pool.name, models[pool.name])).summary
    keep = ("requests", "finished", "ttft_ms", "tpot_ms", "e2e_ms", "throughput_rps", "output_tokens_per_s")
    sides = {side: {key: of[key] for key in keep} for side, of in (("simulated", simulated), ("measured", real))}
    return {
        **run, "cut": real["cut"], "busy_cores": real.get("busy_cores"), "errors": real["errors"],
        "compared": _compared(simulated, real), **sides,
        "step_drift": drift, "own_steps": {k: pair["ratio"] for k, pair in _compared(again, real).items()},
    }  # fmt: skip


def _compared(simulated: dict[str, Any], real: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = {}
    for title, key, part in FIGURES:
        ours, theirs = ((side[key][part] if part else side[key]) for side in (simulated, real))
        found[title] = {"simulated": ours, "measured": theirs, "ratio": ours / theirs if ours and theirs else None}
    return found


if __name__ == "__main__":
    path = Path(sys.argv[1])
    if path.is_dir():
        predict(path)
    else:
        print(table(json.loads(path.read_text())), end="")
