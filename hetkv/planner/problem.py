"""The question: models, traffic with its targets, GPUs with their prices, and what to optimise.

`load_problem` reads YAML; docs/planner.md shows a whole file. Lengths are tokens, rates requests per second, prices USD
per GPU and hour, bandwidths GB/s (1e9 bytes).
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import yaml

from hetkv.costmodel import Catalogue, load_catalogue, load_efficiencies, model_shape
from hetkv.costmodel.textfile import load_yaml, read_utf8
from hetkv.errors import InputError
from hetkv.simulator.deployment import Engine, LinkPlan, Price, check_dtypes, check_engine, engine_of, parse_plan
from hetkv.simulator.measured import with_measured_link
from hetkv.simulator.traffic.lengths import parse_lengths

Basis = Literal["on_demand", "reserved", "rental_model"]
Goal = Literal["cost", "goodput", "split"]
Roles = Literal["any", "disaggregated", "aggregated"]
MOST_CV = 10.0
"""Of the gaps between arrivals: beyond it a simulation has too few bursts to tell a percentile."""


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A model to serve. `engine` overrides fields of the problem's; `tp`, `pp` and `dp` are the sizes to consider.

    Left out, `tp` is every power of two up to a node, `pp` is 1, 2 and 4, and `dp` (attention replicas that share the
    experts, which are then whole on one of `tp * dp` ranks) is 1; for a model with experts also every power of two with
    which `tp * dp` fills no more than a node, and with `tp` 1 two and four nodes.
    """

    name: str
    engine: dict[str, Any] = {}
    tp: list[int] | None = None
    pp: list[int] | None = None
    dp: list[int] | None = None


