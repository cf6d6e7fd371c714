"""RDMA through UCX: whether this host has it, and the engine's settings for it."""

from __future__ import annotations

import logging

from hetkv.errors import BuildError

log = logging.getLogger("hetkv.transport")


def rma_transports() -> str:
    """UCX's transports for puts, with UCX loaded; empty where this host has no RDMA device or no UCX for it."""
    from hetkv import ucx
    from hetkv.core import core

    if not ucx.has_rdma_devices():
        return ""
    try:
        found = ucx.load()
    except BuildError as error:
        log.warning("this host has RDMA devices, but no UCX that can use them: %s", error)
        return ""
    if not found.has_verbs:
        log.warning("this host has RDMA devices, but the UCX of %s, %s, has no verbs", found.origin, found.path)
        return ""
    core.load_ucx(str(found.path))
    transports: str = core.RMA_TRANSPORTS
    return transports
