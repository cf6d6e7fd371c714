"""Sections of docs/accuracy.md: a registry of functions, each of which measures one thing and returns markdown.

A module registers its sections when it is imported; `hetkv calibrate --report` imports them and calls all, in order.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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
