"""Prefill in one engine, decode in another, and how the tokens compare with those of the decode engine alone."""

from __future__ import annotations

import secrets
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import msgspec
import numpy as np

from hetkv.errors import InputError
from hetkv.integrations.instance import Generated
from hetkv.integrations.process import EngineProcess
from hetkv.integrations.sampling import divergence
from hetkv.integrations.worker import ENGINES, Start

Rendezvous = Literal["concurrent", "prefill_first"]


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """How an engine is started."""

    engine: str | None = None
    """Its name in `hetkv.integrations.worker.ENGINES` (default: the side's own)."""
    python: str = sys.executable
    """An interpreter that has it."""
    options: dict[str, Any] = {}
    """Of the engine's class."""


class RequestComparison(msgspec.Struct, kw_only=True):
    """One prompt through a pair. Times are milliseconds."""

    prompt_tokens: int
    tokens: list[int]
    alone: list[int]
    """What the decode engine generates without a transfer."""
    first_difference: int | None
    """Number of the first token that differs; null: none does."""
    kl: float | None
    """Of the pair's next-token distribution against the decode engine's own, the largest of the first tokens for which
    both have seen the same ones; null: none was asked for."""
    ttft_ms: float
    """From the start of the prefill until the first token is chosen and all KV is in the decode engine's pool."""
    prefill_ms: float
    alone_ms: float
    """The decode engine's own prefill: its TTFT without another one."""


class PairResult(msgspec.Struct, kw_only=True):
    """All prompts through one ordered pair."""

    prefill: str
    decode: str
    requests: list[RequestComparison]

    @property
    def identical(self) -> int:
        """Requests whose tokens are all those of the decode engine alone."""
        return sum(request.first_difference is None for request in self.requests)

    @property
    def kl(self) -> float | None:
        """The largest of all requests'."""
        return max((request.kl for request in self.requests if request.kl is not None), default=None)

    def median(self, name: str) -> float:
        """Of a time of `RequestComparison`."""
        return float(statistics.median(getattr(request, name) for request in self.requests))


@contextmanager
def engines(
    model: str,
    sides: Mapping[str, Side],
    pairs: Sequence[tuple[str, str]],
    room: Mapping[str, Any],
    secret: bytes | None = None,
) -> Iterator[dict[str, EngineProcess]]:
    """Processes of all sides that the pairs name, loaded. `room`: options for all, such as `capacity`; `secret`: what
    they share (default: a new one). Raises `HetkvError`.
    """
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    kinds = {name: (sides[name].engine if name in sides else None) or name for name in names}
    unknown = [kind for kind in kinds.values() if kind not in ENGINES]
    if unknown:
        raise InputError(f"engine {unknown[0]!r} is not known; known are {', '.join(ENGINES)}")
    secret = secret or secrets.token_hex(32).encode()  # text: a secret file is read without white space at its ends
    with ExitStack() as stack:
        processes = {}
        for name in names:
            side = sides.get(name, Side())
            options = {**room, **side.options}
            start = Start(engine=kinds[name], model=model, instance=name, secret=secret, options=options)
            processes[name] = EngineProcess(start, python=side.python)
            stack.callback(processes[name].close)
        for process in processes.values():
            process.ready()
        yield processes


class Pairs:
    """Runs prompts through pairs of processes; links them, and asks engines what they say alone, once each."""

    def __init__(self, processes: Mapping[str, EngineProcess], max_new_tokens: int, distributions: int = 0) -> None:
        self._processes = processes
        self._tokens, self._distributions = max_new_tokens, distributions
        self._addresses: dict[str, str] = {}
        self._linked: set[tuple[str, str]] = set()
        self._alone: dict[tuple[str, tuple[int, ...]], Generated] = {}
        self._count = 0

    def run(
        self, prefill: str, decode: str, prompts: Sequence[list[int]], rendezvous: Rendezvous = "concurrent"
    ) -> PairResult:
        """All prompts, one after another. Raises what the engines raise."""
        self._link(prefill, decode)
        requests = [self._request(prefill, decode, prompt, rendezvous) for prompt in prompts]
        return PairResult(prefill=prefill, decode=decode, requests=requests)

    def alone(self, engine: str, prompt: list[int]) -> Generated:
        """What an engine generates without another one."""
        key = engine, tuple(prompt)
        if key not in self._alone:
            self._alone[key] = self._processes[engine].call(
                "generate", tokens=prompt, max_new_tokens=self._tokens, distributions=self._distributions
            )
        return self._alone[key]

    def _link(self, prefill: str, decode: str) -> None:
        if (prefill, decode) in self._linked:
            return
        if prefill not in self._addresses:
            self._addresses[prefill] = self._processes[prefill].call("listen")
        self._processes[decode].call("connect", source=prefill, addresses=[self._addresses[prefill]])
        self._linked.add((prefill, decode))

    def _request(self, prefill: str, decode: str, prompt: list[int], rendezvous: Rendezvous) -> RequestComparison:
        source, destination, alone = self._processes[prefill], self._processes[decode], self.alone(decode, prompt)
        self._count += 1
        name = f"{prefill}-{decode}-{self._count}"
        accept = {"request_id": name, "source": prefill, "tokens": prompt, "max_new_tokens": self._tokens}
        if rendezvous == "concurrent":
            destination.call("accept", **accept)
        first: Generated = source.call("prefill", request_id=name, tokens=prompt)
        if rendezvous == "prefill_first":
            destination.call("accept", **accept)
        decoded: Generated = destination.call(
            "decode",
            request_id=name,
            max_new_tokens=self._tokens,
            distributions=self._distributions,
        )
        source.call("finish", request_id=name)
        differences = [i for i, (a, b) in enumerate(zip(decoded.tokens, alone.tokens, strict=True)) if a != b]
        return RequestComparison(
            prompt_tokens=len(prompt),
            tokens=decoded.tokens,
            alone=alone.tokens,
            first_difference=differences[0] if differences else None,
            kl=_kl(decoded, alone, differences[0] if differences else self._tokens),
            ttft_ms=(max(decoded.first_ns, first.first_ns) - first.start_ns) / 1e6,
            prefill_ms=(first.first_ns - first.start_ns) / 1e6,
            alone_ms=(alone.first_ns - alone.start_ns) / 1e6,
        )


def _kl(pair: Generated, alone: Generated, same: int) -> float | None:
    """Up to and with the token where the two part: until then both have seen the same ones."""
    both = list(zip(pair.distributions, alone.distributions, strict=False))[: same + 1]
    found = [divergence(np.array(p), np.array(q)) for p, q in both if p is not None and q is not None]
    return max(found, default=None)
