"""A link of a plan or a problem by the name of a measured one: `link: {measured: NAME}` and a calibration file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hetkv.costmodel.calibration_file import load_links
from hetkv.errors import InputError


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
