"""Efficiencies, keyed by GPU, engine, version and dtype: shares of a GPU's peak that an engine reaches, fixed times."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from hetkv.costmodel.collectives import SWITCH_BYTES
from hetkv.errors import InputError


@dataclass(frozen=True)
class Constants:
    """The constants of the step time, see docs/cost-model.md. Shares are of the catalogue's peak, times are seconds."""

    gemm_bytes: float = 0.80
    gemm_flops: float = 0.50
    expert_bytes: float = 0.60
    expert_flops: float = 0.12
    kv_bytes: float = 0.60
    attention_flops: float = 0.60
    layer_s: float = 60e-6
    sequence_layer_s: float = 0.0
    host_layer_s: float = 0.0
    step_s: float = 200e-6
    sequence_s: float = 15e-6
    prompt_s: float = 1e-3
    prompt_layer_s: float = 450e-6
    reduce: float = 1.0
    reduce_latency: float = 1.0
    reduce_large: float = 1.0
    reduce_switch_bytes: float = SWITCH_BYTES

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            low_open = not item.name.endswith("_s") and not item.name.startswith("reduce")
            if not isinstance(value, (int, float)) or value != value or value < 0 or (low_open and value == 0):
                raise InputError(f"efficiency `{item.name}` must be a positive number, got {value!r}")


@dataclass(frozen=True)
class Key:
    """What a set of constants was fitted for. An empty field stands for any."""

    gpu: str = ""
    engine: str = ""
    version: str = ""
    dtype: str = ""

    def __str__(self) -> str:
        return "/".join(part or "*" for part in (self.gpu, self.engine, self.version, self.dtype))


@dataclass(frozen=True)
class Efficiency:
    """Constants with the 5 % and 95 % quantiles of measured over predicted time, their fit error and their origin."""

    key: Key
    constants: Constants
    low: float
    high: float
    provenance: str
    median_error: float | None = None
    rows: int = 0
    models: tuple[str, ...] = ()
    fallback: str = ""
    tps: tuple[int, ...] = ()
    max_batch: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.low <= 1 <= self.high:
            raise InputError(f"efficiency {self.key}: interval factors must hold 1, got {self.low} to {self.high}")

    def for_model(self, name: str, tp: int) -> Efficiency:
        """The same; for a model or a TP that was not among those measured with a wider interval and a word about it."""
        lost = []
        if self.models and name not in self.models:
            lost.append(f"fitted on {', '.join(self.models)}, not on {name}")
        if self.tps and tp not in self.tps:
            lost.append(f"fitted at TP {', '.join(map(str, self.tps))}, not at {tp}")
        if not lost:
            return self
        text = "; ".join([self.fallback] * bool(self.fallback) + [f"{what}: interval widened" for what in lost])
        widen = NEW_RANGE ** len(lost)
        return replace(self, low=self.low / widen, high=self.high * widen, fallback=text)

    def factors(self, batch: int) -> tuple[float, float]:
        """Interval factors of a step; wider beyond the largest batch that was measured."""
        if self.max_batch and batch > self.max_batch:
            return self.low / NEW_RANGE, self.high * NEW_RANGE
        return self.low, self.high


NEW_RANGE, NEW_GPU = 1.3, 1.6
"""Widening of the interval for a model, TP or batch beyond those measured (and for another version, dtype or engine of
the same GPU), and for another GPU."""

FALLBACK_LOW, FALLBACK_HIGH = 0.5, 5.0
"""Interval factors of a combination that nothing was measured for; docs/cost-model.md says how they were found."""


