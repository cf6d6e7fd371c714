"""Which instance gets a request: here, and in the global scheduler of a running deployment (`hetkv.serve`).

Instances of one pool differ in their load alone, so each pool keeps a heap of loads and only its head is looked at.
An instance whose load has fallen is entered again when the next request comes, one whose load has risen when its entry
comes to the head. With a prefix to match, and where more than one number is the load, all instances are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush, heapreplace
from typing import Any, Generic, Protocol, TypeVar

BALANCED = "balanced"
CENTRAL_QUEUE = "central_queue"
JOIN_SHORTEST_QUEUE = "join_shortest_queue"
LEAST_LOADED = "least_loaded"
PREFIX_AWARE = "prefix_aware"
ROUND_ROBIN = "round_robin"
WEIGHTED = "weighted"

DISCIPLINES = {
    BALANCED: "prompts as prefix_aware; for decode, the least share taken of places, KV blocks and link, together",
    CENTRAL_QUEUE: "one queue for all; an instance takes from its head when it can run it",
    JOIN_SHORTEST_QUEUE: "the instance with the fewest requests",
    LEAST_LOADED: "the least time for the prompts in line; for decode, the fewest requests per KV block",
    PREFIX_AWARE: "the instance that has the least to compute: prompts in line, and this one less its cached prefix",
    ROUND_ROBIN: "each in turn",
    WEIGHTED: "the instance with the fewest requests for the weight of its pool",
}


class Routed(Protocol):
    """What the router sees of a request. Lengths are tokens."""

    @property
    def target(self) -> int:
        """Tokens to compute."""

    @property
    def hashes(self) -> tuple[int, ...] | None:
        """Of its prefixes."""


class PoolFacts(Protocol):
    """What instances of one pool have in common."""

    name: str
    weight: float
    max_num_seqs: int
    seconds_per_prompt_token: float


class Blocks(Protocol):
    """What the router sees of an instance's KV memory. `hash_tokens` 0: it caches no prefixes."""

    @property
    def total(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def hash_tokens(self) -> int: ...
    def match(self, hashes: tuple[int, ...], tokens: int) -> int:
        """How many leading hashes are there, at least one of the `tokens` left to compute."""


class Candidate(Protocol):
    """What the router sees of an instance, simulated or real."""

    @property
    def up(self) -> bool: ...
    @property
    def pool(self) -> PoolFacts: ...
    @property
    def kv(self) -> Blocks: ...
    @property
    def requests(self) -> int:
        """Those there or bound for it."""

    @property
    def prompt_tokens(self) -> int:
        """Still to be computed there."""

    @property
    def coming_tokens(self) -> int:
        """Of KV that is bound for it and not there."""

    @property
    def available(self) -> int:
        """KV blocks that can be taken there now."""

    def report_to(self, changed: dict[Any, None]) -> None:
        """From now on, enter it in `changed` whenever `requests` or `prompt_tokens` fall or `up` changes; it may be
        entered at other times.
        """


T = TypeVar("T", bound=Candidate)

ENTRY = 32
"""Bits of an instance's number in an entry of a heap: `load << ENTRY | number`. Whole numbers compare fastest."""

NUMBER = (1 << ENTRY) - 1


class Router(Generic[T]):
    """Picks among `instances` that are up. `for_decode` routes KV to decode instances, else prompts to compute."""

    def __init__(self, instances: Iterable[T], discipline: str, for_decode: bool = False) -> None:
        self.instances: list[T] = []
        self.central = discipline == CENTRAL_QUEUE
        self._next = self._number = 0
        costs: dict[str, Callable[[T, Routed], float]] = {
            BALANCED: _shares_taken if for_decode else _prompt_seconds_after_prefix,
            CENTRAL_QUEUE: lambda instance, _: instance.requests,
            JOIN_SHORTEST_QUEUE: lambda instance, _: instance.requests,
            LEAST_LOADED: _requests_per_block if for_decode else _prompt_seconds,
            PREFIX_AWARE: _bytes_to_move if for_decode else _prompt_seconds_after_prefix,
            WEIGHTED: lambda instance, _: (instance.requests + 1) / instance.pool.weight,
        }
        self._cost = costs.get(discipline)
        by_prompts = not for_decode and discipline in (BALANCED, LEAST_LOADED, PREFIX_AWARE)
        self._load: Callable[[T], int] = _prompts_in_line if by_prompts else _requests
        self._by_prefix = discipline in (BALANCED, PREFIX_AWARE)
        self._by_many = discipline == BALANCED and for_decode
        self._order: dict[T, int] = {}
        self._numbered: dict[int, T] = {}
        self._changed: dict[T, None] = {}
        self._least: dict[T, int] = {}  # the least entry of an instance
        self._heaps: dict[str, list[int]] = {}
        for instance in instances:
            self.add(instance)

    def add(self, instance: T) -> None:
        """One more to pick."""
        self.instances.append(instance)
        self._number += 1
        self._order[instance] = self._number
        self._numbered[self._number] = instance
        self._heaps.setdefault(instance.pool.name, [])
        self._changed[instance] = None
        instance.report_to(self._changed)

    def remove(self, instance: T) -> None:
        """One less, for good."""
        self.instances.remove(instance)
        instance.report_to({})
        number = self._order.pop(instance)
        del self._numbered[number]
        self._changed.pop(instance, None)
        self._least.pop(instance, None)
        heap = self._heaps[instance.pool.name]
        heap[:] = [entry for entry in heap if entry & NUMBER != number]
        heapify(heap)

    def choose(self, request: Routed) -> T | None:
        """The instance for a request, the first of equals; None where all are down."""
        if self._cost is None:
            return self._in_turn()
        cost, every = self._cost, self._by_many or (self._by_prefix and request.hashes)
        candidates = [i for i in self.instances if i.up] if every else self._heads()
        if len(candidates) == 1:
            return candidates[0]
        return min(candidates, key=lambda i: (cost(i, request), self._order[i]), default=None)

    def by_load(self) -> list[T]:
        """The instances that are up, fewest requests first."""
        return sorted((i for i in self.instances if i.up), key=lambda i: i.requests)

    def _in_turn(self) -> T | None:
        for _ in self.instances:
            instance = self.instances[self._next % len(self.instances)]
            self._next = (self._next + 1) % len(self.instances)
            if instance.up:
                return instance
        return None

    def _heads(self) -> list[T]:
        """The least loaded instance of each pool."""
        load, order, lowest = self._load, self._order, self._least
        for instance in self._changed:
            if instance.up:
                entry = load(instance) << ENTRY | order[instance]
                least = lowest.get(instance)
                if least is None or entry < least:
                    lowest[instance] = entry
                    heappush(self._heaps[instance.pool.name], entry)
            else:
                lowest.pop(instance, None)
        self._changed.clear()
        found = []
        for name, heap in self._heaps.items():
            while heap:
                entry = heap[0]
                instance = self._numbered[entry & NUMBER]
                if instance.up:
                    now = load(instance) << ENTRY | entry & NUMBER
                    if entry == now:
                        break
                    if entry == lowest.get(instance):
                        lowest[instance] = now
                        heapreplace(heap, now)
                        continue
                heappop(heap)
            if len(heap) > 64 + 8 * len(self.instances):  # mostly entries that say too much
                mine = {i: load(i) << ENTRY | order[i] for i in self.instances if i.up and i.pool.name == name}
                self._least.update(mine)
                heap = self._heaps[name] = list(mine.values())
                heapify(heap)
            if heap:
                found.append(self._numbered[heap[0] & NUMBER])
        return found


def _requests(instance: Candidate) -> int:
    return instance.requests


def _prompts_in_line(instance: Candidate) -> int:
    """Prompt tokens, then requests (below 2 ** 32)."""
    return instance.prompt_tokens << 32 | instance.requests


def _prompt_seconds(instance: Candidate, request: Routed) -> float:
    return (instance.prompt_tokens + request.target) * instance.pool.seconds_per_prompt_token + 1e-9 * instance.requests


def _prompt_seconds_after_prefix(instance: Candidate, request: Routed) -> float:
    return _prompt_seconds(instance, request) - _held(instance, request) * instance.pool.seconds_per_prompt_token


def _requests_per_block(instance: Candidate, request: Routed) -> float:
    return (instance.requests + 1) / instance.kv.total


def _bytes_to_move(instance: Candidate, request: Routed) -> float:
    """Tokens to receive, then load: a prefix that the decoder holds is not sent."""
    to_come = request.target - _held(instance, request)
    return to_come + request.target * instance.requests / instance.pool.max_num_seqs


def _shares_taken(instance: Candidate, request: Routed) -> float:
    """Of its places and of its KV memory with this request, and of that memory's worth of KV on the way to it."""
    room = instance.kv.total * instance.kv.block_size
    used = room - instance.available * instance.kv.block_size
    to_come = request.target - _held(instance, request)
    places = (instance.requests + 1) / instance.pool.max_num_seqs
    return places + (used + to_come) / room + (instance.coming_tokens + to_come) / room


def _held(instance: Candidate, request: Routed) -> int:
    """Tokens of its prefix that the instance has."""
    if not (instance.kv.hash_tokens and request.hashes):
        return 0
    return instance.kv.match(request.hashes, request.target) * instance.kv.hash_tokens
