"""Loads the extension. Everything else says `from hetkv.core import core`."""

from __future__ import annotations

from hetkv.errors import BuildError

try:
    import hetkv._core as core
except ImportError as error:
    raise BuildError(f"the extension cannot be loaded ({error}): build it with `make build`") from None

__all__ = ["core"]
