"""Columns of the integer program: what one instance can be (role, GPU, TP, PP, DP, budget) and what it carries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from hetkv.costmodel import (
    Catalogue,
    Efficiencies,
    Placement,
    StepModel,
    load_catalogue,
    load_efficiencies,
    model_shape,
)
from hetkv.costmodel.step import count_work
from hetkv.engines import ANY, obstacle
from hetkv.errors import InputError
from hetkv.planner.capacity import Capacity, Demand, aggregated, decode, prefill, prompt_times, step_times
from hetkv.planner.handover import Handover
from hetkv.planner.problem import GpuOffer, ModelSpec, Problem
from hetkv.planner.sizes import considered
from hetkv.planner.traffic import samples
from hetkv.simulator.deployment import Engine, step_model_of, use_of
from hetkv.simulator.scaled import ScaledStepModel

Array = NDArray[np.float64]
Role = Literal["prefill", "decode", "aggregated"]

PORT_LOAD = 0.9
"""Share of a port's bandwidth that plans use: bursts take the rest."""

BUDGETS = (512, 2048)
"""Prompt tokens per step that an aggregated instance may be limited to, in addition to the engine's own limit."""


@dataclass(frozen=True, eq=False)
class Column:
    """One kind of instance for one model. Rates are requests/s of the model's mix on one instance.

    `rates[i]` holds in a pool of `COUNTS[i]` or more, `relaxed` without queueing. `port_rate` is what its port carries.
    `unstartable` says why the engine cannot start it; empty where it can. `handover`, of a decode column where the
    first token comes from decode: what it takes at least, in a batch of one.
    """

    model: str
    role: Role
    gpu: str
    tp: int
    pp: int
    dp: int
    budget: int
    price: float
    rates: Array
    relaxed: float
    port_rate: float
    batch: float
    kv_tokens: int
    steps: StepModel = field(repr=False)
    unstartable: str = ""
    handover: Handover | None = None

    @property
    def gpus(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def key(self) -> tuple[str, str, str, int, int, int, int]:
        """What distinguishes columns."""
        return self.model, self.role, self.gpu, self.tp, self.pp, self.dp, self.budget

    def __str__(self) -> str:
        return f"{self.role} {self.gpu} {shape_text(Placement(self.tp, self.pp, self.dp))}"


def shape_text(place: Placement) -> str:
    """The sizes in words: `tp 8`, `tp 4 pp 2`."""
    return f"tp {place.tp}" + f" pp {place.pp}" * (place.pp > 1) + f" dp {place.dp}" * (place.dp > 1)


@dataclass
class Columns:
    """All columns of a problem, and why sizes and GPUs that were tried are not among them: `rejected[what] = why`."""

    columns: list[Column] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)
    demands: dict[str, Demand] = field(default_factory=dict)


End = Literal["low", "high"]


def build_columns(problem: Problem, end: End | Mapping[str, float] | None = None, every: bool = False) -> Columns:
    """Every column that can be started, fits in memory and serves the targets at some rate.

    With `every`, also those that serve them at none: in a mixed pool a slow instance may still take the short prompts.

    With `end`, step times are at that end of the cost model's 90 % interval, or those of a GPU so many times as long.
    """
    found = Columns()
    catalogue, efficiencies = load_catalogue(problem.catalogue), load_efficiencies(problem.calibration)
    for model in problem.models:
        demand = found.demands[model.name] = Demand(samples(problem.classes_of(model.name)))
        builder = _Builder(problem, model, demand, catalogue, efficiencies, end, every, found)
        builder.build()
    return found


class _Instance(NamedTuple):
    """A size on a GPU type whose weights leave room for the requests."""

    offer: GpuOffer
    place: Placement
    engine: Engine
    steps: StepModel


