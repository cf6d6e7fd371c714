"""The GPU backends: shared objects `libhetkv_cuda13.so`, `libhetkv_cuda12.so`, `libhetkv_hip.so`, loaded when they are
first asked for; of CUDA's the first that the driver runs.

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


def folder() -> str:
    """Where the shared objects are: `backends/` next to the extension, which an editable install keeps away from the
    sources; or the folder that `HETKV_BACKENDS` names."""
    from hetkv.core import core

    return os.environ.get("HETKV_BACKENDS") or str(Path(core.__file__).parent / "backends")


@cache
def backends() -> dict[str, Backend]:
    """All backends by name (`cuda`, `hip`), those that cannot be used too.

    The first call initialises the vendors' runtimes, after which the process must not fork and go on using them.
    """
    from hetkv.core import core

    return {name: Backend(name, devices, why) for name, devices, why in core.load_backends(folder())}
