"""mypy's stubtest of the extension."""

from __future__ import annotations

import sys

from mypy.stubtest import main

import hetkv.core  # noqa: F401

if __name__ == "__main__":
    sys.argv = ["stubtest", "hetkv._core", *sys.argv[1:]]
    raise SystemExit(main())
