"""The demo's two sides from a plan: pools as the engines of its prefill and decode instances would hold them."""

from __future__ import annotations

from pathlib import Path

from hetkv.costmodel import load_catalogue
from hetkv.errors import InputError
from hetkv.runtime.demo import SideOptions
from hetkv.simulator.deployment import engine_of, load_plan

DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
"""Fp8 is left out: the demo has no scales, and its text would differ."""

LAYOUTS = {"amd": "rocm"}
"""By vendor; `nhd` elsewhere. ROCm's packs K by 16 bytes and transposes V."""


def sides_of_plan(path: str | Path) -> tuple[SideOptions, SideOptions]:
    """Block size, layout and dtype of the KV pools of the plan's first prefill and first decode pool.

    The model stays the demo's. `InputError` where the plan is broken, is not disaggregated, or holds KV in a dtype that
    the demo does not compute with.
    """
    plan = load_plan(path)
    catalogue = load_catalogue(plan.catalogue)
    if not plan.disaggregated:
        raise InputError(f"{path}: the plan is aggregated: there is no KV to move between two sides")
    found = []
    for role in ("prefill", "decode"):
        pool = next(p for p in plan.pools if p.role == role)
        engine = engine_of(plan, pool, str(path))
        if engine.kv_dtype not in DTYPES:
            raise InputError(f"{path}: pool {pool.name}: the demo has no KV in {engine.kv_dtype}")
        layout = LAYOUTS.get(catalogue.gpu(pool.gpu).vendor, "nhd")
        found.append(SideOptions(block_size=engine.block_size, layout=layout, dtype=DTYPES[engine.kv_dtype]))
    return found[0], found[1]