@dataclass
class _Builder:
    problem: Problem
    model: ModelSpec
    demand: Demand
    catalogue: Catalogue
    efficiencies: Efficiencies
    end: End | Mapping[str, float] | None
    every: bool
    found: Columns

    def build(self) -> None:
        self.shape = model_shape(self.model.name)
        instances = [
            _Instance(offer, place, engine, steps)
            for offer in self.problem.gpus
            if offer.cap != 0
            for engine in [self.problem.engine_for(self.model, offer)]
            for place in self._sizes(offer)
            if (steps := self._steps(offer, place, engine)) is not None
        ]
        if self.problem.roles != "aggregated":
            self._separate([i for i in instances if self._starts(i, True)])
        if self.problem.roles != "disaggregated":
            self._both([i for i in instances if self._starts(i, False)])

    def _separate(self, instances: list[_Instance]) -> None:
        """Prefill and decode columns."""
        if not instances:
            return
        prompts = [s.prompts for s in self.demand.samples]
        times = [prompt_times(i.steps, prompts, i.engine.max_num_batched_tokens * i.place.dp) for i in instances]
        fastest = [np.min([t.latency[n] for t in times], axis=0) for n in range(len(prompts))]
        late = self.problem.first_token_at == "decode"
        self.prompt_s = self.demand.mean(fastest) / self.demand.prompt
        self.sent = min(sent(i.steps, self.demand) for i in instances)
        after: list[list[Array]] = []
        for one in instances:
            shown = self._shown(one, fastest)
            places = one.engine.max_num_seqs * one.place.dp
            nothing = [np.zeros(1) for _ in shown]
            capacity = decode(one.steps, self.demand, places, nothing if late else shown, joins=not late)
            if self._add("decode", one, capacity) and late:
                step = self._step(one.steps, max(capacity.batch, 1.0))
                after.append([x + 1.5 * step for x in shown])
        extra = [np.min(rows, axis=0) for rows in zip(*after, strict=True)] if after else [np.zeros(1) for _ in prompts]
        for one, own in zip(instances, times, strict=True):
            self._add("prefill", one, prefill(one.steps, self.demand, one.engine.max_num_batched_tokens, own, extra))

    def _both(self, instances: list[_Instance]) -> None:
        """Aggregated columns, each with several prompt budgets."""
        for one in instances:
            full = one.engine.max_num_batched_tokens
            for budget in sorted({full, *BUDGETS}):
                if budget > full or budget <= one.engine.max_num_seqs:
                    continue
                own = one
                if budget != full:
                    engine = msgspec.structs.replace(one.engine, max_num_batched_tokens=budget)
                    steps = self._steps(one.offer, one.place, engine)
                    if steps is None:
                        continue
                    own = _Instance(one.offer, one.place, engine, steps)
                places = own.engine.max_num_seqs * own.place.dp
                self._add("aggregated", own, aggregated(own.steps, self.demand, places, budget * own.place.dp))

    def _sizes(self, offer: GpuOffer) -> list[Placement]:
        """The sizes to try; the reasons for the others go to `rejected`."""
        found = []
        for place, why in considered(self.model, offer, self.shape):
            if why:
                self.found.rejected[f"{self.shape.name} on {offer.gpu} {shape_text(place)}"] = why
            else:
                found.append(place)
        return found

    def _starts(self, one: _Instance, disaggregated: bool) -> bool:
        """Whether it can be started, or does not have to; adds the reason to `rejected` where not."""
        why = self._obstacle(one, disaggregated)
        if why:
            role = "disaggregated" if disaggregated else "aggregated"
            where = f"{self.shape.name} on {one.offer.gpu} {shape_text(one.place)}, {role}"
            self.found.rejected[where] = f"cannot be started: {why}"
        return not why or self.problem.allow_unstartable

    def _obstacle(self, one: _Instance, disaggregated: bool) -> str:
        return obstacle(use_of(one.engine, one.place, self.shape, disaggregated, one.offer.gpus_per_node or ANY))

    def _steps(self, offer: GpuOffer, place: Placement, engine: Engine) -> StepModel | None:
        """The step model of one size; None, with the reason in `rejected`, where the model does not fit."""
        gpu = self.catalogue.gpu(offer.gpu)
        count_work(gpu, self.shape, place, engine.weight_dtype, engine.kv_dtype)  # missing figures are errors
        where = f"{self.shape.name} on {gpu.name} {shape_text(place)}"
        try:
            steps: StepModel = step_model_of(engine, gpu, self.shape, place, self.catalogue, self.efficiencies)
        except InputError as error:
            self.found.rejected[where] = f"memory: {error}"
            return None
        chunk = engine.max_num_batched_tokens if engine.chunked_prefill else inf
        room = steps.kv.longest(steps.kv_room / place.dp, chunk)  # one replica holds a whole sequence
        for sample in self.demand.samples:
            for percentile in (sample.spec.ttft_percentile, sample.spec.tpot_percentile):
                if (sample.prompts + sample.others > room).mean() > 1 - percentile / 100:
                    self.found.rejected[where] = (
                        f"memory: room for {max(room, 0):.0f} KV tokens, too few for requests of class "
                        f"{sample.spec.name}"
                    )
                    return None
        end = self.end.get(offer.gpu) if isinstance(self.end, Mapping) else self.end
        return ScaledStepModel(steps, end) if end else steps

    def _step(self, steps: StepModel, batch: float) -> float:
        return float(step_times(steps, batch, batch * self.demand.context)[0])

    def _port(self, one: _Instance) -> float:
        """Bytes per second of an instance's port."""
        link = self.problem.link
        if link.gb_s != "nic":
            return link.gb_s * 1e9
        return self.catalogue.gpu(one.offer.gpu).value("nic_gbit_s") / 8 * 1e9 * one.place.gpus

    def _handover(self, one: _Instance) -> Handover | None:
        if self.problem.first_token_at == "prefill":
            return None
        link, port = self.problem.link, self._port(one)
        return Handover(
            one.steps.kv,
            port,
            self.prompt_s if link.overlap == "layerwise" else 0.0,
            self.shape.layers,
            link.latency_us / 1e6,
            self._step(one.steps, 1.0),
        )

    def _shown(self, one: _Instance, fastest: list[Array]) -> list[Array]:
        """Seconds of KV transfer to this instance that show after the fastest prefill, by class and prompt."""
        link, layers = self.problem.link, self.shape.layers
        port, found = self._port(one), []
        for sample, service in zip(self.demand.samples, fastest, strict=True):
            alone = one.steps.kv.bytes(sample.prompts) / port
            if link.overlap == "layerwise":
                alone = np.maximum(alone / layers, alone - service * (1 - 1 / layers))
            found.append(alone + link.latency_us / 1e6)
        return found

    def _add(self, role: Role, one: _Instance, capacity: Capacity) -> bool:
        offer, place, engine, steps = one
        if not capacity.rates.max() > 0:
            self.found.rejected[f"{role} of {self.model.name} on {offer.gpu} {shape_text(place)}"] = (
                "TTFT" if role == "prefill" else "TPOT" if role == "decode" else "TTFT or TPOT"
            )
            if not self.every:
                return False
        port_rate, handover = inf, None
        if role != "aggregated":
            bytes_each = self.sent
            if role == "decode":
                bytes_each = sent(steps, self.demand)
                handover = self._handover(one)
            port_rate = PORT_LOAD * self._port(one) / max(bytes_each, 1.0)
        self.found.columns.append(
            Column(
                model=self.model.name,
                role=role,
                gpu=offer.gpu,
                tp=place.tp,
                pp=place.pp,
                dp=place.dp,
                budget=engine.max_num_batched_tokens,
                price=self.problem.usd_per_gpu_hour(offer) * place.gpus,
                rates=np.minimum(capacity.rates, port_rate),
                relaxed=min(capacity.relaxed, port_rate / PORT_LOAD),
                port_rate=port_rate,
                batch=capacity.batch,
                kv_tokens=steps.kv_capacity_tokens,
                steps=steps,
                unstartable=self._obstacle(one, role != "aggregated"),
                handover=handover,
            )
        )
        return bool(capacity.rates.max() > 0)


def kv_bytes(found: Columns, problem: Problem) -> dict[str, float]:
    """KV bytes that one request sends, by model: the narrowest column's."""
    result: dict[str, float] = {}
    for model in problem.models:
        demand, mine = found.demands[model.name], [c.steps for c in found.columns if c.model == model.name]
        result[model.name] = max(min((sent(steps, demand) for steps in mine), default=0.0), 1.0)
    return result


def sent(steps: StepModel, demand: Demand) -> float:
    """Bytes of KV and state that an instance of `steps` is sent of one request, on average."""
    return demand.mean([steps.kv.bytes(s.prompts) for s in demand.samples])
