"""Which instance gets a request."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hetkv.simulator.instance import Instance
from hetkv.simulator.request import Request

CENTRAL_QUEUE = "central_queue"
JOIN_SHORTEST_QUEUE = "join_shortest_queue"
LEAST_LOADED = "least_loaded"
PREFIX_AWARE = "prefix_aware"
ROUND_ROBIN = "round_robin"

DISCIPLINES = {
    CENTRAL_QUEUE: "one queue for all; an instance takes from its head when it can run it",
    JOIN_SHORTEST_QUEUE: "the instance with the fewest requests",
    LEAST_LOADED: "the least time for the prompts in line; for decode, the fewest requests per KV block",
    PREFIX_AWARE: "the instance that has the least to compute: prompts in line, and this one less its cached prefix",
    ROUND_ROBIN: "each in turn",
}


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
        }
        self._cost = costs.get(discipline)

    def choose(self, request: Request) -> Instance | None:
        """The instance for a request, the first of equals; None where all are down."""
        if self._cost is None:
            for _ in self.instances:
                instance = self.instances[self._next]
                self._next = (self._next + 1) % len(self.instances)
                if instance.up:
                    return instance
            return None
        best, least = None, 0.0
        for instance in self.instances:
            if instance.up:
                cost = self._cost(instance, request)
                if best is None or cost < least:
                    best, least = instance, cost
        return best

    def by_load(self) -> list[Instance]:
        """The instances that are up, fewest requests first."""
        return sorted((i for i in self.instances if i.up), key=lambda i: i.requests)


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
