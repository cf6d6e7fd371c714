"""Sections of docs/accuracy.md: a registry of functions, each of which measures one thing and returns markdown.

A module registers its sections when it is imported; `hetkv calibrate --report` imports them and calls all, in order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from hetkv.costmodel.calibration.datasets import RULES
from hetkv.errors import InputError

Section = Callable[[Path], str]
"""Takes the data folder (`measured/`, `traces/` inside), returns markdown that starts with a `##` heading."""

_SECTIONS: dict[str, tuple[int, Section]] = {}
"""By name: order, and the function, whose module says which document it belongs to."""


def section(name: str, order: int) -> Callable[[Section], Section]:
    """Register a section under a unique name. Lower `order` comes first: the cost model has 100 to 199."""

    def register(function: Section) -> Section:
        if name in _SECTIONS:
            raise ValueError(f"section {name!r} is registered twice")
        _SECTIONS[name] = (order, function)
        return function

    return register


def sections(modules: Sequence[str]) -> dict[str, Section]:
    """The sections that `modules` registered, in their order."""
    ordered = sorted(_SECTIONS.items(), key=lambda item: (item[1][0], item[0]))
    return {name: function for name, (_, function) in ordered if function.__module__ in modules}


def render(
    data: Path,
    modules: Sequence[str],
    progress: Callable[[str], None] = lambda name: None,
    only: Sequence[str] = (),
    present: str = "",
    head: str = "",
) -> str:
    """A whole document: the head, then every section that `modules` registered.

    Without `head` it is that of docs/accuracy.md, with the rules of exclusion.

    With `only`, the other sections keep their text from `present`, the file as it is; one that is not there is made.
    Raises `InputError` when `only` names a section that does not exist.
    """
    known = sections(modules)
    for name in only:
        if name not in known:
            raise InputError(f"unknown section {name!r}; known are {', '.join(known)}")
    kept = (
        {}
        if not only
        else dict(re.findall(r"<!-- section (\S+) -->\n+(.*?)\n*(?=<!-- section |\Z)", present, re.DOTALL))
    )
    rules = "\n".join(f"- `{name}`: {why}." for name, why in RULES.items())
    parts = [head.strip()] if head else [HEAD, f"## Rules of exclusion\n\n{rules}"]
    for name, function in known.items():
        if name in kept and name not in only:
            text = kept[name]
        else:
            progress(name)
            text = function(data).strip()
        parts += [f"<!-- section {name} -->", text]
    return "\n\n".join(parts) + "\n"


HEAD = """# Accuracy

This file is made by `hetkv calibrate --report` and holds no figure that was typed in; docs/cost-model.md has the whole
command and says where to get the data. The fits are those of `hetkv/costmodel/data/fits.json`, from which the
calibration file is made, too; a test remakes every line from them. Errors are relative to the measurement: the bias is
signed (positive: predicted too long); median, mean and p90 are of the absolute error. Each prediction comes with a 90 %
interval; the last columns give the share of measurements inside and its width (median of high over low). No row is
predicted by a fit that saw it, and no interval comes from the errors of the rows it is judged on; repeats of one
configuration are never split. Where a whole GPU, model or TP is left out, the interval is the spread between the others
that were each left out. What is held out are constants: the form of the terms was chosen with all of these data in
view."""
