"""Which instances are started: from options (`2xTP2`), or from a `plan.yaml`."""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm
from pathlib import Path
from typing import NamedTuple

import msgspec

from hetkv.errors import InputError
from hetkv.kv.dtypes import DType
from hetkv.runtime.batching import Limits
from hetkv.runtime.plan import LAYOUTS, InstancePlan, SideOptions, check_instances
from hetkv.serve.instance import InstanceConfig, model_config
from hetkv.simulator.router import BALANCED

PREFIX_TOKENS = 64
"""Tokens of a prefix that is shared, where all block sizes divide it."""


class Deployment(NamedTuple):
    """Instances, and how requests are routed to them."""

    instances: list[InstanceConfig]
    prefill: str = BALANCED
    decode: str = BALANCED


def of_plan(path: str | Path, model: str, base: InstanceConfig) -> Deployment:
    """The instances of a `plan.yaml` (docs/simulator.md), its engine settings and its routing. Raises `InputError`.

    `base` has what a plan does not say. Without a layout prefill instances keep theirs as NHD, others as HND.
    """
    from hetkv.simulator.deployment import engine_of, load_plan

    plan = load_plan(path)
    found = []
    for pool in plan.pools:
        engine = engine_of(plan, pool, str(path))
        where = f"{path}: pool {pool.name}"
        if pool.dp > 1:
            raise InputError(f"{where}: `dp` {pool.dp}: instances have tensor and pipeline parallelism; use `count`")
        layout = pool.layout or ("nhd" if pool.role == "prefill" else "hnd")
        try:
            dtype = DType.parse(engine.kv_dtype).value
        except InputError as error:
            raise InputError(f"{where}: `kv_dtype`: {error}") from None
        found += [
            msgspec.structs.replace(
                base,
                plan=InstancePlan(
                    name=f"{pool.name}-{number}", role=pool.role, tp=pool.tp, pp=pool.pp, device="auto",
                    stages=None if pool.stages is None else tuple(pool.stages),
                    pool=SideOptions(block_size=engine.block_size, layout=layout, dtype=dtype),
                ),
                pool=pool.name,
                gpu=pool.gpu,
                limits=Limits(engine.max_num_seqs, engine.max_num_batched_tokens, engine.chunked_prefill),
                kv_tokens=pool.kv_tokens or base.kv_tokens,
                memory_share=engine.memory_share,
                unit=int(engine.prefix_caching),
                weight=pool.weight,
            )
            for number in range(pool.count)
        ]  # fmt: skip
    return Deployment(checked(found, model), plan.routing.prefill, plan.routing.decode)


def checked(configs: Sequence[InstanceConfig], model: str) -> list[InstanceConfig]:
    """The same with devices, and with one size of shared prefixes for those whose `unit` is not 0. `InputError`."""
    check_instances([config.plan for config in configs], model_config(model))
    for config in configs:
        if config.plan.pool.layout not in LAYOUTS:
            name, layout = config.plan.name, config.plan.pool.layout
            raise InputError(f"{name}: `layout` {layout!r} is not known; known are {', '.join(LAYOUTS)}")
    sizes = [config.plan.pool.block_size for config in configs if config.unit]
    unit = lcm(*sizes) if sizes else 0
    unit *= -(-PREFIX_TOKENS // unit) if unit else 0
    return [
        msgspec.structs.replace(config, unit=unit if config.unit else 0) for config in placed(configs)
    ]  # fmt: skip


def placed(configs: Sequence[InstanceConfig]) -> list[InstanceConfig]:
    """On the GPUs of this machine in turn where there are some, a GPU's memory shared by the ranks on it; else on CPU.

    Instances whose device was named stay where they are.
    """
    import torch

    count = torch.cuda.device_count()
    free = [config for config in configs if config.plan.device == "auto"]
    ranks = sum(config.plan.ranks for config in free)
    found, at = [], 0
    for config in configs:
        if config.plan.device == "auto":
            device = "cpu"
            if count:
                at = at if at + config.plan.ranks <= count else 0
                device = f"cuda:{at}"
                at = (at + config.plan.ranks) % count
            share = config.memory_share / max(1, -(-ranks // count)) if count else config.memory_share
            config = msgspec.structs.replace(
                config, plan=msgspec.structs.replace(config.plan, device=device), memory_share=share
            )
        found.append(config)
    return found
