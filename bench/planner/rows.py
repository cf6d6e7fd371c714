"""Rows of a long measurement, one for each seed: written as they come, taken up again where a run was stopped."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from math import inf
from pathlib import Path
from typing import Any

from hetkv.bench.environment import environment

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser, *, jobs: int = -1) -> None:
    """The options of every measurement in rows."""
    parser.add_argument("--json", metavar="FILE", required=True)
    parser.add_argument("--jobs", type=int, default=jobs, metavar="N", help="processes at once, -1: one for each core")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the file has from the same commit")
    parser.add_argument("--minutes", type=float, default=inf, help="begin no row after so long; take up with --resume")


def measure(
    function: Callable[..., Row],
    tasks: Sequence[tuple[Any, ...]],
    args: argparse.Namespace,
    summary: Callable[[list[Row]], Row] | None = None,
    name: str = "fleets",
) -> list[Row]:
    """`function(*task)` of every task, as the options of `add_arguments` say; its first argument is the row's `seed`.

    After each row the file holds where it was measured, the `summary` so far and all rows as `name`, as JSON.
    """
    from joblib import Parallel, delayed, effective_n_jobs

    jobs = effective_n_jobs(args.jobs)
    about = environment() | {"jobs": jobs}
    rows = _rows_of(args.json, about["commit"], name) if args.resume else []
    done = {row["seed"] for row in rows}
    end = time.monotonic() + 60 * args.minutes

    def left() -> Iterator[Any]:
        for task in tasks:
            if task[0] not in done and time.monotonic() < end:
                yield delayed(function)(*task)

    # No more is dispatched than runs: `left` is asked when a process is free, so that it can stop.
    run = Parallel(n_jobs=jobs, return_as="generator_unordered", pre_dispatch=jobs, batch_size=1)
    for row in run(left()):
        rows = sorted([*rows, row], key=lambda r: int(r["seed"]))
        facts = about | {"load_average": round(os.getloadavg()[0], 1)}
        facts |= {"summary": summary(rows)} if summary else {}
        _write(Path(args.json), facts | {name: rows})
        print(f"{len(rows)} of {len(tasks)}: {row['seed']}", file=sys.stderr, flush=True)
    return rows


def _write(path: Path, facts: Row) -> None:
    """All at once: a run that is killed leaves the file of the row before."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


def _rows_of(path: str, commit: str, name: str) -> list[Row]:
    if not Path(path).is_file():
        return []
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    if found.get("commit", "").removesuffix("-dirty") != commit.removesuffix("-dirty"):
        raise SystemExit(f"{path} is from commit {found.get('commit')}, not {commit}: start anew, without --resume")
    return list(found[name])
