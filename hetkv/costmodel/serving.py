"""Times of whole runs from step times: a static batch, and a closed loop of requests, aggregated or disaggregated.

Everything is vectorised: `k` holds `coefficients` of one configuration or of an array of them, the rest are floats or
arrays of the same length. docs/cost-model.md derives the formulas.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hetkv.costmodel.step import seconds

Array = NDArray[np.float64]
ITERATIONS = 15
BURST = 0.05
"""Half of a tenth: the mean wait of a run of ten waves whose first one arrives at once. Used for the settled state."""


class Loop(NamedTuple):
    """What a closed loop settles to: seconds, sequences that decode on each instance, and requests per second."""

    ttft_s: Array
    tpot_s: Array
    batch: Array
    rate: Array


class Load(NamedTuple):
    """`concurrency` requests are always in flight, each of `prompt` tokens in and `output` tokens out."""

    concurrency: Array
    prompt: Array
    output: Array


class LoopConstants(NamedTuple):
    """Constants around the step. `front_*_s`: service time of the front end per request and per output token.

    `interleave`: share of the other requests' prompts that fall into a request's decode phase. For TTFT only: `burst`,
    the prompts that a request waits for, as a share of those in flight (the load generator's first wave arrives at
    once), and `accept_s`, the time outside the engine's steps.
    """

    front_request_s: Any
    front_token_s: Any
    interleave: Any
    burst: Any
    accept_s: Any


def static_batch(k: tuple[Any, ...], batch: Array, prompt: Array, output: Array, room: Array) -> Array:
    """Seconds to serve `batch` requests that start together, when `room` of them fit in the KV cache at once."""
    together = np.minimum(batch, np.maximum(1.0, room))
    zero = 0.0 * together
    first = seconds(k, zero, zero, together * prompt, together * prompt * (prompt + 1) / 2)
    later = seconds(k, together, together * (prompt + output / 2), zero, zero)
    return np.asarray(batch / together * (first + output * later))


def _prompt_steps(prompt: Array, chunk: float) -> tuple[Array, Array, Array]:
    """A prompt cut into steps of at most `chunk` tokens: tokens and pairs of one step, and number of steps."""
    tokens = np.minimum(prompt, chunk)
    parts = prompt / tokens
    return tokens, prompt * (prompt + 1) / 2 / parts, parts


def aggregated(k: tuple[Any, ...], load: Load, room: Array, chunk: float, c: LoopConstants) -> Loop:
    """One instance does prompts and decoding; `room` requests fit in its KV cache.

    In a cycle each of the other requests prefills once, and its prompt steps lengthen the decode steps of those that
    run. Little's law gives the batch that decodes; the front end bounds the rate.
    """
    running = np.minimum(load.concurrency, np.maximum(1.0, room))
    tokens, pairs, parts = _prompt_steps(load.prompt, chunk)
    zero = 0.0 * running
    batch = 0.9 * running
    for _ in range(ITERATIONS):
        decoding = np.maximum(1.0, batch)
        context = decoding * (load.prompt + load.output / 2)
        plain = seconds(k, decoding, context, zero, zero)
        mixed = seconds(k, decoding, context, tokens, pairs)
        others = np.maximum(0.0, running - 1) * np.minimum(1.0, decoding / running)
        tpot = plain + c.interleave * others * parts * (mixed - plain) / load.output
        first = parts * mixed * (1 + BURST * running)
        rate = np.minimum(
            running / (first + load.output * tpot), 1 / (c.front_request_s + load.output * c.front_token_s)
        )
        batch = 0.5 * (batch + rate * load.output * tpot)
    waiting = np.maximum(0.0, load.concurrency - running) / rate
    slack = running / rate - load.output * tpot - first
    first = parts * mixed * (1 + c.burst * running)
    return Loop(c.accept_s + first + np.maximum(0.0, slack) + waiting, tpot, batch, rate)


def disaggregated(
    k_prefill: tuple[Any, ...],
    k_decode: tuple[Any, ...],
    load: Load,
    prefill_workers: Array,
    decode_workers: Array,
    room: Array,
    chunk: float,
    transfer_s: Array,
    c: LoopConstants,
) -> Loop:
    """Separate prefill and decode workers; `room` requests fit in the KV cache of one decode worker.

    The slower of the two sides and the front end bound the rate. Requests that find no decode slot or no prefill worker
    wait before their first token. `transfer_s` is the exposed time of the KV transfer.
    """
    tokens, pairs, parts = _prompt_steps(load.prompt, chunk)
    zero = 0.0 * load.concurrency
    prefill_s = parts * seconds(k_prefill, zero, zero, tokens, pairs)
    each = load.concurrency / decode_workers
    batch = np.minimum(each, np.maximum(1.0, room))
    for _ in range(ITERATIONS):
        decoding = np.maximum(1.0, batch)
        tpot = seconds(k_decode, decoding, decoding * (load.prompt + load.output / 2), zero, zero)
        first = prefill_s * (1 + BURST * load.concurrency / prefill_workers) + transfer_s
        rate = load.concurrency / (first + load.output * tpot)
        rate = np.minimum(rate, prefill_workers / prefill_s)
        rate = np.minimum(rate, decode_workers * np.maximum(1.0, room) / (load.output * tpot))
        rate = np.minimum(rate, 1 / (c.front_request_s + load.output * c.front_token_s))
        batch = 0.5 * (batch + rate * load.output * tpot / decode_workers)
    slack = load.concurrency / rate - load.output * tpot - first
    first = prefill_s * (1 + c.burst * load.concurrency / prefill_workers) + transfer_s
    return Loop(c.accept_s + first + np.maximum(0.0, slack), tpot, batch, rate)
