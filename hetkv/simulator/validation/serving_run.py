"""The simulator against a real serving run, recorded request by request."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetkv.costmodel.interface import StepModel
from hetkv.errors import InputError
from hetkv.simulator.affine import AffineStepModel
from hetkv.simulator.cluster import Cluster
from hetkv.simulator.events import Events
from hetkv.simulator.pool import AGGREGATED, Pool
from hetkv.simulator.records import Records
from hetkv.simulator.request import Request

Times = NDArray[np.float64]
START = (1e-2, 1e-5, 5e-8, 5e-5, 5e-3)
"""Where the fit begins: orders of magnitude, not values of any run."""


@dataclass
class ServingRun:
    """Requests in order of arrival. Times are seconds from the first `queued`; lengths are tokens."""

    prompt: NDArray[np.int64]
    output: NDArray[np.int64]
    queued: Times
    scheduled: Times
    first_token: Times
    last_token: Times
    max_num_seqs: int
    max_num_batched_tokens: int

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def ttft(self) -> Times:
        return self.first_token - self.queued

    @property
    def tpot(self) -> Times:
        return (self.last_token - self.first_token) / np.maximum(self.output - 1, 1)

    @property
    def queue_start(self) -> float:
        """Arrival of the first request that waits 0.5 s or more for its first step; infinite where none does."""
        late = np.nonzero(self.scheduled - self.queued >= 0.5)[0]
        return float(self.queued[late[0]]) if len(late) else float("inf")

    def concurrency(self, at: Times) -> NDArray[np.int64]:
        """Requests between their first scheduled step and their last token, at each time."""
        begun = np.searchsorted(np.sort(self.scheduled), at, side="right")
        return np.asarray(begun - np.searchsorted(np.sort(self.last_token), at, side="right"))


def load_serving_run(folder: Path) -> ServingRun:
    """Read `requests.jsonl` and `meta.json`. TTFT counts from `queued_ts`: the arrival clock drifts against it."""
    path = folder / "requests.jsonl"
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: not JSON: {error}") from None
    rows.sort(key=lambda row: float(row["queued_ts"]))
    start = rows[0]["queued_ts"]
    engine = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["engine_kwargs"]

    def times(name: str) -> Times:
        return np.array([row[name] - start for row in rows])

    return ServingRun(
        np.array([row["input_toks"] for row in rows]),
        np.array([row["output_toks"] for row in rows]),
        times("queued_ts"),
        times("scheduled_ts"),
        times("first_token_ts"),
        times("last_token_ts"),
        engine["max_num_seqs"],
        engine["max_num_batched_tokens"],
    )


def replay(run: ServingRun, model: StepModel) -> ServingRun:
    """Simulate the run's arrivals and lengths on one instance with the run's engine settings."""
    pool = Pool(
        name="engine",
        role=AGGREGATED,
        gpu="",
        gpus=1,
        count=1,
        model=model,
        layers=1,
        kv_blocks=model.kv_capacity_tokens // 16,
        max_num_seqs=run.max_num_seqs,
        max_num_batched_tokens=run.max_num_batched_tokens,
    )
    events, records = Events(), Records()
    cluster = Cluster([pool], events, records)
    columns = zip(run.queued.tolist(), run.prompt.tolist(), run.output.tolist(), strict=True)
    cluster.start(Request(i, *row) for i, row in enumerate(columns))
    events.run()
    cluster.finish()
    found: dict[str, Any] = records.columns()
    return ServingRun(
        run.prompt,
        run.output,
        run.queued,
        found["scheduled"],
        found["first_token"],
        found["last_token"],
        run.max_num_seqs,
        run.max_num_batched_tokens,
    )


def fit(
    run: ServingRun,
    seen_first: NDArray[np.bool_],
    seen_last: NDArray[np.bool_],
    capacity: int,
    evaluations: int = 800,
) -> AffineStepModel:
    """The five constants whose replay comes closest to what was seen; nothing else of the run is used.

    `seen_first` and `seen_last` mark the requests whose first and last token times may be looked at. Arrivals and
    lengths of all requests are input. Minimises a soft absolute error of log TTFT and log (last - first token) by
    Nelder-Mead, at most `evaluations` replays; deterministic.
    """
    from scipy.optimize import minimize

    def cost(logs: Times) -> float:
        again = replay(run, AffineStepModel(np.exp(logs).tolist(), capacity, 0.0))
        ttft = np.log(again.ttft[seen_first] / run.ttft[seen_first])
        decode = np.log(again.tpot[seen_last] / run.tpot[seen_last])
        errors = np.concatenate([ttft, 3 * decode]) / 0.1  # TTFT is the noisier of the two
        return float(np.sum(np.sqrt(1 + errors * errors) - 1))

    options = {"maxfev": evaluations, "xatol": 1e-3, "fatol": 1e-3, "adaptive": True}
    best = minimize(cost, np.log(START), method="Nelder-Mead", options=options)
    return AffineStepModel(np.exp(best.x).tolist(), capacity, 0.0)


def first_third(run: ServingRun) -> NDArray[np.bool_]:
    """The first third of the requests by arrival."""
    return np.arange(len(run)) < len(run) // 3


def compare(run: ServingRun, again: ServingRun, rows: NDArray[np.bool_]) -> dict[str, float]:
    """Signed relative errors and distances of a replay on some requests; figures of time are seconds."""
    found: dict[str, float] = {}
    for name, pick in (("ttft", _ttft), ("tpot", _tpot)):
        real, simulated = pick(run)[rows], pick(again)[rows]
        for p in (25, 50, 90):
            found[f"{name}_p{p}_real"] = float(np.percentile(real, p))
            found[f"{name}_p{p}"] = float(np.percentile(simulated, p))
            found[f"{name}_p{p}_error"] = found[f"{name}_p{p}"] / found[f"{name}_p{p}_real"] - 1
        found[f"{name}_ks"] = ks_distance(real, simulated)
        each = simulated / real - 1
        found[f"{name}_bias"] = float(np.median(each))
        found[f"{name}_median_error"] = float(np.median(np.abs(each)))
        found[f"{name}_p90_error_each"] = float(np.percentile(np.abs(each), 90))
    found["queue_start_real"], found["queue_start"] = run.queue_start, again.queue_start
    end = max(run.last_token.max(), again.last_token.max())
    at = np.linspace(0, end, 1001)
    gap = np.abs(run.concurrency(at) - again.concurrency(at))
    found["concurrency_mean_gap"] = float(gap.mean())
    found["concurrency_mean"] = float(run.concurrency(at).mean())
    found["end_real"], found["end"] = float(run.last_token.max()), float(again.last_token.max())
    return found


def ks_distance(a: Times, b: Times) -> float:
    """Largest distance between two empirical distribution functions."""
    both = np.sort(np.concatenate([a, b]))
    below = [np.searchsorted(np.sort(x), both, side="right") / len(x) for x in (a, b)]
    return float(np.max(np.abs(below[0] - below[1])))


def _ttft(run: ServingRun) -> Times:
    return run.ttft


def _tpot(run: ServingRun) -> Times:
    return run.tpot
