"""Traffic as options, so that it can be swept over and sent to other processes."""

from __future__ import annotations

import msgspec

from hetkv.errors import InputError
from hetkv.simulator.traffic.lengths import parse_lengths
from hetkv.simulator.traffic.trace import Trace
from hetkv.simulator.traffic.workload import Synthetic, Workload


class Traffic(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The options of `hetkv simulate` that say who arrives when. Either `trace` or `rate` is given."""

    trace: str | None = None
    speedup: float = 1.0
    rate: float | None = None
    arrivals: str = "poisson"
    cv: float = 2.0
    prompt_tokens: str = "1024"
    output_tokens: str = "256"
    requests: int | None = None
    duration: float | None = None

    def build(self) -> Workload:
        """The workload. Wrong values are an `InputError`; a trace file is read here."""
        if (self.trace is None) == (self.rate is None):
            raise InputError("give either --trace or --rate")
        if self.trace is not None:
            if self.duration is not None:
                raise InputError("--duration is for --rate; shorten a trace with --requests")
            return Trace(self.trace, self.speedup, self.requests)
        assert self.rate is not None
        requests = self.requests
        if requests is None and self.duration is None:
            requests = 10_000
        return Synthetic(
            rate=self.rate,
            prompts=parse_lengths(self.prompt_tokens, "--prompt-tokens"),
            outputs=parse_lengths(self.output_tokens, "--output-tokens"),
            count=requests,
            duration=self.duration,
            arrivals=self.arrivals,
            cv=self.cv,
        )
