"""`hetkv demo` without its command line: instances with different pools, and one process to compare them with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from itertools import zip_longest
from math import gcd, lcm
from pathlib import Path
from typing import Literal

import msgspec
import torch

from hetkv.errors import InputError
from hetkv.kv.dtypes import DType
from hetkv.models import ModelConfig
from hetkv.runtime.checkpoint import greedy_settings, read_checkpoint
from hetkv.runtime.plan import DECODE_POOL, PREFILL_POOL, InstancePlan, SideOptions, check_instances
from hetkv.runtime.processes import PATIENCE_S, link, running
from hetkv.runtime.prompts import Prompt, encode, spread
from hetkv.runtime.reference import (
    Pair,
    Reference,
    SelfReference,
    TransformersReference,
    default_reference,
    rounds,
)
from hetkv.runtime.request_flow import Rendezvous, Request, Run, Times, counted, route, times
from hetkv.runtime.route_bytes import RouteBytes
from hetkv.runtime.timeline import Span
from hetkv.runtime.tokenizer import TextTokenizer
from hetkv.transport.config import TransferConfig

MODEL = Path(__file__).parent / "data" / "demo"
PROMPT = """\
And Joseph fell upon his father's face, and wept upon him, and kissed him.
And Joseph commanded his servants the physicians to embalm his father: and the physicians embalmed Israel.
And forty days were fulfilled for him; for so are fulfilled the days of those which are embalmed: and the Egyptians \
mourned for him threescore and ten days.
And when the days of his"""
"""From a chapter that the demo checkpoint has not seen (Genesis 50); it ends inside a block of either pool."""
PAIR = (
    InstancePlan(name="prefill-0", role="prefill", pool=PREFILL_POOL),
    InstancePlan(name="decode-0", role="decode", pool=DECODE_POOL),
)


class DemoOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What `hetkv demo` takes."""

    model: str = str(MODEL)
    prompts: tuple[Prompt, ...] = (Prompt(PROMPT),)
    max_new_tokens: int = 96
    instances: tuple[InstancePlan, ...] = PAIR
    requests: int | None = None
    """Default: one for each pair of a prefill and a decode instance, and for each prompt."""
    reference: Reference | None = None
    """Default: `transformers` where it is installed, else `self`."""
    plain_greedy: bool = False
    """Leave out what `generation_config.json` says of penalties and the like; otherwise a file that has them is
    rejected."""
    compute_dtype: str = "float32"
    chunk: int | None = None
    rendezvous: Rendezvous = "concurrent"
    threads: int = 1


Outcome = Literal["identical", "rounding", "different", "not compared"]
"""`rounding`: other tokens than `transformers`, which keeps KV in fp32, but one process that rounds so gives them."""


class RequestResult(msgspec.Struct, kw_only=True):
    """One request. Times are milliseconds on one clock."""

    prefill: str
    """Instances that it was routed to."""
    decode: str
    outcome: Outcome
    prompt: str
    prompt_ids: list[int]
    token_ids: list[int]
    reference_ids: list[int] | None
    """What the reference generates; null: there is none."""
    first_difference: int | None
    """Number of the first generated token that differs from the reference's."""
    prompt_tokens: int
    generated_tokens: int
    text: str
    reference_text: str | None
    ttft_ms: float
    """From the start of the prefill until there is the first token and all KV is in the decode pools."""
    prefill_ms: float
    transfer_ms: float
    """From the first layer handed over until the last layer is verified in the last decode pool."""
    exposed_transfer_ms: float
    """The part of it after the end of the prefill's compute: what the transfer adds to TTFT. 0: nothing."""
    tpot_ms: float


class DemoResult(msgspec.Struct, kw_only=True):
    """What `hetkv demo --json` writes. Texts are those of the first request, times the means of all."""

    identical: bool | None
    """Every request's tokens equal the reference's; null: nothing was compared."""
    outcome: Outcome
    """The worst of all requests."""
    reference: Reference
    same_prompt_ids: bool | None
    """The reference's own tokenizer makes the same tokens of the prompts; null: it has none. It is given hetkv's."""
    generated_tokens: int
    text: str
    reference_text: str | None
    prompt_tokens: int
    layers: int
    frames: int
    payload_bytes: int
    """Counted by the senders; the routes' bytes add up to it."""
    direct_frames: int
    """Frames that were stored straight into the receiver's window; the others were staged and put."""
    ttft_ms: float
    prefill_ms: float
    transfer_ms: float
    exposed_transfer_ms: float
    tpot_ms: float
    rendezvous: str
    prefill: SideOptions
    """Pools of the first instance of each side."""
    decode: SideOptions
    model: str
    instances: list[InstancePlan]
    requests: list[RequestResult]
    routes: list[RouteBytes]
    """All requests together."""


