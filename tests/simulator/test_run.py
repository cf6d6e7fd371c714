"""Whole simulations: metrics, sweeps, the command."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from math import inf
from pathlib import Path

import matplotlib
import msgspec
import numpy as np
import pytest

from hetkv.cli import main
from hetkv.errors import InputError
from hetkv.simulator.deployment import parse_plan
from hetkv.simulator.events import Events
from hetkv.simulator.metrics import METRICS, Slo, summarise
from hetkv.simulator.output.plot import STYLE, draw
from hetkv.simulator.run import interval, simulate
from hetkv.simulator.sweep import apply, grid, parse_axis, sweep
from hetkv.simulator.traffic.sources import Traffic

PLAN = {
    "model": "Llama-3.1-8B",
    "pools": [{"role": "prefill", "gpu": "H100-SXM", "count": 2}, {"role": "decode", "gpu": "A100-80-SXM", "count": 2}],
    "link": {"gb_s": 25},
}
TRAFFIC = Traffic(rate=8.0, requests=300, prompt_tokens="lognormal:800:1", output_tokens="uniform:1:200")


def columns(**changes):
    base = {
        "status": np.array([0, 0, 0, 1, 2], dtype=np.int8),
        "arrival": np.array([0.0, 1.0, 2.0, 3.0, 4.0]),
        "scheduled": np.array([0.0, 1.5, 2.0, np.nan, 4.0]),
        "first_token": np.array([0.1, 2.0, 2.2, np.nan, 4.5]),
        "prefilled": np.full(5, np.nan),
        "visible": np.full(5, np.nan),
        "decode_from": np.array([0.1, 2.0, 2.2, np.nan, 4.5]),
        "last_token": np.array([0.1, 4.0, 10.0, np.nan, np.nan]),
        "prompt": np.array([10, 20, 30, 9, 9]),
        "output": np.array([1, 5, 14, 9, 9]),
        "cached": np.array([0, 16, 0, 0, 0]),
        "preemptions": np.array([0, 1, 0, 0, 0]),
        "restarts": np.array([0, 0, 0, 0, 2]),
    }
    return {**base, **changes}


def test_metrics_follow_their_definitions():
    s = summarise(columns(), Slo(ttft_ms=250, tpot_ms=600), 10.0)
    assert (s["requests"], s["finished"], s["rejected"], s["failed"]) == (5, 3, 1, 1)
    assert s["ttft_ms"]["p50"] == pytest.approx(200)
    assert s["e2e_ms"]["p50"] == pytest.approx(3000)
    assert s["queue_ms"]["mean"] == pytest.approx(500 / 3)
    assert s["tpot_ms"]["mean"] == pytest.approx((500 + 600) / 2)  # one output token has no TPOT
    assert s["slo_attainment"] == pytest.approx(2 / 5)  # 0 and 2; rejected and failed requests count as missed
    assert s["goodput_rps"] == pytest.approx(2 / 10)
    assert s["throughput_rps"] == pytest.approx(3 / 10)
    assert s["output_tokens_per_s"] == pytest.approx(20 / 10)
    assert s["transfer_ms"]["p50"] is None
    assert (s["preemptions"], s["restarts"]) == (1, 2)
    assert summarise(columns(), Slo(), 10.0)["slo_attainment"] == pytest.approx(3 / 5)


def test_each_metric_is_defined_once_and_reported():
    keys = [m.key for m in METRICS]
    assert len(set(keys)) == len(keys)
    assert len({m.symbol for m in METRICS}) == len(METRICS)
    summary = simulate(parse_plan(PLAN, "plan"), TRAFFIC.build()).summary
    assert set(keys) <= set(summary)


def test_same_seed_same_summary_and_another_seed_another():
    def run(seed):
        summary = simulate(parse_plan(PLAN, "plan"), TRAFFIC.build(), seed).summary
        summary.pop("seconds")
        return summary

    assert run(5) == run(5)
    assert run(5)["ttft_ms"] != run(6)["ttft_ms"]


def test_utilisation_and_cost():
    prices = [
        {"gpu": "H100-SXM", "usd_per_gpu_hour": 3.0, "basis": "on_demand", "as_of": "2026-05"},
        {"gpu": "A100-80-SXM", "usd_per_gpu_hour": 2.0, "basis": "on_demand", "as_of": "2026-05"},
    ]
    plan = parse_plan({**PLAN, "prices": prices}, "plan")
    s = simulate(plan, TRAFFIC.build()).summary
    assert 0 < s["utilisation"]["H100-SXM"] < s["utilisation"]["A100-80-SXM"] <= 1
    usd = (2 * 3 + 2 * 2) * s["simulated_seconds"] / 3600
    assert s["usd_per_million_output_tokens"] == pytest.approx(usd / s["output_tokens"] * 1e6)
    with pytest.raises(InputError, match="missing `usd_per_gpu_hour` of A100"):
        simulate(parse_plan({**PLAN, "prices": prices[:1]}, "plan"), TRAFFIC.build())
    outage = {"failures": {"outages": [{"instance": "decode/7", "at_s": 1}]}}
    with pytest.raises(InputError, match="unknown instance 'decode/7'; there are prefill/0"):
        simulate(parse_plan({**PLAN, **outage}, "plan"), TRAFFIC.build())


def test_interval_holds_the_central_prediction():
    plan, work = parse_plan(PLAN, "plan"), TRAFFIC.build()
    central, ends = simulate(plan, work).summary, interval(plan, work)
    for key in ("ttft_ms", "tpot_ms", "e2e_ms"):
        assert ends["low"][key]["p50"] < central[key]["p50"] < ends["high"][key]["p50"]


def test_memory_does_not_grow_with_simulated_time(monkeypatch):
    """Four times the requests at the same rate: no more pending events, no more bins, no more flows."""
    most = []
    push = Events.at

    def at(self, time, handler, argument=None):
        push(self, time, handler, argument)
        most[-1] = max(most[-1], len(self))

    monkeypatch.setattr(Events, "at", at)
    kept = []
    for requests in (1500, 6000):
        most.append(0)
        traffic = msgspec.structs.replace(TRAFFIC, requests=requests)
        result = simulate(parse_plan(PLAN, "plan"), traffic.build())
        series = [s for group in result.series().values() for s in group.values()]
        kept.append([len(s.averages(result.end)[0]) for s in series])
        assert result.links._all == {}
    assert most[1] < 1.5 * most[0]
    assert max(max(k) for k in kept) <= 512


def test_random_failures_happen_and_end_with_the_traffic():
    hazard = {"failures": {"random": [{"pool": "decode", "mtbf_s": 10, "mttr_s": 2}]}}
    s = simulate(parse_plan({**PLAN, **hazard}, "plan"), TRAFFIC.build()).summary
    assert s["failures"] > 2
    assert s["restarts"] > 0
    assert s["finished"] == 300


def without_clock(summary):
    return {key: value for key, value in summary.items() if key != "seconds"}


@pytest.mark.parametrize("down", [{}, {"down_s": 30}], ids=["for ever", "30 s"])
def test_an_outage_after_the_end_changes_nothing(down):
    plain = simulate(parse_plan(PLAN, "plan"), TRAFFIC.build())
    late = {"outages": [{"instance": "decode/0", "at_s": plain.end + 20_000, **down}]}
    result = simulate(parse_plan({**PLAN, "failures": late}, "plan"), TRAFFIC.build())
    assert result.end == plain.end == plain.columns["last_token"].max() == plain.summary["simulated_seconds"]
    assert without_clock(result.summary) == without_clock(plain.summary)
    for group, series in plain.series().items():
        for name, expected in series.items():
            np.testing.assert_array_equal(
                expected.averages(plain.end), result.series()[group][name].averages(plain.end)
            )


def test_a_recovery_after_the_end_does_not_move_the_end():
    plain = simulate(parse_plan(PLAN, "plan"), TRAFFIC.build())
    outages = [{"instance": "prefill/0", "at_s": plain.end / 2, "down_s": 20_000}]
    result = simulate(parse_plan({**PLAN, "failures": {"outages": outages}}, "plan"), TRAFFIC.build())
    assert result.summary["failures"] == 1
    assert result.end == result.columns["last_token"].max() < plain.end + 60
    share = plain.summary["utilisation"]["H100-SXM"] * 2  # of two instances, then of one and a half
    assert result.summary["utilisation"]["H100-SXM"] == pytest.approx(share / 1.5, rel=0.1)


def test_the_end_is_the_last_failure_where_that_is_later_than_the_last_completion():
    outages = [{"instance": f"decode/{i}", "at_s": 38.0} for i in (0, 1)]
    failures = {"outages": outages, "requests": "fail"}
    work = Traffic(rate=20.0, requests=700, prompt_tokens="200", output_tokens="uniform:8:4000")
    result = simulate(parse_plan({**PLAN, "failures": failures}, "plan"), work.build())
    assert result.summary["failed"] > 0
    assert result.end == result.summary["simulated_seconds"] == 38.0
    assert all(0 < share <= 1 + 1e-9 for share in result.summary["utilisation"].values())


def test_random_failures_end_where_requests_can_never_be_served():
    failures = {
        "outages": [{"instance": f"decode/{i}", "at_s": 5.0} for i in (0, 1)],
        "random": [{"pool": "prefill", "mtbf_s": 1000, "mttr_s": 1}],
    }
    result = simulate(parse_plan({**PLAN, "failures": failures}, "plan"), TRAFFIC.build())
    assert result.summary["failed"] > 0
    assert result.summary["finished"] + result.summary["failed"] == 300
    assert result.end < 300


def test_axes_and_grid():
    assert parse_axis("rate=1,2.5,x") == ("rate", [1, 2.5, "x"])
    assert parse_axis("decode.count=1:4") == ("decode.count", [1, 2, 3, 4])
    assert parse_axis("rate=1:2:0.25") == ("rate", [1, 1.25, 1.5, 1.75, 2])
    assert len(grid([("a", [1, 2]), ("b", [1, 2, 3])])) == 6
    for bad in ("rate", "=1", "rate=", "rate=2:1", "rate=1:2:0", "rate=a:b"):
        with pytest.raises(InputError, match="--sweep"):
            parse_axis(bad)
    with pytest.raises(InputError, match="given twice"):
        grid([("a", [1]), ("a", [2])])


def test_points_change_plan_and_traffic():
    plan = parse_plan(PLAN, "plan")
    point = {"rate": 3, "decode.count": 5, "link.gb_s": 100, "engine.max_num_seqs": 32, "decode.engine.block_size": 32}
    changed, traffic = apply(point, plan, TRAFFIC, "plan")
    assert traffic.rate == 3
    assert changed.pools[1].count == 5
    assert changed.pools[1].engine == {"block_size": 32}
    assert changed.engine.max_num_seqs == 32
    assert changed.link.gb_s == 100
    for bad in ({"decode": 3}, {"decode.cuont": 3}, {"model.size": 3}, {"rate": "fast"}, {"decode.count": 0}):
        with pytest.raises(InputError):
            apply(bad, plan, TRAFFIC, "plan")


def test_a_sweep_in_processes_equals_single_runs():
    plan = parse_plan(PLAN, "plan")
    traffic = msgspec.structs.replace(TRAFFIC, requests=60)
    points = grid([("rate", [2, 20]), ("decode.count", [1, 2])])
    done = []
    found = sweep(points, plan, traffic, jobs=2, on_done=done.append)
    assert done == sorted(done)
    assert done[-1] == 4
    for point, summary in zip(points, found, strict=True):
        alone = simulate(
            *[x if i == 0 else x.build() for i, x in enumerate(apply(point, plan, traffic, "plan"))]
        ).summary
        assert {**alone, "seconds": 0} == {**summary, "seconds": 0}


@pytest.fixture
def files(tmp_path):
    (tmp_path / "plan.yaml").write_text(json.dumps(PLAN))
    return tmp_path


def command(files, *options):
    return main(["simulate", "--plan", str(files / "plan.yaml"), *options])


def test_command_writes_everything(files, capsys):
    outputs = {k: files / f"out.{k}" for k in ("json", "csv", "png", "html")}
    options = ["--rate", "5", "--requests", "50", "--arrivals", "gamma", "--slo-ttft-ms", "100", "--slo-tpot-ms", "50"]
    options += ["--json", str(outputs["json"]), "--csv", str(outputs["csv"]), "--interval"]
    options += ["--plot", str(outputs["png"]), "--report", str(outputs["html"])]
    assert command(files, *options) == 0
    printed = capsys.readouterr().out
    assert "50 of 50 requests finished" in printed
    assert re.search(r"SLO attainment [\d.]+% \([\d.]+% to [\d.]+% over the interval of the step times\)", printed)
    assert "KV (bf16) 131.1 kB a token; of a request at its end" in printed
    summary = json.loads(outputs["json"].read_text())
    for key in ("ttft_ms", "tpot_ms", "e2e_ms"):
        assert 0 < summary[key]["p50"] <= summary[key]["p90"] <= summary[key]["p99"]
    assert summary["requests"] == 50
    assert 0 <= summary["slo_attainment"] <= 1
    assert summary["goodput_rps"] > 0
    assert summary["interval"]["low"]["tpot_ms"]["p50"] < summary["tpot_ms"]["p50"]
    assert 0 < summary["seconds"] < 60
    rows = outputs["csv"].read_text().splitlines()
    assert len(rows) == 51
    assert rows[0].startswith("arrival,scheduled,first_token")
    assert outputs["png"].read_bytes().startswith(b"\x89PNG")
    page = outputs["html"].read_text()
    assert page.count("<svg") == 1
    assert not re.search(r"<(script|link|img)|url\(http|src=", page)
    assert all(m.definition.split(":")[0] in page for m in METRICS[:3])


def test_a_constant_latency_has_readable_ticks():
    plan = {"model": "Llama-3.1-8B", "pools": [{"role": "aggregated", "gpu": "H100-SXM"}]}
    work = Traffic(rate=0.2, arrivals="constant", requests=30, prompt_tokens="500", output_tokens="20")
    result = simulate(parse_plan(plan, "plan"), work.build())
    ttft = result.summary["ttft_ms"]
    assert 0 <= ttft["p99"] - ttft["p50"] < 1e-6  # nothing but rounding of the clock, if that
    with matplotlib.rc_context(STYLE):
        figure = draw(result, Slo(), "")
        figure.canvas.draw()
    for axis in figure.axes[:3]:
        assert axis.xaxis.get_offset_text().get_text() == ""
        left, right = axis.get_xlim()
        labels = [t.get_text() for t in axis.get_xticklabels() if left <= t.get_position()[0] <= right]
        assert len(set(labels)) == len(labels) >= 3
        assert all(len(label) <= 6 for label in labels)


def test_command_where_nothing_finishes(files, capsys):
    plan = {"model": "Llama-3.1-8B", "pools": [{"role": "aggregated", "gpu": "H100-SXM", "kv_tokens": 100}]}
    (files / "plan.yaml").write_text(json.dumps(plan))
    out, plot, report = files / "o.json", files / "o.svg", files / "o.html"
    options = ["--rate", "5", "--requests", "9", "--json", str(out), "--plot", str(plot), "--report", str(report)]
    assert command(files, *options, "--interval") == 0
    summary = json.loads(out.read_text())
    assert (summary["finished"], summary["rejected"], summary["slo_attainment"]) == (0, 9, 0)
    assert summary["ttft_ms"]["p50"] is None
    assert "longer than the KV cache" in capsys.readouterr().out
    assert "longer than the KV cache" in report.read_text()


def test_needs_neither_torch_nor_the_extension():
    code = "import sys, hetkv.cli.simulate, hetkv.simulator.run, hetkv.simulator.sweep, hetkv.simulator.output.html\n"
    code += "bad = [m for m in sys.modules if m.split('.')[0] in ('torch', 'vllm', 'pandas') or m == 'hetkv._core']\n"
    code += "assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_command_sweeps(files, capsys):
    options = ["--rate", "5", "--requests", "30", "--sweep", "rate=2,4", "--sweep", "decode.count=1:2", "--jobs", "1"]
    plot, out = files / "sweep.svg", files / "sweep.json"
    assert command(files, *options, "--json", str(out), "--plot", str(plot)) == 0
    rows = json.loads(out.read_text())["sweep"]
    assert [r["point"] for r in rows] == grid([("rate", [2, 4]), ("decode.count", [1, 2])])
    assert "<svg" in plot.read_text()
    assert "attainment" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--rate", "-1"], "rate must be greater than 0"),
        ([], "give one of --trace, --rate and --clients"),
        (["--trace", "nowhere.csv"], "nowhere.csv"),
        (["--rate", "1", "--prompt-tokens", "many"], "--prompt-tokens: 'many'"),
        (["--rate", "1", "--slo-ttft-ms", "0"], "--slo-ttft-ms must be greater than 0"),
        (["--rate", "1", "--seed", "-1"], "--seed"),
        (["--rate", "1", "--json", "nowhere/x.json"], "--json nowhere/x.json: there is no folder nowhere"),
        (["--rate", "1", "--sweep", "rate=1", "--jobs", "0"], "--jobs must be"),
        (["--rate", "1", "--plot", "x.bmp"], "must end in .png"),
        (["--rate", "1", "--sweep", "decode.gpu=H900", "--jobs", "1"], "unknown GPU 'H900'"),
        (["--rate", "1", "--sweep", "rate=1", "--report", "r.html"], "--report describes one simulation"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(files, capsys, options, fault):
    assert command(files, *options) == 2
    out, err = capsys.readouterr()
    assert fault in err
    assert err.count("\n") == 1
    assert not out


def test_a_missing_ray_is_named(files, capsys):
    pytest.importorskip("joblib")
    try:
        import ray  # noqa: F401
    except ImportError:
        assert command(files, "--rate", "1", "--sweep", "rate=1", "--backend", "ray") == 2
        assert "`ray` is not installed" in capsys.readouterr().err
    else:
        pytest.skip("ray is installed")


def test_slo_without_limits_is_null_in_json():
    assert Slo(inf, 5.0).as_json() == {"ttft_ms": None, "tpot_ms": 5.0}
