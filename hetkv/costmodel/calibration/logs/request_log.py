"""Request logs: JSON lines with lengths and times of each request; periods and prompts are reconstructed from them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetkv.costmodel.calibration.logs.observations import Observation, Period, Prompt
from hetkv.errors import InputError

FIELDS: dict[str, tuple[str, ...]] = {
    "prompt": ("input_toks", "prompt_tokens", "input_tokens", "num_prompt_tokens"),
    "output": ("output_toks", "completion_tokens", "output_tokens", "num_generation_tokens"),
    "queued": ("queued_ts", "queued_time", "arrival_time", "arrival"),
    "scheduled": ("scheduled_ts", "first_scheduled_time", "scheduled_time"),
    "first": ("first_token_ts", "first_token_time"),
    "last": ("last_token_ts", "last_token_time", "finished_time"),
}
PERIODS = 20
"""A log is cut into this many periods of equal length; the fit needs 5 to 20 points."""
QUEUE_S = 0.005
"""A request that was scheduled later than this after it was queued has waited; its prompt gives no prefill time."""

LEAST_STEPS = 20
"""A period of fewer steps is left out."""

Times = NDArray[np.float64]


@dataclass(frozen=True)
class RequestLog:
    """Columns of requests; times are seconds on one clock. `ended`: those whose last token is known."""

    prompt: Times
    output: Times
    queued: Times
    scheduled: Times
    first: Times
    last: Times
    ended: NDArray[np.bool_]

    def known_by(self, horizon: float) -> RequestLog:
        """What was known at `horizon`: requests that had their first token by then.

        Of one that had not ended, neither its last token nor its length is used: it gets `horizon` as its end, and as
        many tokens as the ended ones emit in that time.
        """
        begun, ended = self.first <= horizon, self.last <= horizon
        spent = float((self.last - self.first)[ended].sum())
        rate = float((self.output - 1)[ended].sum()) / spent if spent > 0 else 0.0
        last = np.minimum(self.last, horizon)
        output = np.where(ended, self.output, 1 + rate * (last - self.first))
        times = (self.prompt, output, self.queued, self.scheduled, self.first, last)
        prompt, output, queued, scheduled, first, last = (column[begun] for column in times)
        return RequestLog(prompt, output, queued, scheduled, first, last, ended[begun])


def looks_like(text: str) -> bool:
    first = text.lstrip().split("\n", 1)[0]
    return first.startswith("{") and any(f'"{name}"' in first for name in FIELDS["first"])


def parse(text: str, origin: str) -> RequestLog:
    """Read JSON lines; errors name the line and the field. `scheduled` may be missing: then it is `queued`."""
    rows: list[dict[str, float]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{origin}:{number}: not JSON: {error}") from None
        if not isinstance(raw, dict):
            raise InputError(f"{origin}:{number}: expected an object for each request")
        rows.append({name: _field(raw, name, f"{origin}:{number}") for name in FIELDS})
    rows.sort(key=lambda row: row["queued"])
    prompt, output, queued, scheduled, first, last = (np.array([row[name] for row in rows]) for name in FIELDS)
    log = RequestLog(prompt, output, queued, scheduled, first, last, np.full(len(rows), True))
    if not (np.all(log.queued <= log.first) and np.all(log.first <= log.last)):
        raise InputError(f"{origin}: a request has its first token before it was queued, or after its last one")
    return log


def _field(raw: dict[str, Any], name: str, where: str) -> float:
    names = FIELDS[name] + (FIELDS["queued"] if name == "scheduled" else ())
    for each in names:
        value = raw.get(each)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise InputError(f"{where}: `{each}` must be a number of 0 or more, got {value!r}")
        return float(value)
    raise InputError(f"{where}: missing field `{names[0]}` (or {', '.join(names[1:])})")


def observations(log: RequestLog, horizon: float | None = None) -> list[Observation]:
    """Periods of equal length, and prompts that started at once. Nothing after `horizon` (same clock) is used."""
    end = float(log.last.max()) if horizon is None else min(horizon, float(log.last.max()))
    known = log.known_by(end)
    if not known.ended.any():
        return []
    edges = np.linspace(float(known.scheduled.min()), end, PERIODS + 1)
    periods = [_period(known, low, high) for low, high in pairwise(edges)]
    return [w for w in periods if w.running >= 0.5 and w.output >= LEAST_STEPS * w.running] + _prompts(known)


def _prompts(log: RequestLog) -> list[Observation]:
    """Prompts that did not wait and that ran without another prompt, at most `PERIODS` of them."""
    found: list[Observation] = []
    for i in np.nonzero(log.scheduled - log.queued <= QUEUE_S)[0]:
        overlapping = (log.scheduled < log.first[i]) & (log.first > log.scheduled[i])
        if overlapping.sum() == 1:
            running, context = _state(log, float(log.scheduled[i]))
            found.append(Prompt(float(log.first[i] - log.scheduled[i]), float(log.prompt[i]), running, context))
    return found[:: -(-len(found) // PERIODS)] if found else []


def _period(log: RequestLog, low: float, high: float) -> Period:
    """What ran between two times. A request emits its tokens evenly between its first and its last one.

    The number of steps comes from the requests that have ended; all that run take part in each.
    """
    span = np.maximum(log.last - log.first, 1e-9)
    begin, finish = np.maximum(log.first, low), np.minimum(log.last, high)
    inside = np.maximum(0.0, finish - begin)
    pace = (log.output - 1) / span
    timed = float(inside[log.ended].sum())
    middle = log.prompt + 1 + pace * ((begin + finish) / 2 - log.first)
    filling = np.maximum(log.first - log.scheduled, 1e-9)
    share = np.maximum(0.0, np.minimum(log.first, high) - np.maximum(log.scheduled, low)) / filling
    seconds = high - low
    return Period(
        seconds=seconds,
        running=float(inside.sum() / seconds),
        context=float((inside * middle).sum() / seconds),
        output=float((pace * inside)[log.ended].sum() / timed * inside.sum()) if timed > 0 else 0.0,
        prompt=float((share * log.prompt).sum()),
        prompts=float(share.sum()),
    )


def _state(log: RequestLog, at: float) -> tuple[float, float]:
    """Sequences that decode at a time, and the tokens they hold."""
    live = (log.first <= at) & (at < log.last)
    part = (at - log.first[live]) / (log.last[live] - log.first[live])
    return float(live.sum()), float((log.prompt[live] + 1 + part * (log.output[live] - 1)).sum())
