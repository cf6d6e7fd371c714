"""Which instance gets a request.

Instances of one pool differ in their load alone, so each pool keeps a heap of loads and only its head is looked at.
An instance whose load has fallen is entered again when the next request comes, one whose load has risen when its entry
comes to the head. With a prefix to match, all instances are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush, heapreplace

from hetkv.simulator.instance import Instance
from hetkv.simulator.request import Request

CENTRAL_QUEUE = "central_queue"
JOIN_SHORTEST_QUEUE = "join_shortest_queue"
LEAST_LOADED = "least_loaded"
PREFIX_AWARE = "prefix_aware"
ROUND_ROBIN = "round_robin"
WEIGHTED = "weighted"

DISCIPLINES = {
    CENTRAL_QUEUE: "one queue for all; an instance takes from its head when it can run it",
    JOIN_SHORTEST_QUEUE: "the instance with the fewest requests",
    LEAST_LOADED: "the least time for the prompts in line; for decode, the fewest requests per KV block",
    PREFIX_AWARE: "the instance that has the least to compute: prompts in line, and this one less its cached prefix",
    ROUND_ROBIN: "each in turn",
    WEIGHTED: "the instance with the fewest requests for the weight of its pool",
}

Load = tuple[float, ...]
Entry = tuple[Load, int, Instance]


class Router:
    """Picks among `instances` that are up. `for_decode` routes KV to decode instances, else prompts to compute."""

    def __init__(self, instances: Sequence[Instance], discipline: str, for_decode: bool = False) -> None:
        self.instances = list(instances)
        self.central = discipline == CENTRAL_QUEUE
        self._next = 0
        costs: dict[str, Callable[[Instance, Request], float]] = {
            CENTRAL_QUEUE: lambda instance, _: instance.requests,
            JOIN_SHORTEST_QUEUE: lambda instance, _: instance.requests,
            LEAST_LOADED: _requests_per_block if for_decode else _prompt_seconds,
            PREFIX_AWARE: _bytes_to_move if for_decode else _prompt_seconds_beside_prefix,
            WEIGHTED: lambda instance, _: (instance.requests + 1) / instance.pool.weight,
        }
        self._cost = costs.get(discipline)
        by_prompts = not for_decode and discipline in (LEAST_LOADED, PREFIX_AWARE)
        self._load: Callable[[Instance], Load] = _prompts_in_line if by_prompts else _requests
        self._by_prefix = discipline == PREFIX_AWARE
        self._order = {instance: i for i, instance in enumerate(self.instances)}
        self._changed: dict[Instance, None] = dict.fromkeys(self.instances)
        self._least: dict[Instance, Load] = {}  # the least load that an instance is entered with
        self._heaps: dict[str, list[Entry]] = {i.pool.name: [] for i in self.instances}
        for instance in self.instances:
            instance.report_to(self._changed)

    def choose(self, request: Request) -> Instance | None:
        """The instance for a request, the first of equals; None where all are down."""
        if self._cost is None:
            return self._in_turn()
        cost, every = self._cost, self._by_prefix and request.hashes
        candidates = [i for i in self.instances if i.up] if every else self._heads()
        return min(candidates, key=lambda i: (cost(i, request), self._order[i]), default=None)

    def by_load(self) -> list[Instance]:
        """The instances that are up, fewest requests first."""
        return sorted((i for i in self.instances if i.up), key=lambda i: i.requests)

    def _in_turn(self) -> Instance | None:
        for _ in self.instances:
            instance = self.instances[self._next]
            self._next = (self._next + 1) % len(self.instances)
            if instance.up:
                return instance
        return None

    def _heads(self) -> list[Instance]:
        """The least loaded instance of each pool."""
        for instance in self._changed:
            if instance.up:
                load, least = self._load(instance), self._least.get(instance)
                if least is None or load < least:
                    self._least[instance] = load
                    heappush(self._heaps[instance.pool.name], (load, self._order[instance], instance))
            else:
                self._least.pop(instance, None)
        self._changed.clear()
        found = []
        for name, heap in self._heaps.items():
            while heap:
                load, order, instance = heap[0]
                now = self._load(instance)
                if instance.up and load == now:
                    break
                if instance.up and load == self._least.get(instance):
                    self._least[instance] = now
                    heapreplace(heap, (now, order, instance))
                else:
                    heappop(heap)
            if len(heap) > 64 + 8 * len(self.instances):  # mostly entries that say too much
                mine = [i for i in self.instances if i.up and i.pool.name == name]
                self._least.update({i: self._load(i) for i in mine})
                heap = self._heaps[name] = [(self._least[i], self._order[i], i) for i in mine]
                heapify(heap)
            if heap:
                found.append(heap[0][2])
        return found


def _requests(instance: Instance) -> Load:
    return (instance.requests,)


def _prompts_in_line(instance: Instance) -> Load:
    return instance.prompt_tokens, instance.requests


def _prompt_seconds(instance: Instance, request: Request) -> float:
    return (instance.prompt_tokens + request.target) * instance.pool.seconds_per_prompt_token + 1e-9 * instance.requests


def _prompt_seconds_beside_prefix(instance: Instance, request: Request) -> float:
    cached = 0
    if instance.kv.hash_tokens and request.hashes:
        cached = instance.kv.match(request.hashes, request.target) * instance.kv.hash_tokens
    return _prompt_seconds(instance, request) - cached * instance.pool.seconds_per_prompt_token


def _requests_per_block(instance: Instance, request: Request) -> float:
    return (instance.requests + 1) / instance.kv.total


def _bytes_to_move(instance: Instance, request: Request) -> float:
    """Tokens to receive, then load: a prefix that the decoder holds is not sent."""
    held = 0
    if instance.kv.hash_tokens and request.hashes:
        held = instance.kv.match(request.hashes, request.target) * instance.kv.hash_tokens
    return (request.target - held) + request.target * instance.requests / instance.pool.max_num_seqs
