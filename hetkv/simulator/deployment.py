"""`plan.yaml`: which instances there are, what joins them, what they cost. Read by every command that needs a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

from hetkv.costmodel import (
    Catalogue,
    Efficiencies,
    Gpu,
    ModelShape,
    Placement,
    RooflineStepModel,
    StepModel,
    load_catalogue,
    load_efficiencies,
    model_shape,
    step_model,
)
from hetkv.costmodel.catalogue import DTYPE_BYTES
from hetkv.costmodel.textfile import load_yaml, read_utf8
from hetkv.engines import ANY, ENGINES, Use
from hetkv.errors import InputError
from hetkv.simulator.measured import measured_steps, with_measured_link
from hetkv.simulator.pages import NEVER
from hetkv.simulator.pool import AGGREGATED, DECODE, PREFILL, Pool

Role = Literal["aggregated", "prefill", "decode"]
Discipline = Literal[
    "balanced", "central_queue", "join_shortest_queue", "least_loaded", "prefix_aware", "round_robin", "weighted"
]


class Engine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Engine settings, by vLLM's names. `memory_share` is the part of the GPU memory that the engine may use.

    `confidence`: measured steps take no longer than the assumed ones with this probability; 0.5 is the centre.
    `hybrid_kv_cache`: layers with a sliding window keep the window alone, not every token.
    """

    name: str = "vllm"
    version: str | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    block_size: int = 16
    chunked_prefill: bool = True
    prefix_caching: bool = False
    memory_share: float = 0.9
    weight_dtype: str = "bf16"
    kv_dtype: str = "bf16"
    confidence: float = 0.5
    hybrid_kv_cache: bool = True


class PoolPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """`count` equal instances. `engine` overrides fields of the plan's; `kv_tokens` overrides the KV capacity.

    `weight` is the share of requests that one of them gets under the routing discipline `weighted`.

    `stages` (layers of each pipeline stage) and `layout` (of the KV blocks) are read by `hetkv demo` alone.

    `steps` names steps that `hetkv calibrate --bench` fitted, which are taken in place of the cost model's; `gpu` is
    then a name alone, and `kv_tokens` must be given.
    """

    role: Role
    gpu: str
    name: str = ""
    tp: int = 1
    pp: int = 1
    dp: int = 1
    count: int = 1
    engine: dict[str, Any] = {}
    kv_tokens: int | None = None
    stages: list[int] | None = None
    layout: str | None = None
    weight: float = 1.0
    steps: str | None = None

    @property
    def gpus(self) -> int:
        """GPUs of one instance."""
        return self.tp * self.pp * self.dp


class LinkPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """KV link: GB/s (1e9 bytes) of one instance's port, each direction; `nic` takes the GPUs' NICs.

    In a file, `measured: NAME` takes both from a link that `hetkv calibrate --bench` fitted (`measured.py`).

    `fabric_gb_s` bounds all transfers together. `overlap: layerwise` sends each layer while the next one is computed.
    """

    gb_s: float | Literal["nic"]
    fabric_gb_s: float | None = None
    latency_us: float = 20.0
    overlap: Literal["layerwise", "none"] = "layerwise"