def run_demo(options: DemoOptions) -> tuple[DemoResult, list[list[Span]]]:
    """Start all instances, route the requests, compare each with a single process. `InputError` before any start.

    The second result is each request's timeline.
    """
    config = read_checkpoint(options.model)
    _check(options, config)
    check_instances(options.instances, config)
    sources = [instance for instance in options.instances if instance.role == "prefill"]
    destinations = [instance for instance in options.instances if instance.role == "decode"]
    tokenizer = TextTokenizer.load(options.model)
    count = options.requests or max(len(sources) * len(destinations), len(options.prompts))
    pairs = list(_round_robin(len(sources), len(destinations), count))
    texts = list(spread(options.prompts, len(pairs)))
    prompts = encode(texts, tokenizer, options.model)
    longest = max(map(len, prompts))
    if longest + options.max_new_tokens > config.max_context:
        raise InputError(
            f"{longest} tokens of prompt and {options.max_new_tokens} new tokens: the model's context has "
            f"{config.max_context} (`max_position_embeddings`)"
        )
    with running(
        options.instances,
        model=options.model,
        max_tokens=longest + options.max_new_tokens,
        max_requests=len(sources) + len(destinations),
        chunk=options.chunk,
        compute_dtype=options.compute_dtype,
        threads=options.threads,
        transfer=TransferConfig(trace=True, lease_s=PATIENCE_S, hold_s=PATIENCE_S),
    ) as instances:
        torch.set_num_threads(options.threads)
        compare = Comparison(options, config, texts, prompts)
        link(instances)
        prefillers = [instance for instance in instances if instance.plan.role == "prefill"]
        decoders = [instance for instance in instances if instance.plan.role == "decode"]
        requests = [
            Request(f"request-{index}", prompt, prefillers[prefill], decoders[decode])
            for index, ((prefill, decode), prompt) in enumerate(zip(pairs, prompts, strict=True))
        ]
        for request in requests[: len(sources) * len(destinations)]:
            route(request._replace(name=f"warm-up of {request.name}"), 1, options.rendezvous)
        before = counted(prefillers)
        runs = _route_all(requests, options)
        counters = {name: count - before[name] for name, count in counted(prefillers).items()}
        routes = _routes(requests)
    results = [
        _result(request, text, run, compare, tokenizer)
        for request, text, run in zip(requests, texts, runs, strict=True)
    ]
    return _summary(options, compare, results, routes, counters, config.num_layers), [run.spans for run in runs]


class Comparison:
    """The tokens that a demo's requests should have, computed before the requests are timed."""

    def __init__(
        self, options: DemoOptions, config: ModelConfig, texts: Sequence[Prompt], prompts: Sequence[list[int]]
    ) -> None:
        self.reference = options.reference or default_reference()
        self._options = options
        self._own: SelfReference | None = None
        self.same_prompt_ids: bool | None = None
        self._expected: dict[tuple[int, ...], list[int]] = {}
        if self.reference == "transformers":
            reference = TransformersReference(options.model, config.eos_ids)
            self.same_prompt_ids = reference.same_ids(texts, prompts)
            for prompt in prompts:
                self._expected[tuple(prompt)] = reference.tokens(prompt, options.max_new_tokens)

    def expected(self, prompt: list[int], pair: Pair) -> list[int] | None:
        """The reference's tokens."""
        if self.reference == "self":
            return self._self(prompt, pair)
        return self._expected.get(tuple(prompt))

    def outcome(self, tokens: list[int], prompt: list[int], pair: Pair) -> Outcome:
        """How a request's tokens compare."""
        expected = self.expected(prompt, pair)
        if expected is None:
            return "not compared"
        if tokens == expected:
            return "identical"
        rounded = self.reference == "transformers" and rounds(pair, self._options.compute_dtype)
        return "rounding" if rounded and tokens == self._self(prompt, pair) else "different"

    def _self(self, prompt: list[int], pair: Pair) -> list[int]:
        if self._own is None:
            self._own = SelfReference(self._options.model, self._options.compute_dtype, self._options.chunk)
        return self._own.tokens(prompt, self._options.max_new_tokens, pair)


