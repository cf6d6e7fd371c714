"""The answer: what to buy, how far it is from the best, what the simulator says, and what the alternatives cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite
from typing import Any, Literal

import msgspec

from hetkv.simulator.deployment import Plan as Deployment


class Instances(msgspec.Struct, frozen=True):
    """`count` equal instances of `tp * pp * dp` GPUs each. `kv_tokens`: room of one, cut to balance routing; None: all.

    `budget` is the engine's `max_num_batched_tokens`. `usd_per_hour` is the price of one, None where the
    problem has no prices. `unstartable` says why the engine cannot start it; empty where it can.
    `weight`: its share of the requests, where the aggregated instances differ.
    """

    role: Literal["prefill", "decode", "aggregated"]
    gpu: str
    tp: int
    pp: int
    count: int
    model: str
    budget: int
    kv_tokens: int | None = None
    usd_per_hour: float | None = None
    dp: int = 1
    unstartable: str = ""
    weight: float = 1.0

    @property
    def gpus(self) -> int:
        """GPUs of one instance."""
        return self.tp * self.pp * self.dp


def split(instances: Sequence[Instances]) -> str:
    """The instances in a few words."""
    several = len({i.model for i in instances}) > 1

    def one(i: Instances) -> str:
        shape = f" TP{i.tp}" * (i.tp > 1) + f" PP{i.pp}" * (i.pp > 1) + f" DP{i.dp}" * (i.dp > 1)
        mark = " (cannot be started)" if i.unstartable else ""
        return f"{i.count} {i.role} on {i.gpu}{shape}{mark}" + f" for {i.model}" * several

    return ", ".join(one(i) for i in instances) or "nothing"


def gpus(instances: Iterable[Instances]) -> int:
    """GPUs of all instances."""
    return sum(i.count * i.gpus for i in instances)


class ClassLatency(msgspec.Struct, frozen=True):
    """TTFT and TPOT in ms at the class's own percentiles, against its targets. None: no request has the figure."""

    ttft_ms: float | None
    tpot_ms: float | None
    ttft_limit_ms: float
    tpot_limit_ms: float
    ttft_percentile: float
    tpot_percentile: float

    @property
    def used(self) -> float:
        """The largest share of a target that is used up; above 1 a target is missed."""
        return max((self.ttft_ms or 0.0) / self.ttft_limit_ms, (self.tpot_ms or 0.0) / self.tpot_limit_ms)


class Attainment(msgspec.Struct, frozen=True):
    """The share of a class's requests within a limit: its mean over the held-out seeds, and the ends of the two-sided
    interval of `confidence` for that mean. `asked` is the target's percentile over 100, `worst` the least of a seed.
    """

    share: float
    low: float
    high: float
    worst: float
    asked: float
    confidence: float

    @property
    def holds(self) -> bool:
        """Whether the target is kept on average, and the interval says so or every seed does."""
        return self.share >= self.asked and (self.low >= self.asked or self.worst >= self.asked)


class Option(msgspec.Struct, frozen=True):
    """An alternative to the plan: a baseline or a runner-up. Where `feasible` is false, `why` says what is missed.

    `rate` is the requests/s of all classes together that it serves; `simulated` by class name, None if not simulated.
    """

    name: str
    feasible: bool
    cost_per_hour: float | None = None
    rate: float | None = None
    instances: list[Instances] = []
    simulated: dict[str, ClassLatency] | None = None
    why: str = ""
    seconds: float = 0.0


class Tightest(msgspec.Struct, frozen=True):
    """The constraint nearest to its limit: its name, where it is, and the share of it that is used."""

    constraint: str
    where: str
    used: float


class Sensitivity(msgspec.Struct, frozen=True):
    """The same plan with all step times at one end of the cost model's 90 % interval, and what it would cost then.

    `cost_per_hour` and `rate` are those of the plan that would be made if that end were true; None where there is none,
    or where `why` says that it is not known.
    """

    end: Literal["low", "high"]
    simulated: dict[str, ClassLatency]
    meets: bool
    cost_per_hour: float | None
    rate: float | None
    why: str = ""


class Shift(msgspec.Struct, frozen=True):
    """What the integer program buys where the step times of one `vendor` are `factor` times as long, all others as
    assumed: of which `vendors` (none: no plan), for what. `flips`: they are not those of the plan.
    """

    vendor: str
    factor: float
    vendors: list[str]
    flips: bool
    cost_per_hour: float | None
    rate: float | None


class Plan(msgspec.Struct, frozen=True):
    """A plan. `gap`: the solver's relative gap. `lower_bound`: of the full model under relaxed queueing, USD/hour for
    the goal `cost`, requests/s (an upper bound) for the others. `simulated_slack`: the share of the traffic by which
    the rates could still grow in the simulator before a target is missed (0.1: ten per cent), None where not measured.

    `rate` is the requests/s of all classes together and `scale` its multiple of the problem's rates.
    It was chosen with `seed` and seeds derived from it; `simulated` is the mean over `held_out_seeds`, which chose
    nothing, and `attained` the share of each class's requests within its limits there, by class and target.
    `meets`: all hold. Plans that failed there are counted in `judged_before`.

    `kw` and `co2_kg_per_hour` are of all rented GPUs, None without the user's figures.

    `columns_seconds` and `solve_seconds` are of CPU time, `verify_seconds` of the clock.

    `events` of the simulator were handled to find it. `cut` are those `notes` that say which limits ended a search
    early, so that a better plan may exist. `deployments` holds a plan for the simulator for each model.
    """

    goal: str
    instances: list[Instances]
    cost_per_hour: float | None
    rate: float
    scale: float
    gap: float
    lower_bound: float
    simulated_slack: float | None
    predicted: dict[str, ClassLatency]
    simulated: dict[str, ClassLatency]
    meets: bool
    tightest: Tightest
    baselines: list[Option]
    runners_up: list[Option]
    sensitivity: list[Sensitivity]
    columns_seconds: float
    solve_seconds: float
    verify_seconds: float
    iterations: int
    deployments: dict[str, Deployment]
    held_out_seeds: list[int] = []
    attained: dict[str, dict[str, Attainment]] = {}
    judged_before: int = 0
    shifts: list[Shift] = []
    events: int = 0
    notes: list[str] = []
    cut: list[str] = []
    kw: float | None = None
    co2_kg_per_hour: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain dictionaries, ready for `json.dump`. A latency that never ends is null there."""
        found: dict[str, Any] = _finite(msgspec.to_builtins(self))
        return found


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not isfinite(value) else value
