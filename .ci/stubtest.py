"""mypy's stubtest of the extension, in a process that has loaded its UCX."""

from __future__ import annotations

import sys

import hetkv.core  # noqa: F401
from mypy.stubtest import main

if __name__ == "__main__":
    sys.argv = ["stubtest", "hetkv._core", *sys.argv[1:]]
    raise SystemExit(main())
