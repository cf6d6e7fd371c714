"""What is kept of each request: one number per column, appended when it ends."""

from __future__ import annotations

from array import array

import numpy as np
from numpy.typing import NDArray

from hetkv.simulator.request import Request

TIMES = ("arrival", "scheduled", "first_token", "prefilled", "visible", "decode_from", "last_token")
COUNTS = ("id", "prompt", "output", "generated", "cached", "preemptions", "restarts")


class Records:
    """Columns of the requests that ended, in the order in which they did. Times are simulated seconds."""

    def __init__(self) -> None:
        self._times = [array("d") for _ in TIMES]
        self._counts = [array("q") for _ in COUNTS]
        self._status = array("b")

    def __len__(self) -> int:
        return len(self._status)

    def add(self, request: Request, status: int) -> None:
        """Keep an ended request. `status` is `FINISHED`, `REJECTED` or `FAILED`."""
        self._status.append(status)
        arrival, scheduled, first, prefilled, visible, decode_from, last = self._times
        arrival.append(request.arrival)
        scheduled.append(request.scheduled)
        first.append(request.first_token)
        prefilled.append(request.prefilled)
        visible.append(request.visible)
        decode_from.append(request.decode_from)
        last.append(request.last_token)
        number, prompt, output, generated, cached, preemptions, restarts = self._counts
        number.append(request.id)
        prompt.append(request.prompt)
        output.append(request.output)
        generated.append(request.generated)
        cached.append(request.cached)
        preemptions.append(request.preemptions)
        restarts.append(request.restarts)

    def columns(self) -> dict[str, NDArray[np.generic]]:
        """Name to column, sorted by request id."""
        order = np.argsort(np.frombuffer(self._counts[0], dtype=np.int64), kind="stable") if len(self) else slice(0)
        found: dict[str, NDArray[np.generic]] = {}
        for name, values in zip(TIMES, self._times, strict=True):
            found[name] = np.array(values, dtype=np.float64)[order]
        for name, counts in zip(COUNTS, self._counts, strict=True):
            found[name] = np.array(counts, dtype=np.int64)[order]
        found["status"] = np.array(self._status, dtype=np.int8)[order]
        return found
