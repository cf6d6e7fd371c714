"""Requests of many prompts and many choices: one HTTP request, many sequences, each with KV of its own."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import NamedTuple

from tests.vllm.servers import Process, body_of, choices_of

MOST_CHOICES = 96
"""Choices that one request asks for: the servers compute them in a few batches."""
COUNTED = ("vllm:hetkv_sends_total", "vllm:hetkv_failed_sends_total", "vllm:hetkv_expired_sends_total")


class Batch(NamedTuple):
    """The prompts of one request, and how many choices it asks for each."""

    prompts: list[list[int]]
    n: int


def batches(num_prompts: int, seed: int, longest: int = 300) -> Iterator[Batch]:
    """`num_prompts` prompts in lists of 2 to 32, every other list with prompts of one length; `n` from 1 to 6."""
    draw = random.Random(seed)
    turn = 0
    while num_prompts > 0:
        size = min(num_prompts, 2 + (turn * 7 + draw.randrange(7)) % 31)
        one = draw.randint(5, longest)
        lengths = [one if turn % 2 else draw.randint(5, longest) for _ in range(size)]
        prompts = [[draw.randrange(5, 1000) for _ in range(length)] for length in lengths]
        yield Batch(prompts, min(1 + turn % 6, MOST_CHOICES // size))
        num_prompts -= size
        turn += 1


def wrong_choices(servers: dict[str, Process], model: str, mode: str, batch: Batch) -> int:
    """Choices whose tokens are not those of the decode server alone.

    `n` above 1 needs sampling, so all sample from the one best token.
    """
    body = body_of(model, batch.prompts, n=batch.n, temperature=1.0, top_k=1)
    expected, got = (choices_of(servers[name].post(body)) for name in ("decode", mode))
    assert len(got) == len(expected) == len(batch.prompts) * batch.n
    return sum(mine != alone for mine, alone in zip(got, expected, strict=True))


def counted(servers: dict[str, Process]) -> dict[str, float]:
    """What the prefill server counted so far, and loads of the decode server."""
    counts = {name: servers["prefill"].metric(name) for name in COUNTED}
    loads = ("vllm:hetkv_loads_total", "vllm:hetkv_failed_loads_total")
    return counts | {name: servers["decode"].metric(name) for name in loads}


def check_counts(servers: dict[str, Process], before: dict[str, float], num_prompts: int) -> None:
    """All prompts were sent and loaded since `before`, each once, and none failed.

    The prefill server counts a send when it next looks, which may be after the client has its answer.
    """
    expected = dict.fromkeys(before, 0.0)
    expected["vllm:hetkv_sends_total"] = expected["vllm:hetkv_loads_total"] = num_prompts
    deadline = time.monotonic() + 60
    while (found := {name: now - before[name] for name, now in counted(servers).items()}) != expected:
        assert time.monotonic() < deadline, found
        time.sleep(0.5)
