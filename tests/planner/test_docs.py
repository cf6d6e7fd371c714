"""The pages on planning say what the files say, and their commands are commands."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from hetkv.cli import plan as command
from hetkv.planner.output.launch import vllm_lines
from hetkv.planner.problem import load_problem
from hetkv.planner.solve import solve

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.yaml"))
COMMANDS = [
    shlex.split(text.replace("\\\n", " ")) for text in re.findall(r"^    (hetkv plan (?:.*\\\n)*.*)$", PAGE, re.M)
]


def test_tables_are_made_from_the_results():
    done = subprocess.run(
        [sys.executable, "bench/planner/figures.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[3:5]))
def test_commands_of_the_page_are_understood(words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(words[2:])
    if args.problem.startswith("docs/"):
        assert (ROOT / args.problem).is_file()
        assert (ROOT / args.json).is_file()
        assert (ROOT / args.plot).is_file()


def test_there_is_a_command_for_each_example_that_was_run():
    run = {Path(words[words.index("--problem") + 1]).stem for words in COMMANDS if "docs/" in " ".join(words)}
    assert run == {file.stem.removeprefix("plan-") for file in (ROOT / "bench" / "results").glob("plan-*.json")}
    assert run <= {file.stem for file in EXAMPLES}


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_examples_are_problems_with_dated_prices(file):
    problem = load_problem(file)
    assert problem.prices
    assert all(re.fullmatch(r"20\d\d-\d\d", price.as_of) for price in problem.prices)
    result = ROOT / "bench" / "results" / f"plan-{file.stem}.json"
    if result.is_file():
        assert json.loads(result.read_text())["problem"] == msgspec.to_builtins(problem)


def test_the_fast_example_is_what_the_planner_says_today():
    """The others take minutes: `python bench/planner/examples.py` runs them all."""
    (file,) = (f for f in EXAMPLES if f.stem == "llama-2-7b")
    plan = solve(load_problem(file), alternatives=False)
    assert plan.meets
    assert all("CANNOT BE STARTED" not in vllm_lines(d) for d in plan.deployments.values())
    result = ROOT / "bench" / "results" / f"plan-{file.stem}.json"
    if result.is_file():
        assert plan.cost_per_hour == pytest.approx(json.loads(result.read_text())["cost_per_hour"])


def test_pictures_are_small():
    assert all(file.stat().st_size < 200_000 for file in (ROOT / "docs" / "pictures").glob("plan-*.png"))
