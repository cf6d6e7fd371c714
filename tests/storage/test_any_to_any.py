"""Any pool's file into any other pool: random deployments, one file a rank, checked byte for byte by the oracle."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hetkv.control.conversion import segment_conversion
from hetkv.errors import IncompatibleError
from hetkv.kv.dtypes import DType
from hetkv.kv.layer import LayerMemory
from hetkv.kv.layout import KVLayout
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import Interval, KVSpec
from hetkv.storage import load, save
from hetkv.storage.form import frame_layout, stored_part
from hetkv.transport.link_plan import wanted_tokens
from tests.transport.deployments import Deployment, Truth, deployments, fill_source, place, travel, truth_of
from tests.transport.memory_kinds import ON_HOST

EXAMPLES = int(os.environ.get("HETKV_EXAMPLES", "60"))
CONTENT = b"content of tests"


def stored_layout(spec: KVSpec, layer: int, layout: KVLayout) -> KVLayout:
    """All heads of a layer in a file, as the layout of a peer."""
    segments = spec.layers[layer].segments
    parts = tuple(stored_part(layout.segments[segment.name]) for segment in segments)
    return frame_layout(spec, layer, Interval(0, segments[0].heads), 1, parts)


def expected(case: Deployment, rank: int, truth: dict[tuple[int, str], Truth], spans: list[Interval]) -> KVPool:
    """The rank's pool as it must be, by the oracle: what was stored, converted from what the source's pools hold."""
    pool = case.destination.pools[rank]
    layers: dict[int, LayerMemory] = {}
    for layer, at in pool.layers.items():
        copies = {id(tensor): tensor.clone() for tensor in at.tensors.values()}
        layers[layer] = at._replace(tensors={name: copies[id(tensor)] for name, tensor in at.tensors.items()})
    copy = KVPool(pool.spec, pool.shard, layers)
    blocks = case.destination.blocks[0]
    for layer, at in copy.layers.items():
        span, held = spans[case.spec.group_of(layer)], pool.shard.heads[layer]
        if not span.size:
            continue
        for source in case.source.pools:
            if layer not in source.layers:
                continue
            there = source.shard.heads[layer]
            heads = held & there
            stored = stored_layout(case.spec, layer, source.layers[layer].layout)
            for name, part in at.layout.segments.items():
                if not heads.size:
                    continue
                src, form = source.layers[layer].layout.segments[name], stored.segments[name]
                chosen = slice(span.start, span.stop), slice(heads.start, heads.stop)
                codes = truth[layer, name].codes[chosen].transpose(0, 1).contiguous()
                scales = truth[layer, name].scales
                scales = None if scales is None else scales[chosen].transpose(0, 1).contiguous()
                codes, scales = travel(codes, scales, src, form, segment_conversion(src, form, heads, there, heads))
                how = segment_conversion(form, part, heads, there, held)
                codes, scales = travel(codes, scales, form, part, how)
                first = (span.start, heads.start - held.start)
                place(copy, blocks, layer, copy.view(layer, name), codes.transpose(0, 1), first)
                if scales is not None:
                    place(copy, blocks, layer, copy.scale_view(layer, name), scales.transpose(0, 1), first)
    return copy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=deployments(ON_HOST, ON_HOST), frame_bytes=st.sampled_from([1, 3000, 1 << 23]), data=st.data())
def test_any_pool_reads_what_any_other_wrote(
    folder: Path, case: Deployment, frame_bytes: int, data: st.DataObject
) -> None:
    truth = truth_of(case, 0)
    fill_source(case, truth, 0)
    files = [folder / f"{rank}.hkv" for rank in range(len(case.source.pools))]
    static = [
        part.scale
        for at in case.source.pools[0].layers.values()
        for part in at.layout.segments.values()
        if part.dtype is DType.INT8 and part.scale is not None and not part.scale_groups
    ]
    for file, pool in zip(files, case.source.given, strict=True):
        if static and any(value != 1.0 for value in static[0].values):
            with pytest.raises(IncompatibleError, match="int8"):
                save(file, pool, case.source.blocks[0], case.tokens, content=CONTENT)
            return
        save(file, pool, case.source.blocks[0], case.tokens, content=CONTENT, frame_bytes=frame_bytes)
    stops = [1 if g in case.spec.state_groups else case.tokens for g in range(case.spec.num_groups)]
    cached = [0 if g in case.spec.state_groups else case.held for g in range(case.spec.num_groups)]
    spans = wanted_tokens(case.spec, stops, cached)
    for rank, pool in enumerate(case.destination.given):
        order = data.draw(st.permutations(files))
        try:
            want = expected(case, rank, truth, spans)
        except IncompatibleError as error:
            with pytest.raises(IncompatibleError, match=error.why[:10] or "dtype"):
                load(order, pool, case.destination.blocks[0], case.tokens, content=CONTENT, num_cached_tokens=case.held)
            return
        load(order, pool, case.destination.blocks[0], case.tokens, content=CONTENT, num_cached_tokens=case.held)
        for layer, at in case.destination.pools[rank].layers.items():
            for name, tensor in at.tensors.items():
                assert torch.equal(tensor, want.layers[layer].tensors[name]), (rank, layer, name)
