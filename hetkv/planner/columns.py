"""Columns of the programme: what one instance can be (role, GPU, TP, PP, prompt budget) and what it carries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from hetkv.costmodel import (
    Catalogue,
    Efficiencies,
    Placement,
    RooflineStepModel,
    StepModel,
    load_catalogue,
    load_efficiencies,
    model_shape,
    step_model,
)
from hetkv.costmodel.catalogue import Gpu
from hetkv.costmodel.models import ModelShape
from hetkv.costmodel.step import count_work
from hetkv.errors import InputError
from hetkv.planner.capacity import Capacity, Demand, aggregated, decode, prefill, prompt_seconds
from hetkv.planner.problem import GpuOffer, ModelSpec, Problem
from hetkv.planner.traffic import samples
from hetkv.simulator.deployment import Engine
from hetkv.simulator.scaled import ScaledStepModel

Array = NDArray[np.float64]
Role = Literal["prefill", "decode", "aggregated"]

PORT_LOAD = 0.9
"""Share of a port's bandwidth that plans use: bursts take the rest."""

BUDGETS = (512, 2048)
"""Prompt tokens per step that an aggregated instance may be limited to, beside the engine's own."""


@dataclass(frozen=True, eq=False)
class Column:
    """One kind of instance for one model. Rates are requests/s of the model's mix on one instance.

    `rates[i]` holds in a pool of `COUNTS[i]` or more, `relaxed` without queueing. `port_rate` is what its port carries.
    """

    model: str
    role: Role
    gpu: str
    tp: int
    pp: int
    budget: int
    price: float
    rates: Array
    relaxed: float
    port_rate: float
    batch: float
    kv_tokens: int
    steps: StepModel = field(repr=False)

    @property
    def gpus(self) -> int:
        return self.tp * self.pp

    @property
    def key(self) -> tuple[str, str, str, int, int, int]:
        """What tells columns apart."""
        return self.model, self.role, self.gpu, self.tp, self.pp, self.budget

    def __str__(self) -> str:
        shape = f"tp {self.tp}" + (f" pp {self.pp}" if self.pp > 1 else "")
        return f"{self.role} {self.gpu} {shape}"


@dataclass
class Columns:
    """All columns of a problem, and why sizes and GPUs that were tried are not among them: `refused[what] = why`."""

    columns: list[Column] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    demands: dict[str, Demand] = field(default_factory=dict)


def build_columns(problem: Problem, end: Literal["low", "high"] | None = None, every: bool = False) -> Columns:
    """Every column that fits in memory and serves the targets at some rate.

    With `every`, also those that serve them at none: in a mixed pool a slow instance may still take the short prompts.

    With `end`, step times are at that end of the cost model's 90 % interval.
    """
    found = Columns()
    catalogue, efficiencies = load_catalogue(problem.catalogue), load_efficiencies(problem.calibration)
    for model in problem.models:
        demand = found.demands[model.name] = Demand(samples(problem.classes_of(model.name)))
        builder = _Builder(problem, model, demand, catalogue, efficiencies, end, every, found)
        builder.build()
    return found


