"""`hetkv bench codec`: coders give back every bit, lossy stages what they should, and a link is faster with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hetkv.bench import namespaces
from hetkv.bench.codec import CODERS, measure, measure_lossy
from hetkv.bench.codec_link import measure_link
from hetkv.bench.codec_plot import draw, lines
from hetkv.bench.kv_samples import Sample
from hetkv.bench.lossy_stage import LossyStage
from hetkv.cli import main
from hetkv.core import core
from hetkv.errors import InputError

EVERY = np.arange(1 << 16, dtype=np.uint16)
"""Of bfloat16 and of float16: all numbers, infinities and NaNs."""


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("count", [0, 1, 7, 31, 4097, 1 << 16])
def test_planes_hold_every_value(turn: bool, count: int) -> None:
    values = np.random.default_rng(1).permutation(EVERY)[:count]
    upper, lower, back = np.empty(count, np.uint8), np.empty(count, np.uint8), np.empty(2 * count, np.uint8)
    core.split16(values.view(np.uint8), upper, lower, turn)
    turned = (values << 1 | values >> 15) if turn else values
    assert np.array_equal(upper, (turned >> 8).astype(np.uint8))
    assert np.array_equal(lower, turned.astype(np.uint8))
    core.join16(upper, lower, back, turn)
    assert np.array_equal(back.view(np.uint16), values)


def test_planes_of_wrong_lengths_are_rejected() -> None:
    planes = [np.zeros(4, np.uint8), np.zeros(3, np.uint8)]
    with pytest.raises(InputError, match="must be 4 contiguous bytes"):
        core.split16(np.zeros(8, np.uint8), *planes, True)
    with pytest.raises(InputError, match="must be 8 contiguous bytes"):
        core.join16(planes[0], planes[0], np.zeros(6, np.uint8), True)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", CODERS)
def test_coders_are_lossless_over_all_values(name: str, dtype: str) -> None:
    coder = CODERS[name](dtype)  # type: ignore[arg-type]
    rng = np.random.default_rng(2)
    for values in (EVERY, rng.permutation(EVERY), np.zeros(1000, np.uint16), np.full(3, 0x7FC1, np.uint16)):
        data = values.view(np.uint8)
        coded = coder.encode(data)
        assert np.array_equal(coder.decode(coded, len(data)), data)


def test_what_a_coder_saves_and_costs() -> None:
    values = torch.randn(2, 2, 500, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    row = measure(Sample("random", "bf16", values), "split + zstd 1", CODERS["split + zstd 1"], 2)
    assert 1.3 < row["ratio"] < 1.6
    assert row["lossless"]
    ratios = {"fp8": 2 / (1 + 4 / 64), "int4": 2 / (1 / 2 + 4 / 32)}
    for name, largest in (("fp8", 0.04), ("int4", 0.12)):
        lossy = measure_lossy(Sample("random", "bf16", values), name, 2)  # type: ignore[arg-type]
        assert lossy["ratio"] == pytest.approx(ratios[name], rel=0.01)
        assert largest / 8 < lossy["relative_error_rms"] < largest
        assert lossy["effective_gb_s"]["1"] == pytest.approx(min(lossy["ratio"] / 8, lossy["encode_gb_s"]), abs=1e-3)


def test_the_stage_without_the_codec_moves_every_bit() -> None:
    values = torch.randn(2, 2, 33, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    stage = LossyStage(Sample("random", "bf16", values), "none")
    stage.pack()
    stage.unpack()
    assert stage.relative_error() == 0
    assert stage.wire_bytes == stage.pool_bytes


@pytest.mark.slow
@pytest.mark.skipif(bool(namespaces.why_not(True)), reason=namespaces.why_not(True) or "namespaces are to be had")
def test_codecs_through_a_slow_link() -> None:
    row = measure_link(1000, 2)
    assert row["gain"]["fp8"] > 1.5
    assert row["gain"]["int4"] > 1.2 * row["gain"]["fp8"]
    assert row["gain"]["lossless"] > 1.1
    assert row["verified_bytes"] == 5 * row["mib"] << 20


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    values = torch.randn(2, 2, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    sample = Sample("random", "bf16", values)
    rows = [measure(sample, "split + zstd 1", CODERS["split + zstd 1"], 1), measure_lossy(sample, "fp8", 1)]
    links = [{"mbit": 1000, "lossless_gb_s": 0.17, "fp8_gb_s": 0.23, "int4_gb_s": 0.37}]
    drawn = lines({"results": rows}, "random", "bf16")
    assert {codec: len(points) for codec, (_, points) in drawn.items()} == {"split + zstd 1": 5, "fp8": 5}
    assert drawn["fp8"][0] == rows[1]["ratio"]
    draw({"results": rows, "links": links}, tmp_path / "codec.svg")
    assert (tmp_path / "codec.svg").read_text().count("<path") > 20


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "codec", "--rounds", "1", "--json", str(tmp_path / "codec.json")]) == 0
    report = json.loads((tmp_path / "codec.json").read_text())
    assert {row["codec"] for row in report["results"]} == {*CODERS, "fp8", "int4"}
    assert {row["data"] for row in report["results"]} >= {"random"}
    assert "split + zstd 1" in capsys.readouterr().out
    assert main(["bench", "codec", "--rounds", "0"]) == 2
