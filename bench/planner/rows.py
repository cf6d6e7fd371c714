"""Rows of a long measurement, one for each seed: written as they come, taken up again where a run was stopped."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hetkv.bench.environment import environment

Row = dict[str, Any]


def measure(
    function: Callable[..., Row],
    tasks: Sequence[tuple[Any, ...]],
    path: str,
    *,
    jobs: int,
    resume: bool,
    summary: Callable[[list[Row]], Row] | None = None,
) -> list[Row]:
    """`function(*task)` of every task, `jobs` at once; its first argument is the row's `seed`.

    After each row `path` holds where it was measured, the `summary` so far and all rows, as JSON. With `resume`, rows
    that the file has from the same commit are kept and not measured again.
    """
    from joblib import Parallel, delayed

    about = environment() | {"jobs": jobs}
    rows = _rows_of(path, about["commit"]) if resume else []
    done = {row["seed"] for row in rows}
    left = [task for task in tasks if task[0] not in done]
    for row in Parallel(n_jobs=jobs, return_as="generator_unordered")(delayed(function)(*task) for task in left):
        rows = sorted([*rows, row], key=lambda r: int(r["seed"]))
        facts = about | {"load_average": round(os.getloadavg()[0], 1)}
        facts |= {"summary": summary(rows)} if summary else {}
        Path(path).write_text(json.dumps(facts | {"fleets": rows}, indent=1) + "\n", encoding="utf-8")
        print(f"{len(rows)} of {len(tasks)}", file=sys.stderr, flush=True)
    return rows


def _rows_of(path: str, commit: str) -> list[Row]:
    if not Path(path).is_file():
        return []
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    if found.get("commit", "").removesuffix("-dirty") != commit.removesuffix("-dirty"):
        raise SystemExit(f"{path} is from commit {found.get('commit')}, not {commit}: start anew, without --resume")
    return list(found["fleets"])
