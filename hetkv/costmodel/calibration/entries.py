"""Entries of a calibration file from fits: constants by key and TP, with intervals from rows left out of the fit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hetkv.costmodel.calibration.datasets import BatchRow, ServingRow, StepRow
from hetkv.costmodel.calibration.fit import Array, Fitted
from hetkv.costmodel.efficiency import Constants, Efficiency, Key, Spans
from hetkv.costmodel.models import model_shape

Row = StepRow | BatchRow | ServingRow


def split(row: Row) -> tuple[int, int]:
    """TP, and the sequences of one instance."""
    if isinstance(row, ServingRow):
        return row.decode.tp, row.concurrency // row.decode.workers
    return row.tp, row.batch


def entries(
    rows: Sequence[Any],
    errors: Array,
    fitted: Fitted,
    key: Callable[[Any], Key],
    spans: Callable[[Any], Spans],
    provenance: str,
    bare: Sequence[Any] | None = None,
) -> list[Efficiency]:
    """One entry for each key that the rows have. `errors` are log(measured / predicted) of rows left out of their fit.

    `bare` are the rows without what the entries do not distinguish, such as the model: key, constants and intervals
    are those of the bare rows. A key holds the constants of each TP degree by itself where the fit distinguishes them.
    Raises `ValueError` when the fit distinguishes rows by something else that the key does not name: one entry cannot
    hold their constants.
    """
    bare = rows if bare is None else bare
    groups: dict[Key, list[int]] = defaultdict(list)
    for index, row in enumerate(bare):
        groups[key(row)].append(index)
    found = []
    for name, members in groups.items():
        by_tp: dict[int, Constants] = {}
        for index in members:
            constants = fitted.constants(bare[index])
            if by_tp.setdefault(split(rows[index])[0], constants) != constants:
                raise ValueError(f"rows of {name} at one TP have several constants")
        tps = tuple(sorted(by_tp))
        same = len(set(by_tp.values())) == 1
        bounded = {each for index in members for each in fitted.bounded(bare[index])}
        found.append(
            Efficiency(
                key=name,
                constants=by_tp[tps[0]],
                spans=spans(bare[members[0]]),
                provenance=provenance,
                median_error=float(np.median(np.abs(np.expm1(-errors[members])))),
                rows=len(members),
                models=tuple(sorted({model_shape(rows[i].model).name for i in members})),
                tps=tps,
                max_batch=max(split(rows[i])[1] for i in members),
                by_tp={} if same else by_tp,
                bounded=tuple(sorted(bounded)),
            )
        )
    return found
