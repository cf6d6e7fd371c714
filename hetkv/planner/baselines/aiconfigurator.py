"""AIConfigurator's search: static estimates of one batch, prefill and decode workers matched by their rates.

Xu et al., "AIConfigurator: Lightning-Fast Configuration Optimization for Multi-Framework LLM Serving" (arXiv
2601.06288), and the constants of its package 0.12. Requests are all of one size (here: the mean prompt and output of
the mix), the targets are those of one request, and:

- a prefill worker takes `b` prompts in one step; its TTFT is that step times 1.8 for queueing;
- a decode worker holds `b` sequences; its TPOT is that step;
- (x, y) workers of a pair serve min(0.9 x prefill, 0.92 y decode) requests/s, and the pair and the (x, y) with the most
  requests per GPU are one replica;
- an aggregated worker runs mixed steps while prompts are left and plain ones after, see `aggregated`;
- the replica is repeated until the rate is met; the better of the two ways of serving wins.

The GPU types are the user's choice there, one for prefill and one for decode: here every type, or with `mixed` every
pair of types, is tried and the cheapest plan taken, which is kinder than the tool.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import ceil, inf, log2
from typing import NamedTuple

from hetkv.planner.baselines.candidates import Candidate, candidates, hourly
from hetkv.planner.problem import ModelSpec, Problem
from hetkv.planner.result import Instances
from hetkv.planner.traffic import samples

QUEUEING, PREFILL_LOSS, DECODE_LOSS = 1.8, 0.9, 0.92
BATCHES = (*range(1, 16), *range(16, 32, 2), *range(32, 128, 4), *range(128, 512, 8), 512)
MOST_PREFILL, MOST_DECODE = 32, 32
"""Workers of each role in a replica that are tried."""

KEPT = 16
"""Workers of one parallelism that take part in the matching, the ones with the most requests per GPU."""


class Size(NamedTuple):
    """The one request that stands for all: lengths in tokens, limits in seconds, and requests/s."""

    prompt: float
    output: float
    ttft: float
    tpot: float
    rate: float


class Worker(NamedTuple):
    """A candidate at one batch size, and the requests/s it serves so."""

    candidate: Candidate
    batch: int
    rate: float


class AIConfigurator:
    """The workers of a problem; calling it matches and repeats them for a multiple of the problem's rates."""

    def __init__(self, problem: Problem, mixed: bool = False) -> None:
        self.problem = problem
        names = [offer.gpu for offer in problem.gpus]
        self.pairs = list(product(names, names)) if mixed else [(name, name) for name in names]
        self.replicas: list[tuple[Size, list[Replica]]] = []
        for model in problem.models:
            size = one_size(problem, model)
            engine = problem.engine_for(model)
            found = candidates(problem, model)
            prefills = [w for c in found for w in prefill(c, size, engine.max_num_batched_tokens)]
            decodes = [w for c in found for w in decode(c, size, engine.max_num_seqs)]
            both = [w for c in found for w in aggregated(c, size, engine.max_num_batched_tokens, engine.max_num_seqs)]
            self.replicas.append((size, [*self._alone(both), *self._matched(prefills, decodes)]))

    def __call__(self, scale: float = 1.0) -> list[Instances] | None:
        """The instances for `scale` times the rates; None where no worker meets the targets."""
        chosen: list[Instances] = []
        for size, replicas in self.replicas:
            options = [[*chosen, *r.instances(ceil(scale * size.rate / r.rate - 1e-9))] for r in replicas]
            best = min(options, key=lambda o: hourly(self.problem, o), default=None)
            if best is None or hourly(self.problem, best) == inf:
                return None
            chosen = best
        return chosen

    def _alone(self, workers: list[Worker]) -> Iterator[Replica]:
        """The aggregated worker of each GPU type with the most requests per GPU, of each parallelism."""
        if self.problem.roles == "disaggregated":
            return
        for best in _best(workers).values():
            yield Replica(best[0].rate, best[0], 1, None, 0)

    def _matched(self, prefills: list[Worker], decodes: list[Worker]) -> Iterator[Replica]:
        """For each pair of GPU types and parallelism of decode the replica with the most requests per GPU."""
        if self.problem.roles == "aggregated":
            return
        for source, destination in self.pairs:
            heads = [w for w in prefills if w.candidate.offer.gpu == source]
            heads = sorted(heads, key=lambda w: (-w.rate / w.candidate.gpus, w.batch))[:KEPT]
            tails = [w for w in decodes if w.candidate.offer.gpu == destination]
            for group in _best(tails).values():
                found = [match(head, tail) for head in heads for tail in group[:KEPT]]
                if found:
                    yield max(found, key=lambda r: (r.rate / r.gpus, -r.gpus))