class Routing(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Disciplines for prompts and, in a disaggregated deployment, for KV."""

    prefill: Discipline = "join_shortest_queue"
    decode: Discipline = "join_shortest_queue"


class OutagePlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One instance (`decode/3`) is down from `at_s`, for `down_s` seconds or for ever."""

    instance: str
    at_s: float
    down_s: float | None = None


class HazardPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Every instance of a pool fails at random: exponential times of these means."""

    pool: str
    mtbf_s: float
    mttr_s: float


class FailurePlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """`requests`: what happens to a failed instance's requests: computed again elsewhere or failed."""

    outages: list[OutagePlan] = []
    random: list[HazardPlan] = []
    requests: Literal["restart", "fail"] = "restart"


class Price(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The user's price of one GPU type. `as_of` is a date; `basis` says what kind of price it is."""

    gpu: str
    usd_per_gpu_hour: float
    basis: Literal["on_demand", "reserved", "rental_model"]
    as_of: str


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A deployment. `first_token_at` is where the client's first token comes from when disaggregated.

    `front_ms` is what a request and a token take between client and engine, together: it is added to TTFT and E2E.
    """

    model: str
    pools: list[PoolPlan]
    engine: Engine = Engine()
    link: LinkPlan | None = None
    routing: Routing = Routing()
    failures: FailurePlan = FailurePlan()
    prices: list[Price] = []
    allow_mixed_price_bases: bool = False
    first_token_at: Literal["prefill", "decode"] = "decode"
    front_ms: float = 0.0
    catalogue: list[str] = []
    calibration: list[str] = []

    @property
    def disaggregated(self) -> bool:
        return any(p.role == PREFILL for p in self.pools)


StepModels = Callable[[PoolPlan, Engine], StepModel]


def load_plan(path: str | Path, model: str | None = None) -> Plan:
    """Read `plan.yaml`, with `model` in place of its own. Anything wrong is an `InputError` by file and field.

    `catalogue` and `calibration` files count from the plan's own folder.
    """
    try:
        document = load_yaml(read_utf8(path))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    folder = Path(path).parent
    if model is not None and isinstance(document, dict):
        document["model"] = model
    plan = parse_plan(with_measured_link(document, folder, str(path)), str(path))
    return msgspec.structs.replace(
        plan,
        catalogue=[str(folder / f) for f in plan.catalogue],
        calibration=[str(folder / f) for f in plan.calibration],
    )


def parse_plan(document: Any, origin: str) -> Plan:
    """A plan from the parsed YAML document; `origin` names it in errors."""
    try:
        plan = msgspec.convert(document, Plan)
    except msgspec.ValidationError as error:
        raise InputError(f"{origin}: {error}") from None
    pools = [msgspec.structs.replace(p, name=p.name or p.role) for p in plan.pools]
    plan = msgspec.structs.replace(plan, pools=pools)
    _check(plan, origin)
    return plan


def dump_plan(plan: Plan) -> str:
    """The YAML text of a plan; `load_plan` reads it back."""
    return str(yaml.safe_dump(msgspec.to_builtins(plan), sort_keys=False, width=110))


def engine_of(plan: Plan, pool: PoolPlan, origin: str = "plan") -> Engine:
    """The plan's engine settings with the pool's own over them."""
    try:
        return msgspec.convert({**msgspec.structs.asdict(plan.engine), **pool.engine}, Engine)
    except msgspec.ValidationError as error:
        raise InputError(f"{origin}: pool {pool.name}: engine: {error}") from None


def check_dtypes(engine: Engine, where: str) -> None:
    """`InputError` names a dtype that the cost model has no figures of; the runtime has more, such as float32."""
    for kind, dtype in (("weight", engine.weight_dtype), ("KV", engine.kv_dtype)):
        if dtype not in DTYPE_BYTES:
            raise InputError(f"{where}: unknown {kind} dtype {dtype!r}; known are {', '.join(DTYPE_BYTES)}")


def build_pools(
    plan: Plan, origin: str = "plan", models: StepModels | None = None, skip_ahead: bool = True
) -> list[Pool]:
    """The pools, ready to run. Step models come from the catalogue, or from `models`.

    `InputError` where a GPU, model or figure is unknown or where the weights leave no room for KV.
    """
    catalogue = load_catalogue(plan.catalogue)
    efficiencies = load_efficiencies(plan.calibration)
    with _where(f"{origin}: model"):
        shape = model_shape(plan.model)
    pools = []
    for pool in plan.pools:
        engine = engine_of(plan, pool, origin)
        if models is None and not pool.steps:
            check_dtypes(engine, f"{origin}: pool {pool.name}")
        with _where(f"{origin}: pool {pool.name}"):
            gpu = pool.gpu if pool.steps else catalogue.gpu(pool.gpu).name
            if models is not None:
                steps = models(pool, engine)
            elif pool.steps:
                steps = measured_steps(plan.calibration, pool)
            else:
                check_engine(engine.name, efficiencies)
                place = Placement(pool.tp, pool.pp, pool.dp)
                steps = step_model_of(engine, catalogue.gpu(pool.gpu), shape, place, catalogue, efficiencies)
        tokens = pool.kv_tokens or steps.kv_capacity_tokens
        if tokens < engine.block_size:
            raise InputError(f"{origin}: pool {pool.name}: room for {tokens} KV tokens, less than one block")
        chunk = engine.max_num_batched_tokens if engine.chunked_prefill else inf
        pools.append(
            Pool(
                name=pool.name,
                role=pool.role,
                gpu=gpu,
                gpus=pool.gpus,
                count=pool.count,
                model=steps,
                layers=shape.layers,
                kv_blocks=tokens // engine.block_size,
                block_size=engine.block_size,
                max_num_seqs=engine.max_num_seqs * pool.dp,
                max_num_batched_tokens=engine.max_num_batched_tokens * pool.dp,
                chunked_prefill=engine.chunked_prefill,
                prefix_caching=engine.prefix_caching,
                first_token_at=plan.first_token_at if pool.role != AGGREGATED else PREFILL,
                weight=pool.weight,
                most_tokens=most_tokens(shape, tokens, steps, pool.dp, chunk),
                skip_ahead=skip_ahead,
            )
        )
    return pools


def most_tokens(shape: ModelShape, room: int, steps: StepModel, dp: int, chunk: float) -> int:
    """KV tokens of the longest request: what one replica holds, and what the model has positions for.

    `room` is the instance's in tokens, prompts are computed in chunks of `chunk`.
    """
    fits = steps.kv.longest(room * steps.kv_bytes_per_token / dp, chunk)
    return int(min(fits, shape.max_positions - 1 if shape.max_positions else inf, NEVER))


@contextmanager
def _where(prefix: str) -> Iterator[None]:
    """Say in which part of the plan the cost model found a fault."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{prefix}: {error}") from None


def check_engine(name: str, efficiencies: Efficiencies) -> None:
    """`InputError` for an engine that has neither launch lines nor a calibration entry."""
    known = dict.fromkeys([*ENGINES, *sorted({key.engine for key in efficiencies.entries if key.engine})])
    if name not in known:
        raise InputError(f"unknown engine {name!r}; known are {', '.join(known)}")


def step_model_of(
    engine: Engine, gpu: Gpu, shape: ModelShape, place: Placement, catalogue: Catalogue, efficiencies: Efficiencies
) -> RooflineStepModel:
    """The cost model's step times of one instance under `engine`; `InputError` where the model does not fit."""
    return step_model(
        gpu,
        shape,
        place.tp,
        place.pp,
        place.dp,
        engine=engine.name,
        engine_version=engine.version,
        weight_dtype=engine.weight_dtype,
        kv_dtype=engine.kv_dtype,
        max_batched_tokens=engine.max_num_batched_tokens,
        memory_share=engine.memory_share,
        confidence=engine.confidence,
        hybrid_kv_cache=engine.hybrid_kv_cache,
        catalogue=catalogue,
        efficiencies=efficiencies,
    )


def use_of(engine: Engine, place: Placement, shape: ModelShape, disaggregated: bool, node: int = ANY) -> Use:
    """How the table of engines sees an instance, on nodes of `node` GPUs."""
    return Use(
        engine.name,
        engine.version,
        engine.weight_dtype,
        engine.kv_dtype,
        place.tp,
        place.pp,
        place.dp,
        shape.latent,
        bool(shape.state_layers),
        bool(shape.experts),
        disaggregated,
        node,
    )


def port_bytes_per_second(plan: Plan) -> float:
    """Bandwidth of one instance's port, each direction. With `nic`: the slowest instance's NICs together."""
    assert plan.link is not None
    if plan.link.gb_s != "nic":
        return plan.link.gb_s * 1e9
    catalogue = load_catalogue(plan.catalogue)
    return min(catalogue.gpu(p.gpu).value("nic_gbit_s") / 8 * 1e9 * p.gpus for p in plan.pools if p.role != AGGREGATED)


def _check(plan: Plan, origin: str) -> None:
    if not plan.pools:
        raise InputError(f"{origin}: `pools` is empty")
    if not 0 <= plan.front_ms < inf:
        raise InputError(f"{origin}: `front_ms` must be 0 or more, got {plan.front_ms}")
    names = [p.name for p in plan.pools]
    for index, pool in enumerate(plan.pools):
        where = f"{origin}: pools[{index}] ({pool.name})"
        if names.count(pool.name) > 1:
            raise InputError(f"{where}: two pools have this name; give each its own `name`")
        for field in ("tp", "pp", "dp", "count", "weight"):
            _positive(getattr(pool, field), f"{where}: `{field}`")
        if pool.kv_tokens is not None:
            _positive(pool.kv_tokens, f"{where}: `kv_tokens`")
        engine = engine_of(plan, pool, origin)
        for field in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
            _positive(getattr(engine, field), f"{where}: engine `{field}`")
        if not 0 < engine.confidence < 1:
            raise InputError(f"{where}: engine `confidence` must be between 0 and 1, got {engine.confidence}")
        if engine.chunked_prefill and engine.max_num_seqs >= engine.max_num_batched_tokens:
            raise InputError(
                f"{where}: engine `max_num_batched_tokens` {engine.max_num_batched_tokens} leaves no room for prompts "
                f"in addition to `max_num_seqs` {engine.max_num_seqs}"
            )
    roles = {p.role for p in plan.pools}
    if (PREFILL in roles) != (DECODE in roles):
        have, lack = (PREFILL, DECODE) if PREFILL in roles else (DECODE, PREFILL)
        raise InputError(f"{origin}: `pools` has the role {have} but not {lack}")
    if plan.disaggregated and plan.link is None:
        raise InputError(f"{origin}: missing field `link`: prefill and decode pools need one")
    if plan.link is not None:
        for field in ("gb_s", "fabric_gb_s"):
            value = getattr(plan.link, field)
            if value is not None and value != "nic":
                _positive(value, f"{origin}: link `{field}`")
        if not 0 <= plan.link.latency_us < float("inf"):
            raise InputError(f"{origin}: link `latency_us` must be 0 or more, got {plan.link.latency_us}")
    _check_rest(plan, origin)


def _check_rest(plan: Plan, origin: str) -> None:
    for outage in plan.failures.outages:
        if not 0 <= outage.at_s < float("inf"):
            raise InputError(
                f"{origin}: failures: outage of {outage.instance}: `at_s` must be 0 or more, got {outage.at_s}"
            )
        if outage.down_s is not None:
            _positive(outage.down_s, f"{origin}: failures: outage of {outage.instance}: `down_s`")
    for hazard in plan.failures.random:
        _positive(hazard.mtbf_s, f"{origin}: failures: pool {hazard.pool}: `mtbf_s`")
        _positive(hazard.mttr_s, f"{origin}: failures: pool {hazard.pool}: `mttr_s`")
    for price in plan.prices:
        _positive(price.usd_per_gpu_hour, f"{origin}: prices: {price.gpu}: `usd_per_gpu_hour`")
    bases = sorted({p.basis for p in plan.prices})
    if len(bases) > 1 and not plan.allow_mixed_price_bases:
        raise InputError(
            f"{origin}: prices of different basis ({', '.join(bases)}) do not compare; "
            "`allow_mixed_price_bases: true` mixes them nevertheless"
        )


def _positive(value: float, what: str) -> None:
    if not 0 < value < float("inf"):
        raise InputError(f"{what} must be greater than 0, got {value}")
