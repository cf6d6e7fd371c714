"""Calibration files: efficiencies and measured links as JSON, the shipped one and the user's own laid over it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from hetkv.costmodel.efficiency import Constants, Efficiencies, Efficiency, Key, Span, Spans
from hetkv.costmodel.kv_transfer import Link
from hetkv.costmodel.textfile import read_utf8
from hetkv.errors import InputError

SHIPPED = "hetkv/costmodel/data/calibration.json"


def load_efficiencies(overrides: Iterable[str | Path] = ()) -> Efficiencies:
    """The shipped values with the user's calibration files laid over them, later ones last."""
    entries = dict(_shipped().entries)
    for path in overrides:
        entries.update(parse_efficiencies(read_utf8(path), str(path)).entries)
    return Efficiencies(entries)


@lru_cache(maxsize=1)
def _shipped() -> Efficiencies:
    entry = resources.files("hetkv.costmodel") / "data" / "calibration.json"
    if not entry.is_file():
        return Efficiencies()
    return parse_efficiencies(entry.read_text(encoding="utf-8"), SHIPPED)


def load_links(paths: Iterable[str | Path]) -> dict[str, Link]:
    """The links that `hetkv calibrate --bench` wrote, by name, later files last; errors name the file and the link."""
    found = {}
    for path in paths:
        document = parse_document(read_utf8(path), str(path))
        for index, raw in enumerate(document.get("links", [])):
            try:
                found[str(raw["name"])] = Link(float(raw["bytes_per_second"]), float(raw["latency_s"]))
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{path}: links[{index}]: missing or wrong {error}") from None
    return found


def parse_document(text: str, origin: str) -> dict[str, Any]:
    """The JSON object of a calibration file; `InputError` names the file."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{origin}: not JSON: {error}") from None
    if not isinstance(document, dict) or not isinstance(document.get("efficiencies"), list):
        raise InputError(f"{origin}: expected an object with a list `efficiencies`")
    return document


def parse_efficiencies(text: str, origin: str) -> Efficiencies:
    """Read a calibration file; errors name the file, the entry and the field."""
    entries: dict[Key, Efficiency] = {}
    for index, raw in enumerate(parse_document(text, origin)["efficiencies"]):
        try:
            entry = _entry(raw)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = f"missing {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(f"{origin}: efficiencies[{index}]: {reason}") from None
        entries[entry.key] = entry
    return Efficiencies(entries)


def _entry(raw: Mapping[str, Any]) -> Efficiency:
    unknown = set(raw) - {item.name for item in fields(Efficiency)} - {"fallback", "confidence"}
    if unknown:
        raise ValueError(f"unknown field `{sorted(unknown)[0]}`")
    constants = Constants(**raw["constants"])
    return Efficiency(
        key=Key(**raw["key"]),
        constants=constants,
        spans=Spans(**{name: Span(*map(float, pair)) for name, pair in raw["spans"].items()}),
        provenance=str(raw["provenance"]),
        median_error=raw.get("median_error"),
        rows=int(raw.get("rows", 0)),
        models=tuple(raw.get("models", ())),
        tps=tuple(raw.get("tps", ())),
        max_batch=int(raw.get("max_batch", 0)),
        by_tp={int(tp): Constants(**{**raw["constants"], **own}) for tp, own in raw.get("by_tp", {}).items()},
        bounded=tuple(raw.get("bounded", ())),
        any_model=bool(raw.get("any_model", False)),
    )


def dump_efficiencies(entries: Iterable[Efficiency], about: str) -> str:
    """The text of a calibration file, sorted by key."""
    ordered = sorted(entries, key=lambda entry: str(entry.key))
    return json.dumps({"about": about, "efficiencies": [_row(entry) for entry in ordered]}, indent=1) + "\n"


def _row(entry: Efficiency) -> dict[str, Any]:
    """JSON types of an entry; a TP degree holds only the constants in which it differs from the common ones."""
    constants = _rounded(entry.constants)
    by_tp = {
        str(tp): {name: value for name, value in _rounded(own).items() if value != constants[name]}
        for tp, own in sorted(entry.by_tp.items())
    }
    return {
        "key": {name: value for name, value in asdict(entry.key).items() if value or name != "model"},
        "constants": constants,
        "by_tp": by_tp,
        "spans": {name: [float(f"{side:.4g}") for side in span] for name, span in entry.spans._asdict().items()},
        "median_error": None if entry.median_error is None else round(entry.median_error, 4),
        "rows": entry.rows,
        "models": list(entry.models),
        "tps": list(entry.tps),
        "max_batch": entry.max_batch,
        "bounded": list(entry.bounded),
        "any_model": entry.any_model,
        "provenance": entry.provenance,
    }


def _rounded(constants: Constants) -> dict[str, float]:
    return {name: float(f"{value:.7g}") for name, value in asdict(constants).items()}