@dataclass
class Efficiencies:
    """All known efficiencies. `find` takes the closest key and says what it had to give up."""

    entries: dict[Key, Efficiency] = field(default_factory=dict)

    def find(self, gpu: str, vendor: str, engine: str, version: str | None, dtype: str) -> Efficiency:
        """The entry for a combination; else the same GPU with another version or dtype, the vendor, or the fallback.

        Each step away from the exact key widens the interval and is named in `fallback`.
        """
        version = version or ""
        for key, lost in (
            (Key(gpu, engine, version, dtype), ""),
            (Key(gpu, engine, "", dtype), f"version {version}" if version else ""),
            (Key(gpu, engine, "", ""), f"dtype {dtype}"),
            (Key(gpu, "", "", ""), f"engine {engine}"),
            (Key(vendor, engine, "", dtype), f"GPU {gpu}"),
            (Key(vendor, engine, "", ""), f"GPU {gpu} and dtype {dtype}"),
            (Key(vendor, "", "", ""), f"GPU {gpu} and engine {engine}"),
        ):
            entry = self.entries.get(key)
            if entry is None:
                continue
            if not lost:
                return entry
            text = f"nothing was measured for {lost}: values of {key}, interval widened"
            widen = NEW_RANGE if key.gpu == gpu else NEW_GPU
            return replace(entry, low=entry.low / widen, high=entry.high * widen, fallback=text)
        key = Key(gpu, engine, version, dtype)
        text = f"nothing was measured for {key}: generic constants, interval x{FALLBACK_LOW} to x{FALLBACK_HIGH}"
        return Efficiency(key, Constants(), FALLBACK_LOW, FALLBACK_HIGH, "none", fallback=text)


def load_efficiencies(overrides: Iterable[str | Path] = ()) -> Efficiencies:
    """The shipped values with the user's calibration files laid over them, later ones last."""
    entries = dict(_shipped().entries)
    for path in overrides:
        entries.update(parse_efficiencies(Path(path).read_text(encoding="utf-8"), str(path)).entries)
    return Efficiencies(entries)


@lru_cache(maxsize=1)
def _shipped() -> Efficiencies:
    entry = resources.files("hetkv.costmodel") / "data" / "calibration.json"
    if not entry.is_file():
        return Efficiencies()
    return parse_efficiencies(entry.read_text(encoding="utf-8"), "hetkv/costmodel/data/calibration.json")


def parse_efficiencies(text: str, origin: str) -> Efficiencies:
    """Read a calibration file; errors name the file, the entry and the field."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{origin}: not JSON: {error}") from None
    if not isinstance(document, dict) or not isinstance(document.get("efficiencies"), list):
        raise InputError(f"{origin}: expected an object with a list `efficiencies`")
    entries: dict[Key, Efficiency] = {}
    for index, raw in enumerate(document["efficiencies"]):
        try:
            key = Key(**raw["key"])
            entries[key] = Efficiency(
                key=key,
                constants=Constants(**raw["constants"]),
                low=float(raw["low"]),
                high=float(raw["high"]),
                provenance=str(raw["provenance"]),
                median_error=raw.get("median_error"),
                rows=int(raw.get("rows", 0)),
                models=tuple(raw.get("models", ())),
                tps=tuple(raw.get("tps", ())),
                max_batch=int(raw.get("max_batch", 0)),
            )
        except (KeyError, TypeError, ValueError) as error:
            reason = f"missing {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(f"{origin}: efficiencies[{index}]: {reason}") from None
    return Efficiencies(entries)


def dump_efficiencies(entries: Iterable[Efficiency], about: str) -> str:
    """The text of a calibration file, sorted by key."""

    def row(entry: Efficiency) -> dict[str, Any]:
        constants = {k: float(f"{v:.6g}") for k, v in asdict(entry.constants).items()}
        return {
            "key": asdict(entry.key),
            "constants": constants,
            "low": round(entry.low, 4),
            "high": round(entry.high, 4),
            "median_error": None if entry.median_error is None else round(entry.median_error, 4),
            "rows": entry.rows,
            "models": list(entry.models),
            "tps": list(entry.tps),
            "max_batch": entry.max_batch,
            "provenance": entry.provenance,
        }

    ordered = sorted(entries, key=lambda e: str(e.key))
    return json.dumps({"about": about, "efficiencies": [row(entry) for entry in ordered]}, indent=1) + "\n"
