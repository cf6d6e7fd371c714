"""The GPU backends: shared objects `libhetkv_<vendor>.so` in this folder, loaded when they are first asked for.

A host without a GPU, or a build without a vendor's compiler, has none, and everything else works as before.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Backend(NamedTuple):
    """One vendor's backend on this host."""

    name: str
    devices: int
    """How many devices it has; 0 where it cannot be used."""
    why: str
    """Why it cannot be used; empty where it can."""


@cache
def backends() -> dict[str, Backend]:
    """All backends by name (`cuda`, `hip`), those that cannot be used too.

    The first call initialises the vendors' runtimes, after which the process must not fork and go on using them.
    `HETKV_BACKENDS` names another folder to look in.
    """
    from hetkv.core import core

    folder = os.environ.get("HETKV_BACKENDS") or str(Path(__file__).parent)
    return {name: Backend(name, devices, why) for name, devices, why in core.load_backends(folder)}
