"""`hetkv demo` on whole deployments: routing, routes and their bytes, plans, rejected shapes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from hetkv.cli import main
from hetkv.errors import InputError
from hetkv.runtime.demo import DECODE_POOL, PREFILL_POOL, _round_robin
from hetkv.runtime.plan import parse_side, read_plan
from tests.runtime.test_demo import demo

WIDTH = 64 * 2 * 2  # bytes of a token and head of the demo checkpoint: K and V of 64 channels in bfloat16


def test_two_prefill_instances_of_tp2_and_a_pipeline_of_two(tmp_path: Path) -> None:
    result = demo(tmp_path, "--prefill", "2xTP2", "--decode", "1xTP1PP2", "--tokens", "24")
    assert result["identical"] is True
    assert [(r["prefill"], r["decode"]) for r in result["requests"]] == [
        ("prefill-0", "decode-0"),
        ("prefill-1", "decode-0"),
    ]
    assert all(r["text"] == r["reference_text"] for r in result["requests"])
    expected = {
        (f"prefill-{request}/{rank}", f"decode-0/{stage}", (3 * stage, 3 * stage + 3), heads):
            result["requests"][request]["prompt_tokens"] * 3 * (heads[1] - heads[0]) * WIDTH
        for request in range(2) for rank, heads in enumerate([(0, 1), (1, 3)]) for stage in range(2)
    }  # fmt: skip
    moved = {
        (route["source"], route["destination"], tuple(route["layers"]), tuple(route["heads"])): route["bytes"]
        for route in result["routes"]
    }
    assert moved == expected
    assert sum(moved.values()) == result["payload_bytes"], "as the senders' counters say"
    assert [(i["name"], i["tp"], i["pp"]) for i in result["instances"]] == [
        ("prefill-0", 2, 1),
        ("prefill-1", 2, 1),
        ("decode-0", 1, 2),
    ]


PLAN = """
model: Llama-3.1-8B
engine: {block_size: 8}
pools:
  - {role: prefill, gpu: H100-SXM, pp: 2, stages: [1, 5], layout: hnd}
  - {role: decode, name: big, gpu: MI300X, tp: 3, engine: {block_size: 32, kv_dtype: float32}}
  - {role: decode, name: small, gpu: MI300X, layout: packed_nhd}
link: {gb_s: 25}
"""


def test_a_plan_with_different_decode_instances(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN)
    trace = tmp_path / "trace.json"
    options = ("--plan", str(tmp_path / "plan.yaml"), "--chunk", "40", "--tokens", "16", "--requests", "3")
    result = demo(tmp_path, *options, "--trace", str(trace), "--plot", str(tmp_path / "plot.svg"))
    assert result["identical"] is True
    pools = {i["name"]: (i["pool"]["block_size"], i["pool"]["layout"], i["pool"]["dtype"]) for i in result["instances"]}
    assert pools == {
        "prefill-0": (8, "hnd", "bfloat16"),
        "big-0": (32, "rocm", "float32"),
        "small-0": (8, "packed_nhd", "bfloat16"),
    }
    assert [r["decode"] for r in result["requests"]] == ["big-0", "small-0", "big-0"]
    stages = {tuple(route["layers"]) for route in result["routes"]}
    assert stages == {(0, 1), (1, 6)}
    events = json.loads(trace.read_text())["traceEvents"]
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {"prefill-0/0", "prefill-0/1", "big-0/0", "big-0/1", "big-0/2", "small-0/0"}
    assert (tmp_path / "plot.svg").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert all(route["source"] in printed and f"{route['bytes']:,}" in printed for route in result["routes"])


@pytest.mark.parametrize(("prefills", "decodes"), [(1, 1), (2, 1), (2, 2), (2, 3), (4, 6)])
def test_round_robin_meets_every_pair_once(prefills: int, decodes: int) -> None:
    pairs = list(_round_robin(prefills, decodes, None))
    assert len(set(pairs)) == len(pairs) == prefills * decodes
    for side, count in enumerate((prefills, decodes)):
        assert [pair[side] for pair in pairs[:count]] == list(range(count)), "each in turn"
        assert set(Counter(pair[side] for pair in pairs).values()) == {len(pairs) // count}
    assert [decode for _, decode in _round_robin(1, 3, 7)] == [0, 1, 2, 0, 1, 2, 0]


def test_shapes() -> None:
    plans = parse_side("2xtp3PP2:4+2", "decode", DECODE_POOL)
    assert [plan.name for plan in plans] == ["decode-0", "decode-1"]
    assert (plans[1].tp, plans[1].pp, plans[1].stages, plans[1].ranks) == (3, 2, (4, 2), 6)
    assert parse_side("2 x TP2", "prefill", PREFILL_POOL)[1].name == "prefill-1"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--prefill", "TP0"), "TP must be at least 1, not 0"),
        (("--prefill", "0xTP1"), "instances must be at least 1"),
        (("--decode", "TP1PP0"), "PP must be at least 1"),
        (("--decode", "TP1PP7"), "decode-0: PP 7: the model has 6 layers"),
        (("--decode", "TP8"), "decode-0: TP 8: the model has 6 query heads"),
        (("--decode", "TP1PP2:5+2"), "stages 5+2 do not split 6 layers"),
        (("--decode", "PP2"), "not of the form [Nx]TPa[PPb"),
        (("--prefill", "two"), "--prefill two: not of the form"),
        (("--prefill", "100xTP1"), "100 ranks, the demo starts at most 64"),
        (("--prefill", "40xTP1", "--decode", "40xTP1"), "the deployment: 80 ranks"),
        (("--plan", "/nonexistent.yaml"), "/nonexistent.yaml"),
        (("--plan", "x.yaml", "--decode", "TP2"), "leave out --prefill and --decode"),
        (("--requests", "0"), "0 requests"),
        (("--chunk", "0"), "0 chunk"),
        (("--tokens", "1000"), "the model's context has 1024"),
    ],
)
def test_nonsense_is_one_line_and_status_2(
    options: tuple[str, ...], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *options]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("hetkv")]
    assert len(lines) == 1, lines
    assert said in lines[0]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("layout: hnd", "layout: dnh", "pool prefill: `layout` 'dnh' is not known"),
        ("tp: 3", "tp: 3, dp: 2", "pool big: `dp` 2"),
        ("kv_dtype: float32", "kv_dtype: float9", "float9"),
        ("[1, 5]", "one", "stages"),
        ("tp: 3", "tp: 0", "`tp` must be greater than 0"),
        ("tp: 3", "tp: 300", "300 ranks"),
        ("link:", "  - {role: aggregated, gpu: H100-SXM}\nlink:", "pool aggregated: role aggregated moves no KV"),
    ],
)
def test_plans_that_cannot_run_are_rejected(old: str, new: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    assert old in PLAN
    path.write_text(PLAN.replace(old, new))
    with pytest.raises(InputError) as caught:
        read_plan(path, PREFILL_POOL, DECODE_POOL)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)