class WorkloadClass(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Traffic of one kind and its targets: `ttft_ms` at `ttft_percentile`, `tpot_ms` at `tpot_percentile`.

    Arrivals are Poisson, or with an `arrival_cv` above 1 bursts: gaps are of a gamma distribution with this coefficient
    of variation, as `hetkv simulate --arrivals gamma --cv` has them. With the goals `goodput` and `split`, `rate` is
    the class's share of the mix.
    """

    name: str
    rate: float
    prompt_tokens: str
    output_tokens: str
    ttft_ms: float
    tpot_ms: float
    ttft_percentile: float = 99.0
    tpot_percentile: float = 99.0
    model: str = ""
    arrival_cv: float = 1.0


class GpuOffer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A GPU type that can be had. `cap` bounds the number of GPUs; `rent: node` sells whole nodes only.

    `gpus_per_node` defaults to the catalogue's. A price may be left out only with the goal `split`. `engine` overrides
    fields of the model's on this GPU type: another engine, version or dtype. `watts_per_gpu` is what a rented GPU draws
    with its share of host, cooling and losses, `co2_g_per_kwh` the carbon intensity of its power: the user's figures.
    """

    gpu: str
    usd_per_gpu_hour: float | None = None
    basis: Basis | None = None
    as_of: str | None = None
    cap: int | None = None
    gpus_per_node: int | None = None
    rent: Literal["gpu", "node"] = "gpu"
    engine: dict[str, Any] = {}
    watts_per_gpu: float | None = None
    co2_g_per_kwh: float | None = None


class PairLimit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All KV from prefill instances of one GPU type to decode instances of another, GB/s; 0 forbids the pair."""

    prefill: str
    decode: str
    gb_s: float


class Objective(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """`cost`: least USD/hour for the classes' rates. `goodput`: the largest multiple of the rates for a budget.

    `split`: the largest multiple of the rates on the GPUs of the `cap`s, whatever they cost.

    Costs are those of the GPUs, and of the power that they draw and the carbon of it at `usd_per_kwh` and
    `usd_per_kg_co2`: high ones make a plan of little power or carbon.
    """

    goal: Goal = "cost"
    budget_usd_per_hour: float | None = None
    usd_per_kwh: float = 0.0
    usd_per_kg_co2: float = 0.0

    def for_cost(self) -> Objective:
        """The least cost, by the same prices."""
        return msgspec.structs.replace(self, goal="cost", budget_usd_per_hour=None)


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The most that all rented GPUs together may draw, in kW, and cause, in kg of CO2 per hour."""

    kw: float | None = None
    co2_kg_per_hour: float | None = None


class Problem(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A planning problem. `spare_instances: 1` is N+1: every pool meets the targets with one instance down.

    `roles` restricts the search: `any` takes the cheaper of a disaggregated and an aggregated deployment of each model.
    `first_token_at`: where a client's first token comes from when disaggregated; the proxies of the launch lines stream
    from decode. `allow_unstartable` also offers instances that the engine or the KV connector cannot start (by the
    table of `hetkv/engines.py`).
    """

    models: list[ModelSpec]
    classes: list[WorkloadClass]
    gpus: list[GpuOffer]
    link: LinkPlan = LinkPlan(gb_s="nic")
    pair_limits: list[PairLimit] = []
    limits: Limits = Limits()
    objective: Objective = Objective()
    spare_instances: Literal[0, 1] = 0
    roles: Roles = "any"
    engine: Engine = Engine()
    first_token_at: Literal["prefill", "decode"] = "decode"
    allow_mixed_price_bases: bool = False
    allow_unstartable: bool = False
    catalogue: list[str] = []
    calibration: list[str] = []
    seed: int = 0

    def classes_of(self, model: str) -> list[WorkloadClass]:
        """The classes that `model` serves, in order."""
        return [c for c in self.classes if c.model == model]

    def offer(self, gpu: str) -> GpuOffer:
        """The offer of a GPU by its catalogue name."""
        return next(o for o in self.gpus if o.gpu == gpu)

    def engine_for(self, model: ModelSpec, offer: GpuOffer | None = None) -> Engine:
        """The problem's engine settings with the model's over them, and those of a GPU type over both."""
        own = offer.engine if offer is not None else {}
        return msgspec.convert({**msgspec.structs.asdict(self.engine), **model.engine, **own}, Engine)

    def usd_per_gpu_hour(self, offer: GpuOffer) -> float:
        """What a rented GPU costs with its power and carbon; 0 for one without a price."""
        if offer.usd_per_gpu_hour is None:
            return 0.0
        kw = (offer.watts_per_gpu or 0.0) / 1e3
        carbon = (offer.co2_g_per_kwh or 0.0) / 1e3 * self.objective.usd_per_kg_co2
        return offer.usd_per_gpu_hour + kw * (self.objective.usd_per_kwh + carbon)

    @property
    def prices(self) -> list[Price]:
        """The offers' prices as a deployment plan states them; empty where one has none."""
        found = []
        for o in self.gpus:
            if o.usd_per_gpu_hour is None or o.basis is None or o.as_of is None:
                return []
            found.append(Price(o.gpu, o.usd_per_gpu_hour, o.basis, o.as_of))
        return found


def load_problem(path: str | Path) -> Problem:
    """Read a problem from YAML. Anything wrong is one `InputError` that names file, place and value.

    `catalogue` and `calibration` files count from the problem's own folder.
    """
    try:
        document = load_yaml(read_utf8(path))
    except OSError as error:
        raise InputError(f"{path}: the problem cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    document = with_measured_link(document, Path(path).parent, str(path))
    if isinstance(document, dict):
        for key in ("catalogue", "calibration"):
            if isinstance(document.get(key), list):
                document[key] = [str(Path(path).parent / str(f)) for f in document[key]]
    return parse_problem(document, str(path))


def parse_problem(document: Any, origin: str) -> Problem:
    """A checked problem from the parsed YAML document; `origin` names it in errors."""
    try:
        problem = msgspec.convert(document, Problem)
    except msgspec.ValidationError as error:
        raise InputError(f"{origin}: {error}") from None
    return check_problem(problem, origin)


def dump_problem(problem: Problem) -> str:
    """The YAML text of a problem; `load_problem` reads it back."""
    return str(yaml.safe_dump(msgspec.to_builtins(problem), sort_keys=False, width=110))


def check_problem(problem: Problem, origin: str = "problem") -> Problem:
    """The problem with GPUs by their catalogue names and every class with its model; `InputError` for what is wrong."""
    for field in ("models", "classes", "gpus"):
        if not getattr(problem, field):
            raise InputError(f"{origin}: `{field}` is empty")
    catalogue = load_catalogue(problem.catalogue)
    problem = msgspec.structs.replace(
        problem,
        gpus=[_offer(o, f"{origin}: gpus[{i}]", catalogue, problem.objective.goal) for i, o in enumerate(problem.gpus)],
        pair_limits=[_pair(p, f"{origin}: pair_limits[{i}]", catalogue) for i, p in enumerate(problem.pair_limits)],
        classes=[_class(c, i, problem, origin) for i, c in enumerate(problem.classes)],
    )
    _unique([m.name for m in problem.models], f"{origin}: models")
    _unique([c.name for c in problem.classes], f"{origin}: classes")
    _unique([o.gpu for o in problem.gpus], f"{origin}: gpus")
    for i, model in enumerate(problem.models):
        _model(model, i, problem, origin)
    offered = {o.gpu for o in problem.gpus}
    for i, pair in enumerate(problem.pair_limits):
        for name in (pair.prefill, pair.decode):
            if name not in offered:
                raise InputError(f"{origin}: pair_limits[{i}]: {name} is not among `gpus`")
    bases = sorted({o.basis for o in problem.gpus if o.basis})
    if len(bases) > 1 and not problem.allow_mixed_price_bases:
        raise InputError(
            f"{origin}: gpus: prices of different basis ({', '.join(bases)}) do not compare; "
            "`allow_mixed_price_bases: true` mixes them nevertheless"
        )
    _objective(problem, origin)
    _limits(problem, origin)
    _link(problem, origin)
    if problem.seed < 0:
        raise InputError(f"{origin}: `seed` must be 0 or more, got {problem.seed}")
    return problem


def _offer(offer: GpuOffer, where: str, catalogue: Catalogue, goal: Goal) -> GpuOffer:
    try:
        gpu = catalogue.gpu(offer.gpu)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    where = f"{where} ({gpu.name})"
    if offer.usd_per_gpu_hour is None:
        if goal != "split":
            raise InputError(f"{where}: missing price `usd_per_gpu_hour`")
    else:
        _positive(offer.usd_per_gpu_hour, f"{where}: `usd_per_gpu_hour`")
        for field in ("basis", "as_of"):
            if not getattr(offer, field):
                raise InputError(f"{where}: a price needs `{field}`")
        check_date(str(offer.as_of), f"{where}: `as_of`")
    if offer.cap is None:
        if goal == "split":
            raise InputError(f"{where}: missing `cap`: the goal `split` divides a given fleet")
    elif offer.cap < 0:
        raise InputError(f"{where}: `cap` must be 0 or more GPUs, got {offer.cap}")
    try:
        msgspec.convert({**msgspec.structs.asdict(Engine()), **offer.engine}, Engine)
    except msgspec.ValidationError as error:
        raise InputError(f"{where}: engine: {error}") from None
    for field in ("watts_per_gpu", "co2_g_per_kwh"):
        value = getattr(offer, field)
        if value is not None and not 0 <= value < float("inf"):
            raise InputError(f"{where}: `{field}` must be 0 or more, got {value}")
    node = offer.gpus_per_node
    if node is None:
        node = int(gpu.value("gpus_per_node"))
    _positive(node, f"{where}: `gpus_per_node`")
    return msgspec.structs.replace(offer, gpu=gpu.name, gpus_per_node=node)


def check_date(text: str, what: str) -> None:
    """`InputError` unless `text` is a month or a day as ISO 8601 writes it: a price counts only with its date."""
    try:
        date.fromisoformat(text if len(text) == len("2026-05-01") else f"{text}-01")
    except ValueError:
        raise InputError(f"{what} must be a date such as 2026-05 or 2026-05-31, got {text!r}") from None


def _pair(pair: PairLimit, where: str, catalogue: Catalogue) -> PairLimit:
    try:
        names = catalogue.gpu(pair.prefill).name, catalogue.gpu(pair.decode).name
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if not 0 <= pair.gb_s < float("inf"):
        raise InputError(f"{where}: `gb_s` must be 0 or more, got {pair.gb_s}")
    return PairLimit(*names, pair.gb_s)


def _class(spec: WorkloadClass, index: int, problem: Problem, origin: str) -> WorkloadClass:
    where = f"{origin}: classes[{index}] ({spec.name})"
    names = [m.name for m in problem.models]
    model = spec.model or (names[0] if len(names) == 1 else "")
    if model not in names:
        what = f"`model` {model!r} is not among" if model else "missing `model`: there are several"
        raise InputError(f"{where}: {what} `models` ({', '.join(names)})")
    for field in ("rate", "ttft_ms", "tpot_ms"):
        _positive(getattr(spec, field), f"{where}: `{field}`")
    if not 1 <= spec.arrival_cv <= MOST_CV:
        raise InputError(f"{where}: `arrival_cv` must be 1 (Poisson) to {MOST_CV:g}, got {spec.arrival_cv:g}")
    for field in ("ttft_percentile", "tpot_percentile"):
        value = getattr(spec, field)
        if not 0 < value < 100:
            raise InputError(f"{where}: `{field}` must be between 0 and 100, got {value}")
    for field in ("prompt_tokens", "output_tokens"):
        parse_lengths(getattr(spec, field), f"{where}: `{field}`")
    return msgspec.structs.replace(spec, model=model)


def _model(model: ModelSpec, index: int, problem: Problem, origin: str) -> None:
    where = f"{origin}: models[{index}] ({model.name})"
    efficiencies = load_efficiencies(problem.calibration)
    try:
        model_shape(model.name)
        engines = [problem.engine_for(model, offer) for offer in problem.gpus]
        for engine in engines:
            check_engine(engine.name, efficiencies)
    except (InputError, msgspec.ValidationError) as error:
        raise InputError(f"{where}: {error}") from None
    for field in ("tp", "pp", "dp"):
        sizes = getattr(model, field)
        if sizes is not None and not sizes:
            raise InputError(f"{where}: `{field}` is empty")
        for size in sizes or ():
            _positive(size, f"{where}: `{field}`")
    if not problem.classes_of(model.name):
        raise InputError(f"{where}: no class uses this model")
    for spec in problem.classes_of(model.name):
        _positions(spec, model.name, f"{origin}: class {spec.name}")
    # The deployment's own checks of the engine settings.
    for offer, engine in zip(problem.gpus, engines, strict=True):
        pool = {"role": "aggregated", "gpu": offer.gpu}
        plan = parse_plan({"model": model.name, "pools": [pool], "engine": msgspec.to_builtins(engine)}, where)
        check_dtypes(engine_of(plan, plan.pools[0], where), where)


def _positions(spec: WorkloadClass, model: str, where: str) -> None:
    """Engines reject requests that are longer than the model's positions: no GPU helps there."""
    most = model_shape(model).max_positions
    draws = [
        parse_lengths(text, where)(np.random.default_rng([13, i]), 20_000)
        for i, text in enumerate((spec.prompt_tokens, spec.output_tokens))
    ]
    share = float((draws[0] + draws[1] > most).mean()) if most else 0.0
    if share > 1 - min(spec.ttft_percentile, spec.tpot_percentile) / 100:
        raise InputError(
            f"{where}: {share:.1%} of its requests are longer than the {most:,} positions of {model}; engines "
            "reject them"
        )


def _objective(problem: Problem, origin: str) -> None:
    goal, budget = problem.objective.goal, problem.objective.budget_usd_per_hour
    if goal == "goodput":
        if budget is None:
            raise InputError(f"{origin}: objective: missing `budget_usd_per_hour` for the goal `goodput`")
        _positive(budget, f"{origin}: objective: `budget_usd_per_hour`")
    elif budget is not None:
        raise InputError(f"{origin}: objective: `budget_usd_per_hour` belongs to the goal `goodput`, not `{goal}`")


def _limits(problem: Problem, origin: str) -> None:
    power, carbon = ("watts_per_gpu",), ("watts_per_gpu", "co2_g_per_kwh")
    for limit, fields in (("kw", power), ("co2_kg_per_hour", carbon)):
        most = getattr(problem.limits, limit)
        if most is not None:
            _positive(most, f"{origin}: limits: `{limit}`")
            _figures(problem, fields, f"the limit `{limit}`", origin)
    for price, fields in (("usd_per_kwh", power), ("usd_per_kg_co2", carbon)):
        usd = getattr(problem.objective, price)
        if not 0 <= usd < float("inf"):
            raise InputError(f"{origin}: objective: `{price}` must be 0 or more, got {usd}")
        if usd:
            _figures(problem, fields, f"`{price}`", origin)


def _figures(problem: Problem, fields: tuple[str, ...], what: str, origin: str) -> None:
    for i, offer in enumerate(problem.gpus):
        for field in fields:
            if getattr(offer, field) is None:
                raise InputError(f"{origin}: gpus[{i}] ({offer.gpu}): missing `{field}` for {what}")


def _link(problem: Problem, origin: str) -> None:
    for field in ("gb_s", "fabric_gb_s"):
        value = getattr(problem.link, field)
        if value is not None and value != "nic":
            _positive(value, f"{origin}: link `{field}`")
    if not 0 <= problem.link.latency_us < float("inf"):
        raise InputError(f"{origin}: link `latency_us` must be 0 or more, got {problem.link.latency_us}")


def _unique(names: list[str], where: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{where}: {name} is given twice")


def _positive(value: float, what: str) -> None:
    if not 0 < value < float("inf"):
        raise InputError(f"{what} must be greater than 0, got {value}")