class Replica(NamedTuple):
    """`x` workers `head` (prefill, or aggregated) with `y` workers `tail`: the unit that is repeated."""

    rate: float
    head: Worker
    x: int
    tail: Worker | None
    y: int

    @property
    def gpus(self) -> int:
        return self.x * self.head.candidate.gpus + (self.y * self.tail.candidate.gpus if self.tail else 0)

    def instances(self, times: int) -> list[Instances]:
        """`times` replicas."""
        if self.tail is None:
            return [self.head.candidate.instances("aggregated", self.x * times)]
        return [
            self.head.candidate.instances("prefill", self.x * times),
            self.tail.candidate.instances("decode", self.y * times),
        ]


def one_size(problem: Problem, model: ModelSpec) -> Size:
    """The mean request of the model's classes under the tightest of their limits."""
    classes = problem.classes_of(model.name)
    drawn = samples(classes)
    return Size(
        prompt=sum(s.share * float(s.prompts.mean()) for s in drawn),
        output=sum(s.share * float(s.outputs.mean()) for s in drawn),
        ttft=min(c.ttft_ms for c in classes) / 1e3,
        tpot=min(c.tpot_ms for c in classes) / 1e3,
        rate=sum(c.rate for c in classes),
    )


def prefill(candidate: Candidate, size: Size, budget: int) -> Iterator[Worker]:
    """Prefill workers of one candidate: as many prompts in a step as the budget holds, at least one."""
    pairs = size.prompt * (size.prompt + 1) / 2
    for batch in range(1, max(1, int(budget / size.prompt)) + 1):
        seconds = candidate.steps.step_seconds(0, 0.0, round(batch * size.prompt), batch * pairs)
        if QUEUEING * seconds < size.ttft:
            yield Worker(candidate, batch, batch / seconds)


def decode(candidate: Candidate, size: Size, places: int) -> Iterator[Worker]:
    """Decode workers of one candidate, at every batch that fits in memory."""
    held = candidate.steps.kv.bytes(size.prompt + size.output)
    for batch in BATCHES:
        if batch > places or batch * held > candidate.steps.kv_room:
            return
        seconds = candidate.steps.step_seconds(batch, batch * (size.prompt + size.output / 2))
        if seconds < size.tpot:
            yield Worker(candidate, batch, batch / (seconds * size.output))


def aggregated(candidate: Candidate, size: Size, budget: int, places: int) -> Iterator[Worker]:
    """Aggregated workers: of `output` steps of `batch` requests, as many hold prompt tokens as the prompts need.

    A request's TTFT is its own mixed steps times a queueing factor that grows with the logarithm of the batch.
    """
    steps, held = candidate.steps, candidate.steps.kv.bytes(size.prompt + size.output)
    context = size.prompt + size.output / 2
    for batch in BATCHES:
        if batch > places or batch * held > steps.kv_room:
            return
        for tokens in sorted({min(budget, round(size.prompt * 2**i)) for i in range(4)}):
            with_prompt = ceil(size.prompt * batch / tokens)
            others = max(1, batch - ceil(tokens / size.prompt)) if batch > 1 else 0
            pairs = tokens * (size.prompt + 1) / 2
            mixed = steps.step_seconds(others, others * context, tokens, pairs)
            plain = steps.step_seconds(batch, batch * context)
            total = with_prompt * mixed + max(0.0, size.output - with_prompt) * plain
            ttft = mixed * ceil(size.prompt / tokens) * min(1 + log2(batch) / 8, 2.0)
            if ttft < size.ttft and total / max(size.output, with_prompt) < size.tpot:
                yield Worker(candidate, batch, batch / total)


def match(head: Worker, tail: Worker) -> Replica:
    """The numbers of workers that serve the most requests per GPU."""
    best = None
    for y in range(1, MOST_DECODE + 1):
        # The fewest prefill workers that keep up, and one less: anything else has a GPU too many.
        enough = ceil(DECODE_LOSS * tail.rate * y / (PREFILL_LOSS * head.rate) - 1e-9)
        for x in {max(1, enough - 1), max(1, min(enough, MOST_PREFILL))}:
            rate = min(PREFILL_LOSS * head.rate * x, DECODE_LOSS * tail.rate * y)
            replica = Replica(rate, head, x, tail, y)
            if x <= MOST_PREFILL and (best is None or rate / replica.gpus > best.rate / best.gpus):
                best = replica
    assert best is not None
    return best


def _best(workers: list[Worker]) -> dict[tuple[str, int, int], list[Worker]]:
    """Workers by GPU, TP and PP, the most requests per GPU first."""
    groups: dict[tuple[str, int, int], list[Worker]] = {}
    for worker in workers:
        c = worker.candidate
        groups.setdefault((c.offer.gpu, c.tp, c.pp), []).append(worker)
    return {key: sorted(group, key=lambda w: (-w.rate / w.candidate.gpus, w.batch)) for key, group in groups.items()}
