"""Efficiencies, keyed by GPU, engine, version and dtype: shares of a GPU's peak that an engine reaches, fixed times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from math import log
from statistics import NormalDist
from typing import NamedTuple

from hetkv.costmodel.collectives import SWITCH_BYTES
from hetkv.errors import InputError


@dataclass(frozen=True)
class Constants:
    """The constants of the step time, see docs/cost-model.md. Shares are of the catalogue's peak, times are seconds.

    `few_rows_flops` is the share of products of few rows (decode steps); `kv_group` the power of the number of query
    heads to a KV head by which its reading slows down (0: read once for all of them, 1: once for each); `kv_unsplit`
    the factor of that reading where a step has so many sequences that the engine takes its other kernel.
    """

    gemm_bytes: float = 0.80
    gemm_flops: float = 0.50
    expert_bytes: float = 0.60
    expert_flops: float = 0.12
    few_rows_flops: float = 1.0
    kv_bytes: float = 0.60
    kv_group: float = 0.0
    kv_unsplit: float = 1.0
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
            low_open = not item.name.endswith("_s") and not item.name.startswith(("reduce", "kv_group"))
            if not isinstance(value, (int, float)) or value != value or value < 0 or (low_open and value == 0):
                raise InputError(f"efficiency `{item.name}` must be a positive number, got {value!r}")


@dataclass(frozen=True)
class Key:
    """What a set of constants was fitted for. An empty field stands for any."""

    gpu: str = ""
    engine: str = ""
    version: str = ""
    dtype: str = ""
    model: str = ""

    def __str__(self) -> str:
        parts = (self.gpu, self.engine, self.version, self.dtype)
        return "/".join(part or "*" for part in parts) + (f"/{self.model}" if self.model else "")


class Span(NamedTuple):
    """The 5 % and 95 % quantiles of measured over predicted time."""

    low: float
    high: float

    def widened(self, factor: float) -> Span:
        return Span(self.low / factor, self.high * factor)

    def at(self, quantile: float) -> float:
        """The factor that measured over predicted time stays below with probability `quantile`, the centre being 1.

        Log-normal on each side of the centre. Raises `InputError` outside (0, 1).
        """
        if not 0 < quantile < 1:
            raise InputError(f"confidence must be between 0 and 1, got {quantile}")
        z = NormalDist().inv_cdf(quantile) / NormalDist().inv_cdf(0.95)
        return float(self.high**z if z > 0 else self.low**-z)


class Spans(NamedTuple):
    """Intervals by what is timed: a decode step (TPOT), a prompt, and a first token after a queue (TTFT)."""

    decode: Span
    prefill: Span
    queue: Span

    def widened(self, factor: float) -> Spans:
        return Spans(*(span.widened(factor) for span in self))

    @staticmethod
    def same(low: float, high: float) -> Spans:
        return Spans(*[Span(low, high)] * 3)


@dataclass(frozen=True)
class Efficiency:
    """Constants with their intervals, their error on rows left out of the fit, and their origin.

    `by_tp` holds the constants of single TP degrees where the fit has them; `constants` are those of the other degrees.
    `bounded` names constants that stopped at a bound of their prior: the data did not set them. `confidence` is the
    quantile of the intervals at which step times are given. `any_model`: the intervals come from models that were left
    out of the fit, and so hold for one that was not measured.
    """

    key: Key
    constants: Constants
    spans: Spans
    provenance: str
    median_error: float | None = None
    rows: int = 0
    models: tuple[str, ...] = ()
    fallback: str = ""
    tps: tuple[int, ...] = ()
    max_batch: int = 0
    by_tp: Mapping[int, Constants] = field(default_factory=dict)
    bounded: tuple[str, ...] = ()
    confidence: float = 0.5
    any_model: bool = False

    def __post_init__(self) -> None:
        for name, span in self.spans._asdict().items():
            if not 0 < span.low <= 1 <= span.high:
                raise InputError(
                    f"efficiency {self.key}: the {name} interval must contain 1, got {span.low} to {span.high}"
                )

    def for_model(self, name: str, tp: int) -> Efficiency:
        """The efficiency of one model at one TP: that degree's constants, or those of the closest measured degree.

        A model or a TP that was not measured widens the intervals and is named in `fallback`.
        """
        lost = []
        if self.models and name not in self.models:
            lost.append(f"fitted on {', '.join(self.models)}, not on {name}")
        known = len(lost) if self.any_model else 0
        if self.tps and tp not in self.tps:
            lost.append(f"fitted at TP {', '.join(map(str, self.tps))}, not at {tp}")
        text = "; ".join([self.fallback] * bool(self.fallback) + [f"{what}: wider interval" for what in lost])
        return replace(
            self,
            constants=self.constants_at(tp),
            by_tp={},
            spans=self.spans.widened(NEW_RANGE ** (len(lost) - known)),
            fallback=text,
        )

    def constants_at(self, tp: int) -> Constants:
        """The constants of `tp`; where it was not measured, those of the closest degree (the larger one of two)."""
        if not self.by_tp:
            return self.constants
        return self.by_tp[min(self.by_tp, key=lambda known: (abs(log(known / tp)), -known))]

    def at(self, confidence: float) -> Efficiency:
        """The efficiency whose step times are at the quantile `confidence` of the intervals; 0.5 is the centre."""
        self.spans.decode.at(confidence)
        return replace(self, confidence=confidence)

    def spans_of(self, batch: int) -> Spans:
        """The intervals of a step; wider beyond the largest batch that was measured."""
        beyond = self.max_batch and batch > self.max_batch
        return self.spans.widened(NEW_RANGE) if beyond else self.spans


NEW_RANGE, NEW_GPU = 1.3, 1.6
"""Widening of the intervals for a model, TP or batch beyond those measured (and for another version, dtype or engine of
the same GPU), and for another GPU of a vendor whose entry was fitted to single GPUs of it."""

GENERIC = Spans.same(0.1, 10.0)
"""Intervals of `Constants()`, which serve only where a calibration file has no entry for all GPUs."""


@dataclass
class Efficiencies:
    """All known efficiencies. `find` takes the closest key and says what it had to give up."""

    entries: dict[Key, Efficiency] = field(default_factory=dict)

    def find(self, gpu: str, vendor: str, engine: str, version: str | None, dtype: str, model: str = "") -> Efficiency:
        """The entry for a combination; else the same GPU with another version, dtype or engine, the vendor's, or all's.

        An entry of the model itself is taken before one of several models. Every step away from the exact key is named
        in `fallback`. What several measured GPUs of a vendor, or all vendors, have in common is an entry of its own,
        whose intervals hold the spread between them.
        """
        version = version or ""
        for key, lost in (
            (Key(gpu, engine, version, dtype, model), ""),
            (Key(gpu, engine, version, dtype), ""),
            (Key(gpu, engine, "", dtype, model), f"version {version}" if version else ""),
            (Key(gpu, engine, "", dtype), f"version {version}" if version else ""),
            (Key(gpu, engine, "", ""), f"dtype {dtype}"),
            (Key(gpu, "", "", ""), f"engine {engine}"),
            (Key(vendor, engine, "", dtype), f"GPU {gpu}"),
            (Key(vendor, engine, "", ""), f"GPU {gpu} and dtype {dtype}"),
            (Key(vendor, "", "", ""), f"GPU {gpu} and engine {engine}"),
            (Key(), f"vendor {vendor}"),
        ):
            entry = self.entries.get(key)
            if entry is None:
                continue
            if not lost:
                return entry
            if key.gpu == gpu:
                text = f"nothing was measured for {lost}: values of {key}, interval widened"
                return replace(entry, spans=entry.spans.widened(NEW_RANGE), fallback=text)
            text = f"nothing was measured for {lost}: values of {key} ({entry.provenance}), with their spread"
            return replace(entry, fallback=text)
        key = Key(gpu, engine, version, dtype)
        span = f"interval x{GENERIC.decode.low} to x{GENERIC.decode.high}"
        text = f"nothing was measured for {key} or any other GPU: generic constants, {span}"
        return Efficiency(key, Constants(), GENERIC, "none", fallback=text)