def _check(options: DemoOptions, config: ModelConfig) -> None:
    if DType.parse(options.compute_dtype) not in (DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16):
        raise InputError(f"compute dtype {options.compute_dtype}: must be float32, float16 or bfloat16")
    for name, value in (("threads", options.threads), ("requests", options.requests), ("chunk", options.chunk)):
        if value is not None and value < 1:
            raise InputError(f"{value} {name}: must be at least 1")
    if options.max_new_tokens < 1:
        raise InputError(f"{options.max_new_tokens} new tokens: must be at least 1")
    if not options.prompts or any(not prompt.text for prompt in options.prompts):
        raise InputError("a prompt is empty")
    if options.reference == "transformers" and default_reference() != "transformers":
        raise InputError("--reference transformers: it is not installed")
    changes = greedy_settings(options.model, config).changes
    if changes and not options.plain_greedy:
        raise InputError(
            f"{options.model}/generation_config.json: {', '.join(changes)} changes greedy decoding; "
            "--plain-greedy leaves it out"
        )


def _round_robin(prefills: int, decodes: int, requests: int | None) -> Iterator[tuple[int, int]]:
    """Each side in turn; the decode side is shifted by one where pairs would come again before all have come."""
    for index in range(requests or prefills * decodes):
        shift = index // lcm(prefills, decodes) % gcd(prefills, decodes)
        yield index % prefills, (index + shift) % decodes


def _route_all(requests: Sequence[Request], options: DemoOptions) -> list[Run]:
    """All requests at once, each instance serving one at a time; the first error ends the wait."""
    width = len(options.instances)  # no more requests in flight than the pools have room for
    workers = ThreadPoolExecutor(width)
    try:
        futures = [workers.submit(route, request, options.max_new_tokens, options.rendezvous) for request in requests]
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()
        return [future.result() for future in futures]
    finally:
        # After an error the threads end as soon as the processes that they wait for have ended.
        workers.shutdown(wait=False, cancel_futures=True)


def _routes(requests: Sequence[Request]) -> list[RouteBytes]:
    """Bytes of every route, over all requests."""
    totals: dict[RouteBytes, int] = {}
    for request in requests:
        for rank in request.decoder.call("routes", request.prefiller.plan.name, len(request.prompt)):
            for part in rank:
                key = msgspec.structs.replace(part, bytes=0)
                totals[key] = totals.get(key, 0) + part.bytes
    return [msgspec.structs.replace(part, bytes=size) for part, size in sorted(totals.items(), key=_route_order)]


def _route_order(item: tuple[RouteBytes, int]) -> tuple[object, ...]:
    route = item[0]
    return route.source.split("/")[0], route.destination.split("/")[0], *route.layers, *route.heads


def _result(request: Request, text: Prompt, run: Run, compare: Comparison, tokenizer: TextTokenizer) -> RequestResult:
    tokens, pair = run.decoded[0].tokens, (request.prefiller.plan, request.decoder.plan)
    expected = compare.expected(request.prompt, pair)
    agreed = all(rank.tokens == tokens for rank in run.decoded)
    differences = [i for i, (a, b) in enumerate(zip_longest(tokens, expected or [])) if a != b]
    return RequestResult(
        prefill=request.prefiller.plan.name,
        decode=request.decoder.plan.name,
        outcome=compare.outcome(tokens, request.prompt, pair) if agreed else "different",
        prompt=text.text,
        prompt_ids=request.prompt,
        token_ids=tokens,
        reference_ids=expected,
        first_difference=differences[0] if differences and expected is not None else None,
        prompt_tokens=len(request.prompt),
        generated_tokens=len(tokens),
        text=tokenizer.decode(tokens),
        reference_text=None if expected is None else tokenizer.decode(expected),
        **times(run)._asdict(),
    )


def _summary(
    options: DemoOptions,
    compare: Comparison,
    requests: list[RequestResult],
    routes: list[RouteBytes],
    counters: dict[str, int],
    layers: int,
) -> DemoResult:
    order: list[Outcome] = ["different", "rounding", "not compared", "identical"]
    outcome = min((request.outcome for request in requests), key=order.index)
    sides = {instance.role: instance.pool for instance in reversed(options.instances)}
    return DemoResult(
        identical=None if outcome == "not compared" else outcome == "identical",
        outcome=outcome,
        reference=compare.reference,
        same_prompt_ids=compare.same_prompt_ids,
        generated_tokens=sum(request.generated_tokens for request in requests),
        text=requests[0].text,
        reference_text=requests[0].reference_text,
        prompt_tokens=sum(request.prompt_tokens for request in requests),
        layers=layers,
        **counters,
        **{name: sum(getattr(request, name) for request in requests) / len(requests) for name in Times._fields},
        rendezvous=options.rendezvous,
        prefill=sides["prefill"],
        decode=sides["decode"],
        model=options.model,
        instances=list(options.instances),
        requests=requests,
        routes=routes,
    )
