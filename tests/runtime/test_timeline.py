"""Timelines: a layer's compute is that layer's and nothing else, and every rank has rows of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from hetkv.kv.pool import KVPool  # noqa: E402
from hetkv.runtime import BlockAllocator, Decoder, Pages, prefill  # noqa: E402
from hetkv.runtime.demo import MODEL  # noqa: E402
from hetkv.runtime.timeline import Span, draw, picture_rows, read_perfetto, write_perfetto  # noqa: E402


def test_a_layers_context_holds_its_whole_work() -> None:
    """Projection, attention and MLP of layer i run inside layer i's context, and its KV is handed over inside it."""
    model = Decoder.load(MODEL)
    pool = KVPool.allocate(model.kv_spec, 8, layout="nhd", block_size=16, dtype="float32")
    events: list[tuple[str, int]] = []

    def note(name: str, index: int, call):  # type: ignore[no-untyped-def]
        def noted(*arguments):  # type: ignore[no-untyped-def]
            events.append((name, index))
            return call(*arguments)

        return noted

    for index, layer in model.layers.items():
        layer.attention.project = note("project", index, layer.attention.project)
        layer.attention.attend = note("attend", index, layer.attention.attend)
        model.layers[index] = layer._replace(mlp=note("mlp", index, layer.mlp))

    @contextmanager
    def around(layer: int) -> Iterator[None]:
        events.append(("begin", layer))
        yield
        events.append(("end", layer))

    pages = Pages(pool, BlockAllocator(pool).allocate(20))
    prefill(model, list(range(20)), pages, chunk=12, around_layer=around,
            on_layer=lambda layer, *_: events.append(("stored", layer)))  # fmt: skip
    work = ("begin", "project", "stored", "attend", "mlp", "end")
    once = [(name, layer) for layer in model.layers for name in work]
    assert events == 2 * once  # of two chunks


def spans_of(prefills: int, decodes: int) -> list[Span]:
    now = time.monotonic_ns()
    spans = []
    for layer in range(3):
        for rank in range(prefills):
            spans += [Span(row, layer, now + layer, now + layer + 1, 1, f"prefill-0/{rank}")
                      for row in ("compute", "pack", "wire")]  # fmt: skip
        spans += [Span("unpack", layer, now, now + 1, 1, f"decode-0/{rank}") for rank in range(decodes)]
    return spans


def test_every_rank_has_its_own_rows(tmp_path: Path) -> None:
    rows = picture_rows(spans_of(2, 3))
    assert rows == [
        *[(f"prefill-0/{rank}", row) for rank in range(2) for row in ("compute", "pack", "wire")],
        *[(f"decode-0/{rank}", "unpack") for rank in range(3)],
    ]
    draw(tmp_path / "two.svg", spans_of(2, 3), "two ranks to three")
    picture = (tmp_path / "two.svg").read_text()
    assert all(owner in picture for owner, _ in rows)
    write_perfetto(tmp_path / "trace.json", spans_of(2, 3))
    assert picture_rows(read_perfetto(tmp_path / "trace.json")) == rows
