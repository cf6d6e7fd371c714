"""Workers that wait without spinning while an engine only holds blocks for a consumer.

vLLM's engine goes on stepping while anything is held, so that it notices the end. Between two of these steps its worker
spins on the shared-memory queue of `vllm.distributed.device_communicators.shm_broadcast`: it begins to block only a
second after the last message, which never comes to pass. Here it blocks at once while a step has nothing to do.
"""

from __future__ import annotations

import logging
import time
from typing import Any

_log = logging.getLogger(__name__)
LONGEST_MS = 50
"""Of one wait, so that a notification which is lost costs no more."""
_state = {"quiet": False}


def set_quiet(quiet: bool) -> None:
    """Whether this process's worker has nothing to do but wait."""
    _state["quiet"] = quiet


def block_while_quiet() -> None:
    """Let the queue's readers of this process block while `set_quiet`. Says so where vLLM's queue is not as known."""
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    spinning: Any = getattr(SpinCondition, "wait", None)
    if spinning is None or getattr(spinning, "hetkv", False):
        if spinning is None:
            _log.warning("vLLM's SpinCondition has no wait: workers spin while blocks are held for a consumer")
        return

    def wait(self: Any, timeout_ms: int | None = None) -> None:
        since = time.monotonic() - self.last_read
        if not _state["quiet"] or since > self.busy_loop_s:
            spinning(self, timeout_ms)
            return
        kept, self.busy_loop_s = self.busy_loop_s, -1.0
        try:
            spinning(self, LONGEST_MS if timeout_ms is None else min(timeout_ms, LONGEST_MS))
        finally:
            self.busy_loop_s = kept

    wait.hetkv = True  # type: ignore[attr-defined]
    SpinCondition.wait = wait
