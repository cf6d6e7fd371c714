"""Link constants from the JSON of `hetkv bench`: time of a transfer as latency plus bytes over bandwidth."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hetkv.costmodel.kv_transfer import Link
from hetkv.errors import InputError


@dataclass(frozen=True)
class LinkFit:
    """A measured path by the name that the benchmark gave it, with the fit's median relative error."""

    name: str
    bytes_per_second: float
    latency_s: float
    median_error: float
    rows: int
    provenance: str

    @property
    def link(self) -> Link:
        return Link(self.bytes_per_second, self.latency_s)


def from_bench_json(paths: Sequence[Path]) -> list[LinkFit]:
    """One fit for each case in the `results` of benchmark files; the same case of several files is fitted together.

    `hetkv bench transfer` gives `path`, `source`, `destination`, `layer_mib` and `hetkv_gb_s`; others give `case`,
    `bytes`, and `seconds` or `gb_s` (1e9 bytes a second). Sizes that differ give latency and bandwidth; a single size
    gives bandwidth alone. Errors name the file, the result and the field.
    """
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    origins: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: not JSON: {error}") from None
        if isinstance(document, dict) and document.get("steps") and not document.get("results"):
            continue  # times of steps alone
        if not isinstance(document, dict) or not isinstance(document.get("results"), list) or not document["results"]:
            raise InputError(f"{path}: expected the JSON of `hetkv bench`, an object with a list `results`")
        device, commit = document.get("device") or "not recorded", document.get("commit") or "not recorded"
        for index, result in enumerate(document["results"]):
            name, size, seconds = _point(result, f"{path}: results[{index}]")
            groups[name].append((size, seconds))
            text = f"{path.name}: device {device}, commit {commit}"
            if text not in origins[name]:
                origins[name].append(text)
    return [_fit(name, np.array(points), "; ".join(origins[name])) for name, points in sorted(groups.items())]


def _point(result: Any, where: str) -> tuple[str, float, float]:
    """Case, bytes and seconds of one result."""
    if isinstance(result, dict) and "hetkv_gb_s" in result:
        name = f"{result.get('path')} {result.get('source')} -> {result.get('destination')}"
        size = _positive(result, "layer_mib", where) * 2**20
        return name, size, size / (_positive(result, "hetkv_gb_s", where) * 1e9)
    if not isinstance(result, dict) or not isinstance(result.get("case"), str):
        raise InputError(f"{where}: missing field `case`")
    size = _positive(result, "bytes", where)
    if "seconds" in result:
        return result["case"], size, _positive(result, "seconds", where)
    return result["case"], size, size / (_positive(result, "gb_s", where) * 1e9)


def _positive(result: dict[str, Any], name: str, where: str) -> float:
    value = result.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise InputError(f"{where}: `{name}` must be a positive number, got {value!r}")
    return float(value)


def _fit(name: str, points: np.ndarray[Any, np.dtype[np.float64]], provenance: str) -> LinkFit:
    size, seconds = points[:, 0], points[:, 1]
    latency = 0.0
    slope = float(np.mean(seconds / size))
    if len(set(size.tolist())) > 1:
        matrix = np.stack([1 / seconds, size / seconds], axis=1)
        (latency, slope), *_ = np.linalg.lstsq(matrix, np.ones(len(size)), rcond=None)
        if latency < 0 or slope <= 0:
            latency, slope = 0.0, float(np.mean(seconds / size))
    error = np.median(np.abs((latency + slope * size) / seconds - 1))
    return LinkFit(name, 1 / float(slope), float(latency), float(error), len(size), provenance)


def dump_links(fits: list[LinkFit]) -> list[dict[str, Any]]:
    """JSON types of the fits."""
    return [asdict(fit) for fit in fits]
