"""Sections of docs/accuracy.md: a registry of functions, each of which measures one thing and returns markdown.

A module registers its sections when it is imported; `hetkv calibrate --report` imports them and calls all, in order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from hetkv.costmodel.calibration.datasets import RULES
from hetkv.costmodel.efficiency import NEW_GPU, NEW_RANGE
from hetkv.errors import InputError

Section = Callable[[Path], str]
"""Takes the data folder (`measured/`, `traces/` inside), returns markdown that starts with a `##` heading."""

_SECTIONS: dict[str, tuple[int, Section]] = {}


def section(name: str, order: int) -> Callable[[Section], Section]:
    """Register a section under a unique name. Lower `order` comes first: the cost model has 100 to 199."""

    def register(function: Section) -> Section:
        if name in _SECTIONS:
            raise ValueError(f"section {name!r} is registered twice")
        _SECTIONS[name] = (order, function)
        return function

    return register


def sections() -> dict[str, Section]:
    """All registered sections in their order."""
    ordered = sorted(_SECTIONS.items(), key=lambda item: (item[1][0], item[0]))
    return {name: function for name, (_, function) in ordered}


def render(
    data: Path,
    progress: Callable[[str], None] = lambda name: None,
    only: Sequence[str] = (),
    present: str = "",
) -> str:
    """The whole of docs/accuracy.md: the rules of exclusion first, then every registered section.

    With `only`, the other sections keep their text from `present`, the file as it is; one that is not there is made.
    Raises `InputError` when `only` names a section that does not exist.
    """
    known = sections()
    for name in only:
        if name not in known:
            raise InputError(f"unknown section {name!r}; known are {', '.join(known)}")
    kept = (
        {}
        if not only
        else dict(re.findall(r"<!-- section (\S+) -->\n+(.*?)\n*(?=<!-- section |\Z)", present, re.DOTALL))
    )
    parts = [HEAD, "## Rules of exclusion\n\n" + "\n".join(f"- `{name}`: {why}." for name, why in RULES.items())]
    for name, function in known.items():
        if name in kept and name not in only:
            text = kept[name]
        else:
            progress(name)
            text = function(data).strip()
        parts += [f"<!-- section {name} -->", text]
    return "\n\n".join(parts) + "\n"


HEAD = f"""# Accuracy

This file is made by `hetkv calibrate --report docs/accuracy.md --data DATA` and holds no figure that was typed in. DATA
is a folder of public measurements; docs/cost-model.md says where to get each file. Errors are relative to the
measurement: the bias is signed (positive: predicted too long), median and p90 are of the absolute error. Each
prediction comes with a 90 % interval; the last column says how many measurements lie inside. Intervals come from folds
inside the rows that were fitted on, widened by {NEW_RANGE} for a model, TP or batch beyond them and by {NEW_GPU} for
another GPU. No row is predicted by a fit that saw it, and repeats of one configuration are never split. What is held
out are constants: the form of the terms (docs/cost-model.md) was chosen with all of these data in view."""