@dataclass
class _Builder:
    problem: Problem
    model: ModelSpec
    demand: Demand
    catalogue: Catalogue
    efficiencies: Efficiencies
    end: Literal["low", "high"] | None
    every: bool
    found: Columns

    def build(self) -> None:
        shape, engine = model_shape(self.model.name), self.problem.engine_for(self.model)
        places = [
            (offer, tp, pp, steps)
            for offer in self.problem.gpus
            if offer.cap != 0
            for tp, pp in sizes(self.model, offer, shape)
            if (steps := self._steps(offer, tp, pp, shape, engine)) is not None
        ]
        if self.problem.roles != "aggregated":
            service: list[list[Array]] = []
            prompts = [s.prompts for s in self.demand.samples]
            for offer, tp, pp, steps in places:
                times = prompt_seconds(steps, prompts, engine.max_num_batched_tokens)
                capacity = prefill(steps, self.demand, engine.max_num_batched_tokens, times)
                if self._add("prefill", offer, tp, pp, steps, capacity, engine):
                    service.append(times)
            if not service:
                return self._both(places, shape, engine)
            fastest = [np.min(times, axis=0) for times in zip(*service, strict=True)]
            for offer, tp, pp, steps in places:
                shown = self._shown(offer, tp * pp, steps, fastest, shape.layers)
                capacity = decode(steps, self.demand, engine.max_num_seqs, steps.kv_capacity_tokens, shown)
                self._add("decode", offer, tp, pp, steps, capacity, engine)
        return self._both(places, shape, engine)

    def _both(self, places: list[tuple[GpuOffer, int, int, StepModel]], shape: ModelShape, engine: Engine) -> None:
        if self.problem.roles == "disaggregated":
            return
        for offer, tp, pp, full in places:
            for budget in sorted({engine.max_num_batched_tokens, *BUDGETS}):
                if budget > engine.max_num_batched_tokens or budget <= engine.max_num_seqs:
                    continue
                own = msgspec.structs.replace(engine, max_num_batched_tokens=budget)
                steps = full
                if budget != engine.max_num_batched_tokens:
                    other = self._steps(offer, tp, pp, shape, own)
                    assert other is not None
                    steps = other
                capacity = aggregated(steps, self.demand, engine.max_num_seqs, steps.kv_capacity_tokens, budget)
                self._add("aggregated", offer, tp, pp, steps, capacity, own)

    def _steps(self, offer: GpuOffer, tp: int, pp: int, shape: ModelShape, engine: Engine) -> StepModel | None:
        """The step model of one size; None, and a word about it, where the model does not fit."""
        gpu = self.catalogue.gpu(offer.gpu)
        count_work(gpu, shape, Placement(tp, pp), engine.weight_dtype, engine.kv_dtype)  # missing figures are errors
        where = f"{shape.name} on {gpu.name} tp {tp} pp {pp}"
        try:
            steps: StepModel = steps_of(gpu, shape, tp, pp, engine, self.catalogue, self.efficiencies)
        except InputError as error:
            self.found.refused[where] = f"memory: {error}"
            return None
        for sample in self.demand.samples:
            for percentile in (sample.spec.ttft_percentile, sample.spec.tpot_percentile):
                if (sample.prompts + sample.others > steps.kv_capacity_tokens).mean() > 1 - percentile / 100:
                    self.found.refused[where] = (
                        f"memory: room for {steps.kv_capacity_tokens} KV tokens, too few for requests of class "
                        f"{sample.spec.name}"
                    )
                    return None
        return ScaledStepModel(steps, self.end) if self.end else steps

    def _port(self, offer: GpuOffer, gpus: int) -> float:
        """Bytes per second of an instance's port."""
        link = self.problem.link
        if link.gb_s != "nic":
            return link.gb_s * 1e9
        return self.catalogue.gpu(offer.gpu).value("nic_gbit_s") / 8 * 1e9 * gpus

    def _shown(
        self, offer: GpuOffer, gpus: int, steps: StepModel, fastest: list[Array], layers: int
    ) -> list[Array | float]:
        """Seconds of KV transfer that show after the fastest prefill, for the prompts of each class."""
        link = self.problem.link
        port = self._port(offer, gpus)
        found: list[Array | float] = []
        for sample, service in zip(self.demand.samples, fastest, strict=True):
            alone = sample.prompts * steps.kv_bytes_per_token / port
            if link.overlap == "layerwise":
                alone = np.maximum(alone / layers, alone - service * (1 - 1 / layers))
            found.append(alone + link.latency_us / 1e6)
        return found

    def _add(
        self, role: Role, offer: GpuOffer, tp: int, pp: int, steps: StepModel, capacity: Capacity, engine: Engine
    ) -> bool:
        if not capacity.rates.max() > 0:
            self.found.refused[f"{role} of {self.model.name} on {offer.gpu} tp {tp} pp {pp}"] = (
                "TTFT" if role == "prefill" else "TPOT" if role == "decode" else "TTFT or TPOT"
            )
            if not self.every:
                return False
        port_rate = float("inf")
        if role != "aggregated":
            port_rate = PORT_LOAD * self._port(offer, tp * pp) / (self.demand.prompt * steps.kv_bytes_per_token)
        rates = np.minimum(capacity.rates, port_rate)
        self.found.columns.append(
            Column(
                model=self.model.name,
                role=role,
                gpu=offer.gpu,
                tp=tp,
                pp=pp,
                budget=engine.max_num_batched_tokens,
                price=(offer.usd_per_gpu_hour or 0.0) * tp * pp,
                rates=rates,
                relaxed=min(capacity.relaxed, port_rate / PORT_LOAD),
                port_rate=port_rate,
                batch=capacity.batch,
                kv_tokens=steps.kv_capacity_tokens,
                steps=steps,
            )
        )
        return True


def steps_of(
    gpu: Gpu, shape: ModelShape, tp: int, pp: int, engine: Engine, catalogue: Catalogue, efficiencies: Efficiencies
) -> RooflineStepModel:
    """The step model of one instance under `engine`; `InputError` where the model does not fit."""
    return step_model(
        gpu,
        shape,
        tp,
        pp,
        engine=engine.name,
        engine_version=engine.version,
        weight_dtype=engine.weight_dtype,
        kv_dtype=engine.kv_dtype,
        max_batched_tokens=engine.max_num_batched_tokens,
        memory_share=engine.memory_share,
        catalogue=catalogue,
        efficiencies=efficiencies,
    )


def sizes(model: ModelSpec, offer: GpuOffer, shape: ModelShape) -> list[tuple[int, int]]:
    """(tp, pp) to try: TP within a node and a divisor of the heads; an instance is part of a node or whole nodes."""
    node = offer.gpus_per_node or 1
    tps = model.tp or [2**i for i in range(node.bit_length()) if 2**i <= node]
    found = []
    for tp in tps:
        for pp in model.pp or (1, 2, 4):
            whole = node % (tp * pp) == 0 or (tp * pp) % node == 0
            within = offer.cap is None or tp * pp <= offer.cap
            if tp <= node and shape.heads % tp == 0 and pp <= shape.layers and whole and within:
                found.append((tp, pp))
    return found
