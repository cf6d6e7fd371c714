"""Packs and unpacks of one layer on one thread: of a small request and of a large one."""

from __future__ import annotations

from typing import Any

import pytest

from hetkv import _core
from hetkv.bench.remap_cases import Case, Place, make_jobs, make_memory

WIRE = Place("canonical")
CASES = {
    "pack nhd": Case("move", Place("nhd"), WIRE),
    "unpack hnd": Case("move", WIRE, Place("hnd", block_size=64)),
    "pack to fp8": Case("convert", Place("nhd"), Place("canonical", dtype="fp8")),
    "unpack rocm v": Case("transpose", WIRE, Place("rocm", "v", 64)),
}


@pytest.mark.parametrize("tokens", [16, 4096])
@pytest.mark.parametrize("name", CASES)
def test_remap(benchmark: Any, name: str, tokens: int) -> None:
    case = CASES[name]
    source, destination = (
        make_memory(place, case.source.segments, tokens, case.head_dim, seed)
        for seed, place in enumerate((case.source, case.destination))
    )
    jobs = make_jobs(case, source, destination, tokens)
    benchmark(_core.remap, jobs)
