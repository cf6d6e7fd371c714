"""What the scheduler knows of one instance: `Member`, a candidate of the simulator's `Router`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from hetkv.runtime.commands import Load, Report
from hetkv.serve.generation import Generation
from hetkv.serve.messages import Hello, Role, ToInstance

ASSUMED_PROMPT_TOKEN_S = 1e-4
"""Until an instance has measured its own."""


class MemberPool:
    """Implements the router's `PoolFacts`: instances of one kind, which share the speed that they measure.

    With a speed for each, a request would go to the one that happened to measure the better one, whatever it has to do.
    """

    def __init__(self, hello: Hello) -> None:
        self.kind = (hello.pool, hello.gpu, hello.device, hello.tp, hello.pp, hello.max_num_seqs, hello.weight)
        self.name = repr(self.kind)
        self.weight = hello.weight
        self.max_num_seqs = hello.max_num_seqs
        self.seconds_per_prompt_token = ASSUMED_PROMPT_TOKEN_S
        self._measured: dict[str, float] = {}

    def measured(self, instance: str, seconds: float) -> None:
        """What an instance says; 0: it has computed nothing yet."""
        if seconds:
            self._measured[instance] = seconds
            self._average()

    def forget(self, instance: str) -> None:
        """It has gone, and its speed with it."""
        if self._measured.pop(instance, None):
            self._average()

    def _average(self) -> None:
        if self._measured:
            self.seconds_per_prompt_token = sum(self._measured.values()) / len(self._measured)


class MemberBlocks:
    """Implements the router's `Blocks`: as the instance last reported them."""

    def __init__(self, hello: Hello) -> None:
        self.total = self.available = hello.blocks
        self.block_size = hello.block_size
        self.hash_tokens = hello.unit
        self.hashes: set[int] = set()

    def match(self, hashes: tuple[int, ...], tokens: int) -> int:
        """How many leading hashes are there, at least one of the `tokens` left to compute."""
        limit = min(len(hashes), (tokens - 1) // self.hash_tokens)
        return next((i for i in range(limit) if hashes[i] not in self.hashes), limit)


class Member:
    """Counts what is there and bound for it itself, at once; the rest is what the instance reports."""

    def __init__(self, hello: Hello, send: Callable[[ToInstance], None]) -> None:
        self.hello, self.send = hello, send
        self.name = hello.name
        self.role: Role = hello.role
        self.wanted: Role = hello.role
        """What it will be once it is linked to those that then matter."""
        self.up = False
        """Linked to all it needs, so that it gets requests."""
        self.leaving = False
        self.pool, self.kv = MemberPool(hello), MemberBlocks(hello)
        self.load = Load(0, 0, 0, 0, 0, hello.blocks, 0, 0, 0, 0.0, 0.0)
        self.requests = self.prompt_tokens = self.coming_tokens = 0
        self.generations: dict[str, Generation] = {}
        self.links: dict[str, bool] = {}
        """Instances that its KV comes from; False while the link is made."""
        self.heard = time.monotonic()
        self.joined = time.time()
        self._changed: dict[Any, None] = {}

    def report_to(self, changed: dict[Any, None]) -> None:
        """See `Candidate` of the router."""
        self._changed = changed

    @property
    def available(self) -> int:
        """KV blocks that can be taken there, by its last report."""
        return self.kv.available

    def count(self, requests: int = 0, prompt_tokens: int = 0, coming_tokens: int = 0) -> None:
        """Of what is there or bound for it."""
        self.requests += requests
        self.prompt_tokens += prompt_tokens
        self.coming_tokens += coming_tokens
        self._changed[self] = None

    def set_up(self, up: bool) -> None:
        """Whether it gets requests."""
        self.up = up
        self._changed[self] = None

    def take(self, report: Report) -> None:
        """What the instance says of its load and its cache."""
        self.load = report.load
        self.kv.available = report.load.free_blocks
        if report.reset:
            self.kv.hashes.clear()
        self.kv.hashes.difference_update(report.gone)
        self.kv.hashes.update(report.came)
        self.pool.measured(self.name, report.load.prompt_token_s)

    def free_for_more(self) -> bool:
        """Whether it would begin with another prompt at once."""
        return not self.load.waiting and self.requests < self.hello.max_num_seqs and self.prompt_tokens == 0

    def __repr__(self) -> str:
        return f"Member({self.name!r}, {self.role}, {self.requests} requests)"
