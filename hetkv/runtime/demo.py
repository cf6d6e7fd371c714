"""`hetkv demo` without its command line: prefill and decode instances with unlike pools, and one process to compare."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from math import gcd, lcm
from pathlib import Path

import msgspec
import torch

from hetkv.errors import InputError
from hetkv.kv.dtypes import DType
from hetkv.kv.pool import KVPool
from hetkv.runtime.checkpoint import read_checkpoint
from hetkv.runtime.generate import generate
from hetkv.runtime.model import Decoder
from hetkv.runtime.plan import DECODE_POOL, PREFILL_POOL, InstancePlan, SideOptions, check_instances
from hetkv.runtime.processes import link, running
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
    prompt: str = PROMPT
    max_new_tokens: int = 96
    instances: tuple[InstancePlan, ...] = PAIR
    requests: int | None = None
    """Default: one for each pair of a prefill and a decode instance."""
    compute_dtype: str = "float32"
    chunk: int | None = None
    rendezvous: Rendezvous = "concurrent"
    threads: int = 1


class RequestResult(msgspec.Struct, kw_only=True):
    """One request. Times are milliseconds on one clock."""

    prefill: str
    """Instances that it was routed to."""
    decode: str
    identical: bool
    """The tokens equal those of a single process with the prefill instance's kind of pool."""
    prompt_tokens: int
    generated_tokens: int
    text: str
    single_process_text: str
    ttft_ms: float
    """From the start of the prefill until there is the first token and all KV is in the decode pools."""
    prefill_ms: float
    transfer_ms: float
    """From the first layer handed over until the last layer is verified in the last decode pool."""
    exposed_transfer_ms: float
    """The part of it behind the end of the prefill's compute: what the transfer adds to TTFT. 0: nothing."""
    tpot_ms: float


class DemoResult(msgspec.Struct, kw_only=True):
    """What `hetkv demo --json` writes. Texts are those of the first request, times the means of all."""

    identical: bool
    """Every request's tokens equal those of a single process."""
    generated_tokens: int
    text: str
    single_process_text: str
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
    _check(options)
    check_instances(options.instances, config)
    sources = [instance for instance in options.instances if instance.role == "prefill"]
    destinations = [instance for instance in options.instances if instance.role == "decode"]
    tokenizer = TextTokenizer.load(options.model)
    pairs = list(_round_robin(len(sources), len(destinations), options.requests))
    prompts = [tokenizer.encode(text) for text in _texts(options.prompt, len(pairs))]
    longest = max(map(len, prompts))
    if longest + options.max_new_tokens > config.max_context:
        raise InputError(
            f"{longest} tokens of prompt and {options.max_new_tokens} new tokens: the model's context has "
            f"{config.max_context}"
        )
    with running(
        options.instances,
        model=options.model,
        max_tokens=longest + options.max_new_tokens,
        max_requests=len(sources) + len(destinations),
        chunk=options.chunk,
        compute_dtype=options.compute_dtype,
        threads=options.threads,
        transfer=TransferConfig(trace=True),
    ) as instances:
        expected = _single_process(options, prompts, [sources[prefill].pool for prefill, _ in pairs])
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
        _result(request, run, tokens, tokenizer) for request, run, tokens in zip(requests, runs, expected, strict=True)
    ]
    return _summary(options, results, routes, counters, config.num_layers), [run.spans for run in runs]


def _check(options: DemoOptions) -> None:
    if DType.parse(options.compute_dtype) not in (DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16):
        raise InputError(f"compute dtype {options.compute_dtype}: must be float32, float16 or bfloat16")
    for name, value in (("threads", options.threads), ("requests", options.requests), ("chunk", options.chunk)):
        if value is not None and value < 1:
            raise InputError(f"{value} {name}: must be at least 1")
    if options.max_new_tokens < 1 or not options.prompt.strip():
        raise InputError(
            f"a prompt of {len(options.prompt.split())} words, {options.max_new_tokens} new tokens: both must be at "
            "least 1"
        )


def _round_robin(prefills: int, decodes: int, requests: int | None) -> Iterator[tuple[int, int]]:
    """Each side in turn; the decode side is shifted by one where pairs would come again before all have come."""
    for index in range(requests or prefills * decodes):
        shift = index // lcm(prefills, decodes) % gcd(prefills, decodes)
        yield index % prefills, (index + shift) % decodes


def _texts(prompt: str, count: int) -> Iterator[str]:
    """Each request leaves out one more word at the beginning, so that no two are alike and a mix-up is seen."""
    words = [match.start() for match in re.finditer(r"\S+", prompt)]
    for index in range(count):
        yield prompt[words[index % len(words)] :] if index else prompt


def _route_all(requests: Sequence[Request], options: DemoOptions) -> list[Run]:
    """All requests at once, each instance serving one at a time; the first error ends the wait."""
    width = len(options.instances)  # no more requests under way than the pools have room for
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


def _result(request: Request, run: Run, expected: list[int], tokenizer: TextTokenizer) -> RequestResult:
    tokens = run.decoded[0].tokens
    return RequestResult(
        prefill=request.prefiller.plan.name,
        decode=request.decoder.plan.name,
        identical=all(rank.tokens == expected for rank in run.decoded),
        prompt_tokens=len(request.prompt),
        generated_tokens=len(tokens),
        text=tokenizer.decode(tokens),
        single_process_text=tokenizer.decode(expected),
        **times(run)._asdict(),
    )


def _summary(
    options: DemoOptions, requests: list[RequestResult], routes: list[RouteBytes], counters: dict[str, int], layers: int
) -> DemoResult:
    sides = {instance.role: instance.pool for instance in reversed(options.instances)}
    return DemoResult(
        identical=all(request.identical for request in requests),
        generated_tokens=sum(request.generated_tokens for request in requests),
        text=requests[0].text,
        single_process_text=requests[0].single_process_text,
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


def _single_process(
    options: DemoOptions, prompts: Sequence[list[int]], pools: Sequence[SideOptions]
) -> list[list[int]]:
    """What one process generates from each prompt with a pool of the given kind."""
    torch.set_num_threads(options.threads)
    model = Decoder.load(options.model, DType.parse(options.compute_dtype).torch)
    expected = []
    for prompt, side in zip(prompts, pools, strict=True):
        blocks = -(-(len(prompt) + options.max_new_tokens) // side.block_size)
        pool = KVPool.allocate(model.kv_spec, blocks, layout=side.layout, block_size=side.block_size, dtype=side.dtype)
        expected.append(generate(model, prompt, options.max_new_tokens, pool, chunk=options.chunk))
    return expected
