"""What each step of an engine computed, and how long it took: `StepLog`, for `hetkv calibrate --bench`."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class StepRow(NamedTuple):
    """One step. Its `seconds` begin where the step before it ended, or, after a pause, when something to do came."""

    end: float
    """Seconds since the epoch."""
    seconds: float
    decoding: int
    """Sequences that got one token."""
    context: int
    """Tokens that these had in their KV before it."""
    prompt: int
    """Tokens of prompts."""
    pairs: float
    """(query, key) pairs of these under causal attention."""


class StepLog:
    """Writes rows to a CSV file, a line each, as they come. One thread may use it."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8", buffering=1)
        self._file.write(",".join(StepRow._fields) + "\n")
        self._begin = 0.0

    def begin(self) -> None:
        """Something to do has come after a pause."""
        self._begin = time.monotonic()

    def end(self, decodes: Iterable[int], prompts: Iterable[tuple[int, int]]) -> None:
        """A step has ended. `decodes`: tokens in the KV of each sequence that decoded; `prompts`: (start, stop)."""
        contexts, now = list(decodes), time.monotonic()
        prompt, pairs = 0, 0.0
        for start, stop in prompts:
            count = stop - start
            prompt += count
            pairs += count * start + count * (count + 1) / 2
        row = StepRow(time.time(), now - self._begin, len(contexts), sum(contexts), prompt, pairs)
        self._file.write(f"{row.end:.6f},{row.seconds:.7f},{row.decoding},{row.context},{row.prompt},{row.pairs:.0f}\n")
        self._begin = now
