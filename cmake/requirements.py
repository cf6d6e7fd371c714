"""The requirements of the package that is being built: always NumPy and msgspec, and UCX where the host has none.

`HETKV_UCX_WHEEL` names the package that brings UCX (`libucx-cu13`, `libucx-cu12`), or is `none`. Where it is not set, a
host that has a system UCX which is new enough (`hetkv/ucx.py`) needs no package, and every other host gets
`libucx-cu13`, which works without a GPU, too. A wheel for other hosts is built with it set (`make wheel`).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

BASE = ["msgspec>=0.19", "numpy>=1.26"]
CHOICES = {"none": [], "libucx-cu12": ["libucx-cu12>=1.18"], "libucx-cu13": ["libucx-cu13>=1.18"]}


def dynamic_metadata(field: str, settings: dict[str, Any] | None = None) -> list[str]:
    """What scikit-build-core asks a provider: the value of `field`."""
    if field != "dependencies" or settings:
        raise RuntimeError("this provides `dependencies`, without settings")
    given = os.environ.get("HETKV_UCX_WHEEL")
    if given is None:
        given = "none" if _has_system_ucx() else "libucx-cu13"
    if given not in CHOICES:
        raise RuntimeError(f"HETKV_UCX_WHEEL={given}: one of {', '.join(CHOICES)}")
    return BASE + CHOICES[given]


def _has_system_ucx() -> bool:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    try:
        from hetkv.ucx import system_installations
    finally:
        sys.path.pop(0)
    return bool(system_installations([]))
