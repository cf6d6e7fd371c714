"""Link constants from the JSON of `hetkv bench`: time of a transfer as latency plus bytes over bandwidth."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hetkv.costmodel.transfer import Link
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


def from_bench_json(path: Path) -> list[LinkFit]:
    """One fit for each `case` of a benchmark's `results`.

    Each result has `case`, `bytes`, and `seconds` or `gb_s` (1e9 bytes a second). Sizes that differ give latency and
    bandwidth; a single size gives bandwidth alone. Errors name the file, the result and the field.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(document, dict) or not isinstance(document.get("results"), list) or not document["results"]:
        raise InputError(f"{path}: expected the JSON of `hetkv bench`, an object with a list `results`")
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for index, result in enumerate(document["results"]):
        where = f"{path}: results[{index}]"
        if not isinstance(result, dict) or not isinstance(result.get("case"), str):
            raise InputError(f"{where}: missing field `case`")
        size = _positive(result, "bytes", where)
        if "seconds" in result:
            groups[result["case"]].append((size, _positive(result, "seconds", where)))
        else:
            groups[result["case"]].append((size, size / (_positive(result, "gb_s", where) * 1e9)))
    device = document.get("device") or (document.get("environment") or {}).get("device") or "device not recorded"
    text = f"{path.name}: {device}, commit {document.get('commit') or 'not recorded'}"
    return [_fit(name, np.array(points), text) for name, points in sorted(groups.items())]


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
