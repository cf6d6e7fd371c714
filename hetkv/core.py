"""Loads UCX and the extension. Everything else says `from hetkv.core import core`."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hetkv.errors import BuildError

if TYPE_CHECKING:
    from collections.abc import Iterator

# UCX reads these once, when it is loaded. Its errors reach the caller as exceptions, so it need not print them; and its
# crash handlers would replace those of the engine that imports hetkv.
_QUIET = {"UCX_LOG_LEVEL": "fatal", "UCX_HANDLE_ERRORS": "none"}


@contextmanager
def _defaults() -> Iterator[None]:
    """The quiet settings for those that the user has not set, gone again from the environment afterwards."""
    added = {name: value for name, value in _QUIET.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


with _defaults():
    try:
        import libucx
    except ImportError:  # built against a system UCX, which the linker finds
        pass
    else:
        libucx.load_library()
    try:
        from hetkv import _core as core
    except ImportError as error:
        raise BuildError(f"the extension cannot be loaded ({error}): run `make build`, or install UCX") from None

__all__ = ["core"]
