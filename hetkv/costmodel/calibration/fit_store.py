"""Stored fits, by what was fitted to which rows: docs/accuracy.md is remade from the shipped ones without fitting."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib import resources
from typing import Any


@dataclass
class FitStore:
    """Offsets of fits by the digest of what was fitted. A sealed store is complete: a fit it lacks is an error."""

    fits: dict[str, list[float]] = field(default_factory=dict)
    sealed: bool = False

    def dump(self) -> str:
        lines = (f'"{key}": {json.dumps(shifts)}' for key, shifts in sorted(self.fits.items()))
        return "{\n" + ",\n".join(lines) + "\n}\n"


def shipped_fits(sealed: bool = False) -> FitStore:
    """The fits from which the shipped calibration file and docs/accuracy.md are made."""
    entry = resources.files("hetkv.costmodel") / "data" / "fits.json"
    fits = json.loads(entry.read_text(encoding="utf-8")) if entry.is_file() else {}
    return FitStore(fits, sealed)


_active: ContextVar[FitStore | None] = ContextVar("fit_store", default=None)


def active_store() -> FitStore | None:
    return _active.get()


@contextmanager
def stored(store: FitStore) -> Iterator[None]:
    """Within the block every fit is looked up in `store`, and added to it where it is missing."""
    token = _active.set(store)
    try:
        yield
    finally:
        _active.reset(token)


def digest(rows: Sequence[Any], *settings: Any) -> str:
    """Names a fit by its rows, with their measurements, and its settings.

    Numbers count to nine digits: priors that come from other fits differ in the last ones from CPU to CPU.
    """
    text = hashlib.sha256()
    for part in (*rows, *settings):
        text.update(_NUMBER.sub(_rounded, repr(part)).encode())
    return text.hexdigest()[:16]


_NUMBER = re.compile(r"(?<![\w.])\d+\.\d{9,}(?:e[+-]?\d+)?|(?<![\w.])\d+(?:\.\d+)?e[+-]?\d+")


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number.group()):.9g}"
