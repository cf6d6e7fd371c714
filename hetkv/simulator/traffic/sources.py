"""Traffic as options, so that it can be swept over and sent to other processes."""

from __future__ import annotations

import msgspec

from hetkv.errors import InputError
from hetkv.simulator.traffic.lengths import parse_lengths
from hetkv.simulator.traffic.trace import Trace
from hetkv.simulator.traffic.workload import ClosedLoop, Synthetic, Workload


class Traffic(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The options of `hetkv simulate` that say who arrives when. One of `trace`, `rate` and `clients` is given."""

    trace: str | None = None
    speedup: float = 1.0
    rate: float | None = None
    clients: int | None = None
    think_s: float = 0.0
    arrivals: str = "poisson"
    cv: float = 2.0
    prompt_tokens: str = "1024"
    output_tokens: str = "256"
    requests: int | None = None
    duration: float | None = None

    def build(self) -> Workload:
        """The workload. Wrong values are an `InputError`; a trace file is read here."""
        if sum(given is not None for given in (self.trace, self.rate, self.clients)) != 1:
            raise InputError("give one of --trace, --rate and --clients")
        if self.clients is None and self.think_s:
            raise InputError("--think is for --clients")
        if self.rate is None and self.duration is not None:
            raise InputError("--duration is for --rate; limit a trace or clients with --requests")
        if self.trace is not None:
            return Trace(self.trace, self.speedup, self.requests)
        requests = self.requests
        if requests is None and self.duration is None:
            requests = 10_000
        prompts = parse_lengths(self.prompt_tokens, "--prompt-tokens")
        outputs = parse_lengths(self.output_tokens, "--output-tokens")
        if self.clients is not None:
            assert requests is not None
            return ClosedLoop(self.clients, self.think_s, prompts, outputs, requests)
        assert self.rate is not None
        return Synthetic(
            rate=self.rate,
            prompts=prompts,
            outputs=outputs,
            count=requests,
            duration=self.duration,
            arrivals=self.arrivals,
            cv=self.cv,
        )
