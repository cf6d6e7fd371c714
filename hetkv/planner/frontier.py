"""Many plans: what each kind of fleet costs over the rate, and what it gives each user over the TPOT target."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from hetkv.costmodel import load_catalogue
from hetkv.costmodel.catalogue import VENDORS
from hetkv.errors import InputError, UndecidedError
from hetkv.planner.effort import ALTERNATIVE_EVENTS
from hetkv.planner.problem import PairLimit, Problem
from hetkv.planner.result import gpus, split
from hetkv.planner.solve import solve
from hetkv.planner.traffic import samples
from hetkv.simulator.sweep import run_all

SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
TARGETS = (0.6, 0.8, 1.0, 1.5, 2.5)
MIXED = "mixed"


class Point(msgspec.Struct, frozen=True):
    """One plan for the fleet `fleet` at `scale` times the rates and `target` times the TPOT limits.

    `user_tokens_per_s` is 1 / TPOT of the slowest class at its percentile, `gpu_tokens_per_s` output tokens/s per GPU.
    None where no plan of the fleet meets the targets; `why` says so. `cut` says which limits ended the search early:
    the plan is the best until then, and where there is none it is not known whether one exists.
    """

    fleet: str
    scale: float
    target: float
    rate: float
    cost_per_hour: float | None = None
    gpus: int | None = None
    prefill_gpus: int = 0
    decode_gpus: int = 0
    gpu_tokens_per_s: float | None = None
    user_tokens_per_s: float | None = None
    split: str = ""
    why: str = ""
    cut: str = ""

    @property
    def ratio(self) -> float | None:
        """Prefill to decode GPUs; None where nothing is split."""
        return self.prefill_gpus / self.decode_gpus if self.decode_gpus else None


class Frontier(msgspec.Struct, frozen=True):
    """`rates`: plans over the rate; `users`: plans over the TPOT target at the largest of the rates, where whole
    instances are small steps.
    """

    rates: list[Point]
    users: list[Point]


def fleets(problem: Problem) -> dict[str, Problem]:
    """The problem with the GPUs of each vendor alone (of each type, where all are one vendor's), and with all."""
    catalogue = load_catalogue(problem.catalogue)
    kinds = {o.gpu: catalogue.gpu(o.gpu).vendor for o in problem.gpus}
    if len(set(kinds.values())) == 1:
        kinds = {gpu: gpu for gpu in kinds}
    found = {}
    for kind in dict.fromkeys(kinds.values()):
        own = [o for o in problem.gpus if kinds[o.gpu] == kind]
        names = {o.gpu for o in own}
        pairs = [p for p in problem.pair_limits if {p.prefill, p.decode} <= names]
        found[f"{VENDORS.get(kind, kind)} only"] = msgspec.structs.replace(problem, gpus=own, pair_limits=pairs)
    if len(found) > 1:
        found[MIXED] = problem
    return found


def split_fleet(problem: Problem, prefill: str, decode: str) -> tuple[str, Problem]:
    """The problem with every prefill on one GPU type and every decode on another, and what to call it."""
    catalogue = load_catalogue(problem.catalogue)
    names = [catalogue.gpu(name).name for name in (prefill, decode)]
    offers = [o for o in problem.gpus if o.gpu in names]
    for name in names:
        if name not in [o.gpu for o in offers]:
            raise InputError(f"--split: {name} is not among the problem's GPUs")
    known = {(p.prefill, p.decode): p for p in problem.pair_limits}
    pairs = [PairLimit(a.gpu, b.gpu, 0.0) for a in offers for b in offers if [a.gpu, b.gpu] != names]
    pairs += [p for key, p in known.items() if list(key) == names]
    fleet = msgspec.structs.replace(problem, gpus=offers, pair_limits=pairs, roles="disaggregated")
    return f"{names[0]} to {names[1]}", fleet


def frontier(
    problem: Problem,
    scales: Sequence[float] = SCALES,
    targets: Sequence[float] = TARGETS,
    splits: Sequence[tuple[str, str]] = (),
    jobs: int = -1,
    backend: str = "loky",
    on_done: Callable[[int, int], None] = lambda done, of: None,
) -> Frontier:
    """Plans of every fleet at every scale and target, each for the least cost, on `jobs` processes or a Ray cluster.

    `splits` are pairs of GPU names, (prefill, decode): fleets of their own.

    `on_done(done, of)` is called as they end. `InputError` where a GPU has no price.
    """
    if not problem.prices:
        raise InputError("the cost-against-rate frontier needs a price of every GPU")
    problem = msgspec.structs.replace(problem, objective=problem.objective.for_cost())
    top = max(scales)
    places = dict.fromkeys([*((s, 1.0) for s in scales), *((top, t) for t in targets)])
    tasks = [(name, fleet, *place) for name, fleet in fleets(problem).items() for place in places]
    tasks += [(*split_fleet(problem, *pair), s, 1.0) for pair in splits for s in scales]
    found = run_all(point, tasks, jobs, backend, lambda done: on_done(done, len(tasks)))
    found = [_at_least_one_of(p, found) for p in found]
    users = [p for p in found if p.scale == top and p.target in targets]
    return Frontier([p for p in found if p.target == 1], sorted(users, key=lambda p: p.target))


def _at_least_one_of(point: Point, found: Sequence[Point]) -> Point:
    """A mixed fleet may be one vendor's: where the search for it found less, the best single one is its plan."""
    if point.fleet != MIXED:
        return point
    same = [p for p in found if (p.scale, p.target) == (point.scale, point.target) and p.cost_per_hour is not None]
    best = min(same, key=lambda p: (bool(p.why), p.cost_per_hour or 0.0, p.fleet != MIXED), default=point)
    return msgspec.structs.replace(best, fleet=MIXED, cut=point.cut or best.cut)


def point(name: str, problem: Problem, scale: float, target: float) -> Point:
    """The plan of one fleet; runs in a worker."""
    classes = [msgspec.structs.replace(c, rate=scale * c.rate, tpot_ms=target * c.tpot_ms) for c in problem.classes]
    problem = msgspec.structs.replace(problem, classes=classes)
    rate = sum(c.rate for c in classes)
    try:
        plan = solve(problem, alternatives=False, events=ALTERNATIVE_EVENTS)
    except InputError as error:
        return Point(name, scale, target, rate, why=str(error))
    except UndecidedError as error:
        return Point(name, scale, target, rate, why=str(error), cut=str(error))
    count = gpus(plan.instances)
    slowest = max((x.tpot_ms or 0.0 for x in plan.simulated.values()), default=0.0)
    tokens = sum(
        s.spec.rate * float(s.outputs.mean()) for m in problem.models for s in samples(problem.classes_of(m.name))
    )
    return Point(
        name,
        scale,
        target,
        rate,
        plan.cost_per_hour,
        count,
        gpus(i for i in plan.instances if i.role == "prefill"),
        gpus(i for i in plan.instances if i.role == "decode"),
        tokens / count,
        1e3 / slowest if slowest else None,
        split(plan.instances),
        "" if plan.meets else "the plan misses a target in the simulator",
        "; ".join(plan.cut),
    )
