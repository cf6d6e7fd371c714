"""Efficiencies: what an unmeasured combination gets, intervals by phase, quantiles, TP degrees, calibration files."""

from __future__ import annotations

import json

import pytest

from hetkv.costmodel import Efficiencies, load_efficiencies, step_model
from hetkv.costmodel.calibration_file import dump_efficiencies, parse_efficiencies
from hetkv.costmodel.efficiency import GENERIC, Constants, Efficiency, Key, Span, Spans
from hetkv.errors import InputError

BOTH = Spans(Span(0.9, 1.1), Span(0.8, 1.3), Span(0.5, 3.0))


def entry(**changes: object) -> Efficiency:
    return Efficiency(**{"key": Key("g"), "constants": Constants(), "spans": BOTH, "provenance": "test", **changes})  # type: ignore[arg-type]


def test_unknown_combinations_say_so_and_are_wider() -> None:
    known = load_efficiencies()
    widths = []
    for gpu, vendor, engine, version, dtype, word in (
        ("H100-SXM", "nvidia", "vllm", "0.12.0", "bf16", ""),
        ("H100-SXM", "nvidia", "vllm", "9.9", "bf16", "version 9.9"),
        ("L40S", "nvidia", "vllm", None, "bf16", "GPU L40S"),
        ("MI325X", "amd", "vllm", None, "bf16", "GPU MI325X"),
        ("Ascend-910B", "huawei", "mindie", None, "bf16", "vendor huawei"),
    ):
        found = known.find(gpu, vendor, engine, version, dtype)
        assert word in found.fallback
        assert bool(word) == bool(found.fallback)
        widths.append(found.spans.decode.high / found.spans.decode.low)
    assert widths == sorted(widths)


def test_a_gpu_that_nobody_measured_is_centred_on_its_vendors_measured_ones() -> None:
    """MI325X was predicted at 1 / 2.83 of MI300X's own times from generic constants, and halved a bill."""
    measured = step_model("MI300X", "Llama-3.1-8B", engine="vllm")
    guessed = step_model("MI325X", "Llama-3.1-8B", engine="vllm")
    for batch, each in ((1, 1000), (64, 1000), (256, 1000)):
        assert 0.45 < guessed.step_seconds(batch, batch * each) / measured.step_seconds(batch, batch * each) < 1.5
    span = guessed.efficiency.spans.decode
    assert span.low < 0.5
    assert span.high > 2


def test_a_vendor_that_nobody_measured_gets_what_all_have_in_common() -> None:
    """Between NVIDIA's constants and those of the slower vendors; the interval holds both."""
    spans = load_efficiencies().entries[Key()].spans
    assert spans.decode.low < 0.4
    assert spans.decode.high > 2.5
    common = load_efficiencies().entries[Key()].constants
    nvidia, amd = (load_efficiencies().entries[Key(vendor)].constants for vendor in ("nvidia", "amd"))
    assert amd.few_rows_flops < common.few_rows_flops < nvidia.few_rows_flops


def test_prompts_on_mi300x_take_little_longer_than_on_h100() -> None:
    """Its products of few rows reach 0.04 of the peak: those of decode steps alone."""
    mi300x, h100 = (step_model(gpu, "Llama-3-70B", 4) for gpu in ("MI300X", "H100-SXM"))
    for tokens in (256, 1024, 4096):
        assert mi300x.step_seconds(0, 0, tokens, tokens**2 / 2) < 1.6 * h100.step_seconds(0, 0, tokens, tokens**2 / 2)


def test_a_model_tp_or_batch_beyond_those_measured_widens() -> None:
    known = entry(models=("A",), tps=(1, 2), max_batch=64)
    assert known.for_model("A", 2) == known
    for name, tp, words in (("B", 2, "not on B"), ("A", 8, "fitted at TP 1, 2, not at 8")):
        other = known.for_model(name, tp)
        assert words in other.fallback
        assert other.spans.decode.high == pytest.approx(1.1 * 1.3)
        assert other.spans.queue.low == pytest.approx(0.5 / 1.3)
    assert known.for_model("B", 8).spans.decode.high == pytest.approx(1.1 * 1.3**2)
    assert known.spans_of(64) == BOTH
    assert known.spans_of(65).decode == (pytest.approx(0.9 / 1.3), pytest.approx(1.1 * 1.3))


