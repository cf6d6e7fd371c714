"""Links and step times of a plan or a problem by the names of measured ones, which are in a calibration file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetkv.costmodel.calibration_file import load_links
from hetkv.costmodel.measured_steps import MeasuredSteps, load_steps
from hetkv.errors import InputError

if TYPE_CHECKING:
    from hetkv.simulator.deployment import PoolPlan


def with_measured_link(document: Any, folder: Path, origin: str) -> Any:
    """`document` with `gb_s` and `latency_us` in place of `link: measured`.

    The name is that of `hetkv calibrate --bench`; the file is one of `calibration`, which count from `folder`. Raises
    `InputError` where the name is not there, or where `gb_s` or `latency_us` is given as well.
    """
    link = document.get("link") if isinstance(document, Mapping) else None
    if not isinstance(link, Mapping) or "measured" not in link:
        return document
    for field in ("gb_s", "latency_us"):
        if field in link:
            raise InputError(f"{origin}: link: give `measured` or `{field}`, not both")
    files = document.get("calibration")
    links = load_links(folder / str(each) for each in files) if isinstance(files, list) else {}
    found = links.get(str(link["measured"]))
    if found is None:
        known = ", ".join(sorted(links)) or "none: name files of `hetkv calibrate --bench` in `calibration`"
        raise InputError(f"{origin}: link: unknown `measured` link {link['measured']!r}; known are {known}")
    own = {name: value for name, value in link.items() if name != "measured"}
    values = {"gb_s": found.bytes_per_second / 1e9, "latency_us": found.latency_s * 1e6}
    return {**document, "link": {**own, **values}}


def measured_steps(files: Iterable[str], pool: PoolPlan) -> MeasuredSteps:
    """The steps that a pool names. `InputError` where they are in no calibration file, or cannot be used."""
    known = load_steps(files)
    fit = known.get(str(pool.steps))
    if fit is None:
        names = ", ".join(sorted(known)) or "none: name files of `hetkv calibrate --bench` in `calibration`"
        raise InputError(f"unknown measured `steps` {pool.steps!r}; known are {names}")
    if pool.kv_tokens is None:
        raise InputError("`steps` needs `kv_tokens`: nothing else says how much memory there is for KV")
    if pool.dp > 1 or pool.pp > 1:
        raise InputError("`steps` are of an instance without pipeline stages and replicas")
    return MeasuredSteps(fit, pool.kv_tokens)
