"""`hetkv plan` from a problem file to everything it writes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import msgspec
import pytest
import yaml

from hetkv.cli import main
from hetkv.errors import InputError
from hetkv.planner.problem import dump_problem, load_problem
from hetkv.simulator.deployment import load_plan
from tests.planner.cases import small

VOID = {"meta", "br"}


def azure(path: Path) -> None:
    """Five minutes of long prompts with short answers, then five of the opposite, in the format of the Azure traces."""
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    for second in range(600):
        prompt, output = (3000, 8) if second < 300 else (200, 200)
        rows.append(f"2023-11-16 18:{second // 60:02}:{second % 60:02}.1234567,{prompt + second % 7},{output}")
    path.write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All files of one run of the command, and what it printed."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "problem.yaml").write_text(dump_problem(small(roles="disaggregated")))
    azure(folder / "azure.csv")
    options = {
        "problem": "problem.yaml",
        "json": "plan.json",
        "out": "plan.yaml",
        "plot": "plan.png",
        "trace": "azure.csv",
        "trace-plot": "trace.svg",
        "report": "report.html",
    }
    words = [w for name, file in options.items() for w in (f"--{name}", str(folder / file))]
    words += ["--rates", "2", "--targets", "1", "--split", "H100:MI300X", "--period", "300", "--jobs", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "hetkv", "plan", *words, "--launch", "all"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (folder / "printed.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def facts(folder):
    return json.loads((folder / "plan.json").read_text())


def test_json_has_what_was_asked_for(facts):
    keys = "instances cost_per_hour gap lower_bound simulated_slack predicted simulated baselines columns_seconds"
    for key in [
        *keys.split(),
        "solve_seconds",
        "verify_seconds",
        "iterations",
        "worth",
        "reasons",
        "frontier",
        "trace",
    ]:
        assert facts[key] is not None, key
    for one in facts["instances"]:
        assert {"role", "gpu", "tp", "pp", "count"} <= set(one)
    assert facts["meets"]


def test_it_prints_the_deployment_the_reasons_and_the_launch_lines(folder):
    printed = (folder / "printed.txt").read_text()
    for part in (
        "Why",
        "Alternatives",
        "this plan",
        "vllm serve",
        "sglang.launch_server",
        "kind: StatefulSet",
        "Mixing",
    ):
        assert part in printed


def test_plan_yaml_goes_round(folder, facts, tmp_path):
    plan = load_plan(folder / "plan.yaml")
    assert msgspec.to_builtins(plan) == next(iter(facts["deployments"].values())) | {
        "pools": [msgspec.to_builtins(p) for p in plan.pools]
    }
    counts = {(p.role, p.gpu, p.tp, p.count) for p in plan.pools}
    assert counts == {(i["role"], i["gpu"], i["tp"], i["count"]) for i in facts["instances"]}
    words = [
        "--plan",
        str(folder / "plan.yaml"),
        "--rate",
        "4",
        "--requests",
        "300",
        "--json",
        str(tmp_path / "s.json"),
    ]
    assert main(["simulate", *words, "--prompt-tokens", "lognormal:800:0.5", "--output-tokens", "uniform:32:96"]) == 0
    summary = json.loads((tmp_path / "s.json").read_text())
    assert summary["finished"] == 300
    assert summary["ttft_ms"]["p90"] <= 600


def test_the_demo_takes_its_instances_from_the_plan(folder):
    from hetkv.runtime.demo import DECODE_POOL, PREFILL_POOL
    from hetkv.runtime.plan import read_plan

    text = yaml.safe_load((folder / "plan.yaml").read_text())
    for pool in text["pools"]:
        pool["engine"] = {"block_size": {"prefill": 16, "decode": 32}[pool["role"]]}
        pool["layout"] = {"prefill": "hnd", "decode": "rocm"}[pool["role"]]
    (folder / "different.yaml").write_text(yaml.safe_dump(text))
    instances = read_plan(folder / "different.yaml", PREFILL_POOL, DECODE_POOL)
    assert len(instances) == sum(pool.get("count", 1) for pool in text["pools"])
    pools = {instance.role: instance.pool for instance in instances}
    assert (pools["prefill"].block_size, pools["prefill"].layout, pools["prefill"].dtype) == (16, "hnd", "bfloat16")
    assert (pools["decode"].block_size, pools["decode"].layout) == (32, "rocm")


def test_the_frontier_has_every_fleet_at_the_rate(facts):
    found = facts["frontier"]
    fleets = {"NVIDIA only", "AMD only", "mixed", "H100-SXM to MI300X"}
    assert {(p["fleet"], p["rate"]) for p in found["rates"]} == {(fleet, 8.0) for fleet in fleets}
    cost = {p["fleet"]: p["cost_per_hour"] for p in found["rates"]}
    assert cost["mixed"] <= min(c for f, c in cost.items() if c is not None and "only" in f) + 1e-9
    split = next(p for p in found["rates"] if p["fleet"] == "H100-SXM to MI300X")
    assert re.fullmatch(r"\d+ prefill on H100-SXM, \d+ decode on MI300X", split["split"])


def test_prefill_gets_its_share_when_prompts_are_long(facts):
    long, short = facts["trace"]["periods"]
    assert (long["requests"], short["requests"]) == (300, 300)
    assert long["prompt_mean"] > 10 * short["prompt_mean"]
    assert long["prefill_gpus"] >= short["prefill_gpus"] >= 1
    assert long["ratio"] >= short["ratio"]
    assert facts["trace"]["cost"] <= facts["trace"]["peak_cost"] + 1e-9


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open.pop() == tag


def test_the_report_holds_all_and_fetches_nothing(folder):
    text = (folder / "report.html").read_text()
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert page.seen >= {"svg", "table", "details", "pre"}
    assert "script" not in page.seen
    assert all(link.startswith("#") for link in page.links)
    assert not re.findall(r"url\((?!#)", text)
    for part in ("Why this one", "Alternatives", "Through the trace", "HetKVConnector", "usd_per_gpu_hour", "worth"):
        assert part in text


def test_pictures_are_pictures(folder):
    assert (folder / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "trace.svg").read_text()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--plot", "p.png", "--rates", "1,x"], "--rates '1,x'"),
        (["--plot", "p.png", "--targets", "0"], "--targets '0'"),
        (["--plot", "p.png", "--split", "H100"], "expected PREFILL:DECODE"),
        (["--plot", "p.png", "--rates", "1", "--split", "L4:H100"], "L4 is not among the problem's GPUs"),
        (["--plot", "p.gif"], "must end in"),
        (["--rates", "1,2"], "--rates belongs to --plot or --report"),
        (["--split", "L4:H100"], "--split belongs to --plot or --report"),
        (["--period", "5"], "--period belongs to --trace"),
        (["--trace", "azure.csv", "--period", "0"], "--period must be greater than 0"),
        (["--out", "nowhere/p.yaml"], "there is no folder"),
        (["--out", "."], "a folder"),
        (["--trace", "nowhere.csv"], "plan: nowhere.csv: No such file"),
        (["--problem", "nowhere.yaml"], "nowhere.yaml: the problem cannot be read (No such file"),
        (["--problem", "."], "the problem cannot be read (Is a directory"),
        (["--jobs", "0"], "--jobs must be 1 or more"),
        (["--jobs", "-5"], "--jobs must be 1 or more"),
    ],
)
def test_bad_options_are_one_line(folder, monkeypatch, capsys, words, part):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(import_module("hetkv.planner.solve"), "solve", None)  # said before any search
    assert main(["plan", "--problem", "problem.yaml", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert part in error


def test_prices_need_a_date(monkeypatch, capsys):
    monkeypatch.setattr(import_module("hetkv.planner.solve"), "solve", None)
    words = ["--model", "Llama-3.1-8B", "--gpu", "H100:2.5", "--rate", "4", "--ttft", "600", "--tpot", "40"]
    assert main(["plan", *words, "--prices-as-of", "yesterday"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--prices-as-of must be a date such as 2026-05 or 2026-05-31, got 'yesterday'" in error


def test_dates_need_no_quotes_and_wrong_engine_settings_name_their_gpu(tmp_path):
    text = dump_problem(small(roles="disaggregated"))
    file = tmp_path / "problem.yaml"
    document = yaml.safe_load(text)
    document["gpus"][0]["as_of"] = "DATE"
    plain = yaml.safe_dump(document).replace("DATE", "2026-05-31")
    assert "as_of: 2026-05-31\n" in plain
    file.write_text(plain)
    assert load_problem(file).gpus[0].as_of == "2026-05-31"
    document["gpus"][0] |= {"as_of": "2026-05", "engine": {"dtipe": "fp8"}}
    file.write_text(yaml.safe_dump(document))
    with pytest.raises(InputError, match=r"gpus\[0\] \(.+\): engine: .+dtipe"):
        load_problem(file)


def test_a_trace_needs_one_class(folder, monkeypatch, capsys):
    from hetkv.errors import InputError
    from hetkv.planner.replay import replan

    (only,) = small().classes
    two = small(classes=[msgspec.to_builtins(only), {**msgspec.to_builtins(only), "name": "code"}])
    with pytest.raises(InputError, match=r"2 classes \(chat, code\)"):
        replan(two, str(folder / "azure.csv"))


def test_the_planner_imports_neither_torch_nor_the_extension():
    code = (
        "import sys, hetkv.cli.plan, hetkv.planner.output.html, hetkv.planner.output.terminal, hetkv.planner.baselines;"
        "bad = {'torch', 'hetkv._core'} & set(sys.modules); assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
