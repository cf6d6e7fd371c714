"""The examples of docs/simulator.md and docs/cost-model.md do what the pages say."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from hetkv.cli import main
from hetkv.costmodel.calibration.report import HEAD
from hetkv.simulator.deployment import Engine, Plan, dump_plan, load_plan

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "simulator.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(text.replace("\\\n", " ")) for text in re.findall(r"^    (hetkv simulate (?:.*\\\n)*.*)$", PAGE, re.M)
]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.M | re.S)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The page's plan, and a trace in the format of the one that its commands name."""
    (plan,) = blocks(PAGE, "yaml")
    (tmp_path / "plan.yaml").write_text(plan)
    rows = [f"2023-11-16 18:15:{second:02}.6805900,{100 + 37 * second},{20 + second}" for second in range(40)]
    text = "\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n"
    (tmp_path / "azure2023_conv.csv").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_has_commands():
    assert len(COMMANDS) == 4
    assert {option for command in COMMANDS for option in command} >= {"--trace", "--rate", "--sweep", "--json"}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[4:6]))
def test_commands_of_the_page(folder, capsys, command):
    short = ["--requests", "20", "--jobs", "1"]  # the last of two equal options counts
    assert main([*command[1:], *short]) == 0, capsys.readouterr().err
    written = [command[i + 1] for i, option in enumerate(command) if option in ("--json", "--plot", "--report")]
    assert written
    assert all((folder / name).stat().st_size > 1000 for name in written)
    if "out.json" in written:
        summary = json.loads((folder / "out.json").read_text())
        assert summary["finished"] == summary["requests"] == 20
        assert summary["price_basis"] == "on_demand 2026-05"
        assert set(summary["utilisation"]) == {"H100-SXM", "MI300X"}


def test_the_planned_outage_of_the_page_happens(folder):
    """At 10 requests/s, until after its beginning."""
    options = ["--plan", "plan.yaml", "--rate", "10", "--requests", "6100", "--output-tokens", "8", "--json", "o.json"]
    assert main(["simulate", *options]) == 0
    summary = json.loads((folder / "o.json").read_text())
    assert summary["failures"] >= 1
    assert summary["finished"] == 6100


def test_defaults_of_the_page_are_the_defaults(folder):
    plan = load_plan("plan.yaml")
    assert plan.engine == Engine()
    bare = Plan(plan.model, plan.pools)
    for field in ("first_token_at", "catalogue", "calibration", "allow_mixed_price_bases"):
        assert getattr(plan, field) == getattr(bare, field)
    (folder / "again.yaml").write_text(dump_plan(plan))
    assert load_plan("again.yaml") == plan


def test_python_of_the_page(folder):
    (code,) = blocks(PAGE, "python")
    assert "requests=5000" in code
    names: dict[str, object] = {}
    exec(code.replace("requests=5000", "requests=50"), names)
    assert names["result"].summary["finished"] == 50


def test_the_step_example_of_the_cost_model_was_measured():
    code = blocks((DOCS / "cost-model.md").read_text(encoding="utf-8"), "python")[0]
    names: dict[str, object] = {}
    exec(code, names)
    model = names["model"]
    assert model.efficiency.fallback == ""
    assert model.step_seconds(64, 64_000) < model.step_seconds(64, 64_000, 512, 131_328)


def test_accuracy_begins_as_the_report_does():
    assert (DOCS / "accuracy.md").read_text(encoding="utf-8").startswith(HEAD + "\n\n")
