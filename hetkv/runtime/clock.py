"""When pieces of work ended, on the host or on a GPU that runs asynchronously: `WorkClock`."""

from __future__ import annotations

import time

import torch


class WorkClock:
    """Marks points in the order of the work that is issued on a device; none of them waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[int | torch.cuda.Event] = []
        self.start_ns = time.monotonic_ns()
        """CLOCK_MONOTONIC, when the clock was made; a device must be idle then."""
        self._begin = self._event() if device.type == "cuda" else None

    def mark(self) -> int:
        """The end of what has been issued so far; its number in `times`."""
        self._marks.append(time.monotonic_ns() if self._begin is None else self._event())
        return len(self._marks) - 1

    def times(self) -> list[int]:
        """When each marked point was reached, in ns of CLOCK_MONOTONIC. Waits for the last."""
        if self._begin is None:
            return [mark for mark in self._marks if isinstance(mark, int)]
        torch.cuda.synchronize(self._device)
        events = [mark for mark in self._marks if not isinstance(mark, int)]
        return [self.start_ns + round(1e6 * self._begin.elapsed_time(event)) for event in events]

    def _event(self) -> torch.cuda.Event:
        event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event
