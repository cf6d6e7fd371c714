"""Planning again as a trace goes on: periods of the traffic, a plan for each, and how prefill and decode move."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import ceil, inf

import msgspec
import numpy as np

from hetkv.errors import InputError, UndecidedError
from hetkv.planner.baselines.candidates import hourly
from hetkv.planner.effort import ALTERNATIVE_EVENTS
from hetkv.planner.problem import Problem, WorkloadClass
from hetkv.planner.result import Instances, split
from hetkv.planner.slo_checker import Verdict, deployment, verdict
from hetkv.planner.solve import solve
from hetkv.simulator.request import Request
from hetkv.simulator.run import simulate
from hetkv.simulator.sweep import run_all
from hetkv.simulator.traffic.trace import Row, hash_tokens_of, read_rows

PERIODS = 12
GROWTH, MOST = 1.25, 32
"""A pool whose target is missed grows by this factor, to at most `MOST` times its instances."""

FEWEST = 50
"""Requests that a period needs for its lengths to be known."""


class Period(msgspec.Struct, frozen=True):
    """One period and its plan. GPUs by role; `ratio` is prefill over decode GPUs, None where nothing is split.

    `replayed_ttft_ms` and `replayed_tpot_ms` are the plan's, at the class's percentiles, under the period's own
    requests: at their own times, which may come in bursts, and with their own prefixes. A plan is first made for
    Poisson arrivals at the mean rate and costs `poisson_cost_per_hour`. Where the period's own requests miss a target
    with it, instances are added to the pools that are late, as far as caps and limits allow, and those that can be
    spared are taken away again.
    `why` says why there is no plan; `cut` which limits ended the search for it early: a better one may exist.
    """

    start_s: float
    end_s: float
    requests: int
    rate: float
    prompt_mean: float
    prompt_cv: float
    output_mean: float
    output_cv: float
    prefill_gpus: int = 0
    decode_gpus: int = 0
    aggregated_gpus: int = 0
    ratio: float | None = None
    cost_per_hour: float | None = None
    served_rate: float | None = None
    split: str = ""
    replayed_ttft_ms: float | None = None
    replayed_tpot_ms: float | None = None
    replay_meets: bool | None = None
    poisson_cost_per_hour: float | None = None
    why: str = ""
    cut: str = ""

    @property
    def gpus(self) -> int:
        """All GPUs of the plan."""
        return self.prefill_gpus + self.decode_gpus + self.aggregated_gpus


class Replan(msgspec.Struct, frozen=True):
    """The periods of a trace. `cost`: USD for the whole trace, replanned; `peak_cost`: with the costliest plan kept."""

    trace: str
    periods: list[Period]
    cost: float | None
    peak_cost: float | None


class _Slice:
    """Some rows of a trace as a workload, from time 0."""

    def __init__(self, rows: Sequence[Row], start: float) -> None:
        self.rows, self.start = rows, start
        self.hash_tokens = max((hash_tokens_of(row) for row in rows), default=0)
        self.about = f"{len(rows):,} requests of a trace"

    def requests(self, seed: int) -> Iterator[Request]:
        for number, (arrival, prompt, output, hashes) in enumerate(self.rows):
            yield Request(number, arrival - self.start, prompt, output, hashes)


def rows_of(problem: Problem, path: str, period_s: float | None = None) -> list[Row]:
    """The requests of the trace in `path`. `InputError` where they cannot be planned for in periods of `period_s`."""
    if len(problem.classes) != 1:
        raise InputError(
            f"--trace has one kind of request, but the problem has {len(problem.classes)} classes "
            f"({', '.join(c.name for c in problem.classes)}): keep the one whose targets it should meet"
        )
    if period_s is not None and not period_s > 0:
        raise InputError(f"--period must be greater than 0, got {period_s}")
    return read_rows(path)


def replan(
    problem: Problem,
    path: str,
    period_s: float | None = None,
    jobs: int = -1,
    backend: str = "loky",
    on_done: Callable[[int, int], None] = lambda done, of: None,
) -> Replan:
    """Plan for each period of `period_s` seconds (default: a twelfth of the trace) of the trace in `path`.

    The problem's one class gives the targets; rate and lengths are the period's. `InputError` where the trace is broken
    or the problem has several classes.
    """
    rows = rows_of(problem, path, period_s)
    begin, length = rows[0][0], rows[-1][0] - rows[0][0]
    if period_s is None:
        period_s = max(length / PERIODS, 1.0)
    count = max(1, ceil(length / period_s - 1e-9))
    tasks = []
    for index in range(count):
        start, end = index * period_s, min((index + 1) * period_s, length)
        last = index == count - 1
        own = [r for r in rows if start <= r[0] - begin < end or (last and r[0] - begin == length)]
        tasks.append((problem, start, max(end, start + 1e-9), own, begin))
    periods = run_all(plan_period, tasks, jobs, backend, lambda done: on_done(done, len(tasks)))
    costs = [w.cost_per_hour for w in periods]
    known = [c for c in costs if c is not None]
    hours = [(w.end_s - w.start_s) / 3600 for w in periods]
    total = sum(c * h for c, h in zip(costs, hours, strict=True) if c is not None)
    return Replan(path, periods, total if known else None, max(known) * sum(hours) if known else None)


def plan_period(problem: Problem, start: float, end: float, rows: list[Row], begin: float) -> Period:
    """The plan of one period; runs in a worker."""
    prompts, outputs = (np.array([r[i] for r in rows], dtype=float) for i in (1, 2))
    rate = len(rows) / (end - start)
    if len(rows) < FEWEST:
        mean = [float(x.mean()) if x.size else 0.0 for x in (prompts, outputs)]
        return Period(start, end, len(rows), rate, mean[0], 0.0, mean[1], 0.0, why=f"fewer than {FEWEST} requests")
    shape = [(float(x.mean()), float(x.std() / x.mean())) for x in (prompts, outputs)]
    texts = [f"lognormal:{mean:.6g}:{cv:.4g}" if cv > 1e-3 else f"{mean:.0f}" for mean, cv in shape]
    spec: WorkloadClass = msgspec.structs.replace(
        problem.classes[0], rate=rate, prompt_tokens=texts[0], output_tokens=texts[1]
    )
    found = Period(start, end, len(rows), rate, *shape[0], *shape[1])
    try:
        plan = solve(msgspec.structs.replace(problem, classes=[spec]), alternatives=False, events=ALTERNATIVE_EVENTS)
    except InputError as error:
        return msgspec.structs.replace(found, why=str(error))
    except UndecidedError as error:
        return msgspec.structs.replace(found, why=str(error), cut=str(error))
    said, instances = _Own(problem, spec, _Slice(rows, begin + start)).plan(plan.instances)
    gpus = dict.fromkeys(("prefill", "decode", "aggregated"), 0)
    for one in instances:
        gpus[one.role] += one.count * one.gpus
    latency = said.latency[spec.name]
    return msgspec.structs.replace(
        found,
        prefill_gpus=gpus["prefill"],
        decode_gpus=gpus["decode"],
        aggregated_gpus=gpus["aggregated"],
        ratio=gpus["prefill"] / gpus["decode"] if gpus["decode"] else None,
        cost_per_hour=hourly(problem, instances) if problem.prices else None,
        served_rate=plan.rate,
        split=split(instances),
        replayed_ttft_ms=_finite(latency.ttft_ms),
        replayed_tpot_ms=_finite(latency.tpot_ms),
        replay_meets=said.meets,
        poisson_cost_per_hour=plan.cost_per_hour,
        cut="; ".join(plan.cut),
    )


class _Own:
    """A period's own requests on instances of the problem's one model."""

    def __init__(self, problem: Problem, spec: WorkloadClass, workload: _Slice) -> None:
        self.problem, self.spec, self.workload = problem, spec, workload

    def __call__(self, instances: Sequence[Instances]) -> Verdict:
        plan = deployment(self.problem, self.problem.models[0], instances)
        columns = simulate(plan, self.workload, self.problem.seed).columns
        return verdict(columns, [self.spec], np.zeros(len(self.workload.rows), dtype=int))

    def plan(self, instances: list[Instances]) -> tuple[Verdict, list[Instances]]:
        """The instances if they hold; else with more of those that are late, less what can be spared."""
        said, grown = self(instances), instances
        while not said.meets and sum(i.count for i in grown) < MOST * sum(i.count for i in instances):
            late = {role for role in ("prefill", "decode", "aggregated") if said.used(role) > 1}
            more = [msgspec.structs.replace(i, count=ceil(GROWTH * i.count)) if i.role in late else i for i in grown]
            if hourly(self.problem, more) == inf:
                break
            said, grown = self(more), more
        return self._spare(said, grown) if said.meets and grown is not instances else (said, grown)

    def _spare(self, said: Verdict, instances: list[Instances]) -> tuple[Verdict, list[Instances]]:
        """Take instances away, the most expensive first, while the targets hold without them."""
        for at in sorted(range(len(instances)), key=lambda i: -(instances[i].usd_per_hour or instances[i].gpus)):
            while instances[at].count > 1:
                fewer = list(instances)
                fewer[at] = msgspec.structs.replace(fewer[at], count=fewer[at].count - 1)
                other = self(fewer)
                if not other.meets:
                    break
                said, instances = other, fewer
        return said, instances


def _finite(value: float | None) -> float | None:
    return value if value is not None and value < float("inf") else None
