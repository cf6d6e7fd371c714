"""Long measurements of bench/planner are taken up where they were stopped."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench" / "planner"))

import rows


def options(path: Path, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    rows.add_arguments(parser)
    return parser.parse_args(["--json", str(path), "--jobs", "1", *words])


def total(found: list[rows.Row]) -> rows.Row:
    return {"total": sum(row["value"] for row in found)}


def square(seed: int) -> rows.Row:
    if seed == 3:
        raise RuntimeError("stopped")
    return {"seed": seed, "value": seed * seed}


def cube(seed: int) -> rows.Row:
    return {"seed": seed, "value": seed**3}


def test_rows_are_written_as_they_come_and_kept(tmp_path):
    path = tmp_path / "found.json"
    tasks = [(seed,) for seed in range(5)]
    with pytest.raises(RuntimeError, match="stopped"):
        rows.measure(square, tasks, options(path), total)
    facts = json.loads(path.read_text())
    assert [row["seed"] for row in facts["fleets"]] == [0, 1, 2]
    assert facts["summary"] == {"total": 5}
    found = rows.measure(cube, tasks, options(path, "--resume"), total)
    assert [row["value"] for row in found] == [0, 1, 4, 27, 64]
    assert json.loads(path.read_text())["fleets"] == found
    assert [row["value"] for row in rows.measure(cube, tasks, options(path))] == [0, 1, 8, 27, 64]


def test_no_row_begins_after_its_time(tmp_path):
    path = tmp_path / "found.json"
    assert rows.measure(cube, [(1,)], options(path, "--minutes", "0")) == []
    assert not path.exists()


def test_rows_of_another_commit_are_not_mixed(tmp_path):
    path = tmp_path / "found.json"
    rows.measure(cube, [(1,)], options(path))
    facts = json.loads(path.read_text()) | {"commit": "another"}
    path.write_text(json.dumps(facts))
    with pytest.raises(SystemExit, match="another"):
        rows.measure(cube, [(1,)], options(path, "--resume"))
