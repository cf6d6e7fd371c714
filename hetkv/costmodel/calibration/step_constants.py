"""Constants of `MeasuredSteps` from measured steps: least squares of relative errors, none of them negative."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hetkv.costmodel.measured_steps import NODES, StepFit, StepWork, terms
from hetkv.errors import InputError

COLUMNS = ("seconds", "decoding", "context", "prompt", "pairs", "others")
"""`others`: how many other instances of the machine were busy, on average over the step."""
ROUNDS = 12
FEWEST = 20
"""Steps under which a fit is rejected."""


def from_steps_json(paths: Sequence[Path]) -> list[StepFit]:
    """One fit for each `name` in the list `steps` of the files: `kv_bytes_per_token`, and `rows` of `COLUMNS`.

    Files without such a list are left to the links. Errors name the file and the entry.
    """
    rows: dict[str, list[list[float]]] = defaultdict(list)
    kv: dict[str, float] = {}
    origins: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        document = json.loads(path.read_text(encoding="utf-8"))
        for index, entry in enumerate(document.get("steps", []) if isinstance(document, dict) else []):
            try:
                name, found = str(entry["name"]), [_row(row) for row in entry["rows"]]
                kv[name] = float(entry["kv_bytes_per_token"])
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{path}: steps[{index}]: missing or wrong {error}") from None
            if any(row[0] <= 0 for row in found):
                raise InputError(f"{path}: steps[{index}]: `seconds` must be positive")
            rows[name] += found
            device, commit = document.get("device") or "not recorded", document.get("commit") or "not recorded"
            origins[name].append(f"{path.name}: device {device}, commit {commit}")
    return [fit(name, np.array(found), kv[name], "; ".join(origins[name])) for name, found in sorted(rows.items())]


def _row(row: dict[str, Any]) -> list[float]:
    return [float(row.get(column, 0.0) if column == "others" else row[column]) for column in COLUMNS]


def fit(name: str, rows: Any, kv_bytes: float, provenance: str) -> StepFit:
    """Constants of steps `[steps, COLUMNS]`. Raises `InputError` for fewer than `FEWEST`."""
    from scipy.optimize import nnls

    if len(rows) < FEWEST:
        raise InputError(f"{provenance}: {name}: {len(rows)} steps, at least {FEWEST} are needed")
    seconds, others = rows[:, 0], rows[:, -1]
    matrix = terms(StepWork(*rows[:, 1:-1].T))
    scale = np.maximum(matrix.max(axis=0), 1.0)
    # Weighted by measured times the fit would favour steps that were quick by chance; then by predicted ones.
    expected, crowding = seconds, 0.0
    for _ in range(ROUNDS):
        slow = 1 + crowding * others
        found, _ = nnls(matrix / scale * (slow / expected)[:, None], seconds / expected)
        alone = np.maximum(matrix @ (found / scale), 1e-12)
        expected = np.maximum(slow * alone, 0.2 * seconds)
        if others.any():
            weight = others * (alone / expected) ** 2
            crowding = max(0.0, float(weight @ (seconds / alone - 1) / (weight @ others)))
    constants = found / scale
    ratio = seconds / np.maximum((1 + crowding * others) * (matrix @ constants), 1e-12)
    low, high = np.quantile(ratio, (0.05, 0.95))
    count = len(NODES)
    sequence, context, pair, prompt = constants[1 + count :].tolist()
    return StepFit(
        name=name, step_s=float(constants[0]), token_s=tuple(constants[1 : 1 + count].tolist()), sequence_s=sequence,
        context_s=context, pair_s=pair, prompt_s=prompt, crowding=crowding, kv_bytes_per_token=kv_bytes, rows=len(rows),
        median_error=float(np.median(np.abs(1 / ratio - 1))), low=float(min(low, 1.0)), high=float(max(high, 1.0)),
        provenance=provenance,
    )  # fmt: skip