def test_each_tp_degree_has_its_own_constants() -> None:
    by_tp = {tp: Constants(gemm_bytes=0.1 * tp) for tp in (1, 2, 8)}
    known = entry(by_tp=by_tp)
    assert [known.for_model("A", tp).constants.gemm_bytes for tp in (1, 2, 4, 8, 16)] == [0.1, 0.2, 0.8, 0.8, 0.8]


def test_a_calibration_file_gives_back_what_was_written() -> None:
    by_tp = {1: Constants(gemm_bytes=0.5), 4: Constants(gemm_bytes=0.25, layer_s=1e-5)}
    known = entry(
        constants=by_tp[1], by_tp=by_tp, bounded=("gemm_flops",), median_error=0.1, rows=3, tps=(1, 4), max_batch=8
    )
    assert parse_efficiencies(dump_efficiencies([known], "test"), "x").entries == {known.key: known}


def test_no_constants_at_all_still_predicts() -> None:
    model = step_model("H100", "Llama-3-8B", efficiencies=Efficiencies())
    assert "generic" in model.efficiency.fallback
    assert model.efficiency.spans.decode.high >= GENERIC.decode.high


def test_prompts_and_decode_steps_have_intervals_of_their_own() -> None:
    model = step_model("H100", "Llama-3-8B", efficiencies=Efficiencies({Key("H100-SXM"): entry(key=Key("H100-SXM"))}))
    spans = model.efficiency.spans
    decode, prompt = model.step_estimate(8, 8000), model.step_estimate(0, 0, 1000, 500_500)
    assert decode.high / decode.value == pytest.approx(spans.decode.high)
    assert prompt.high / prompt.value == pytest.approx(spans.prefill.high)
    assert prompt.low / prompt.value == pytest.approx(spans.prefill.low)


def test_confidence_moves_step_times_between_the_ends_of_the_interval() -> None:
    times = [
        step_model("MI325X", "Llama-3.1-8B", confidence=c).step_seconds(32, 32_000) for c in (0.05, 0.5, 0.8, 0.95)
    ]
    centre = step_model("MI325X", "Llama-3.1-8B").step_estimate(32, 32_000)
    assert times[0] == pytest.approx(centre.low)
    assert times[1] == centre.value
    assert centre.value < times[2] < times[3] == pytest.approx(centre.high)
    slow = step_model("MI325X", "Llama-3.1-8B", confidence=0.95).step_estimate(32, 32_000)
    assert (slow.low, slow.high) == pytest.approx((centre.low, centre.high))
    for confidence in (0, 1, -0.1):
        with pytest.raises(InputError, match="confidence must be between 0 and 1"):
            step_model("MI325X", "Llama-3.1-8B", confidence=confidence)


GOOD = {"key": {}, "constants": {}, "spans": {"decode": [0.9, 1], "prefill": [1, 1], "queue": [1, 2]}, "provenance": ""}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object"),
        ('{"efficiencies": [{"constants": {}}]}', r"efficiencies\[0\]: missing 'key'"),
        ({"constants": {"gemm_bytes": -1}}, "`gemm_bytes` must be a positive number, got -1"),
        ({"spans": {**GOOD["spans"], "decode": [1.2, 2]}}, "the decode interval must contain 1, got 1.2 to 2"),  # type: ignore[dict-item]
        ({"spans": {"decode": [1, 1]}}, r"efficiencies\[0\]: .*missing"),
        ({"low": 0.5}, "unknown field `low`"),
        ({"by_tp": {"two": {}}}, r"efficiencies\[0\]"),
    ],
)
def test_bad_calibration_files(text: str | dict[str, object], message: str) -> None:
    if isinstance(text, dict):
        text = json.dumps({"efficiencies": [{**GOOD, **text}]})
    with pytest.raises(InputError, match=message):
        parse_efficiencies(text, "own.json")


def test_every_shipped_entry_has_error_and_provenance() -> None:
    entries = load_efficiencies().entries
    measured = {key.gpu for key in entries}
    assert {"A100-40-SXM", "A100-80-SXM", "H100-SXM", "H200-SXM", "GH200", "MI250", "MI300X", "Max-1550"} <= measured
    for key, found in entries.items():
        assert found.provenance
        assert found.rows > 0
        assert found.median_error is not None
        if key.engine:
            assert found.models
            assert found.tps
            assert found.max_batch > 0
