"""`hetkv demo` without its command line: two workers with unlike pools, and one process to compare."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from hetkv.config import TransferConfig
from hetkv.dtypes import DType
from hetkv.errors import InputError
from hetkv.pool import KVPool
from hetkv.runtime.tokenizer import TextTokenizer
from hetkv.runtime.worker import DecodeResult, PrefillResult, WorkerConfig, WorkerHandle
from hetkv.trace import Span

Rendezvous = Literal["concurrent", "prefill_first"]
MODEL = Path(__file__).parents[1] / "models" / "demo"
PROMPT = """\
And Joseph fell upon his father's face, and wept upon him, and kissed him.
And Joseph commanded his servants the physicians to embalm his father: and the physicians embalmed Israel.
And forty days were fulfilled for him; for so are fulfilled the days of those which are embalmed: and the Egyptians \
mourned for him threescore and ten days.
And when the days of his"""
"""From a chapter that the demo checkpoint has not seen (Genesis 50); it ends inside a block of either pool."""


class SideOptions(msgspec.Struct, frozen=True, kw_only=True):
    """One side's pool."""

    block_size: int
    layout: str
    dtype: str = "bfloat16"


class DemoOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What `hetkv demo` takes."""

    model: str = str(MODEL)
    prompt: str = PROMPT
    max_new_tokens: int = 96
    prefill: SideOptions = SideOptions(block_size=16, layout="nhd")
    decode: SideOptions = SideOptions(block_size=64, layout="rocm")
    compute_dtype: str = "float32"
    chunk: int | None = None
    rendezvous: Rendezvous = "concurrent"
    threads: int = 1


class DemoResult(msgspec.Struct, kw_only=True):
    """What `hetkv demo --json` writes. Times are milliseconds on one clock."""

    identical: bool
    """The tokens of the two workers equal those of a single process with the prefill side's pool."""
    generated_tokens: int
    text: str
    single_process_text: str
    prompt_tokens: int
    layers: int
    frames: int
    payload_bytes: int
    direct_frames: int
    """Frames that were stored straight into the receiver's window; the others were staged and put."""
    ttft_ms: float
    """From the start of the prefill until the decode worker has the first token and all KV."""
    prefill_ms: float
    transfer_ms: float
    """From the first layer handed over until the last layer is verified in the decode pool."""
    exposed_transfer_ms: float
    """The part of it behind the end of the prefill's compute: what the transfer adds to TTFT. 0: nothing."""
    tpot_ms: float
    rendezvous: str
    prefill: SideOptions
    decode: SideOptions
    model: str


def run_demo(options: DemoOptions) -> tuple[DemoResult, list[Span]]:
    """Start the two workers, move one request between them twice (the first run warms up), and compare."""
    _check(options)
    prompt, single, tokenizer = _single_process(options)
    transfer = TransferConfig(trace=True)
    secret = secrets.token_bytes(32)

    def worker(role: str, side: SideOptions) -> WorkerHandle:
        return WorkerHandle(
            WorkerConfig(
                role=role,
                instance=f"{role}-0",
                model=options.model,
                layout=side.layout,
                block_size=side.block_size,
                kv_dtype=side.dtype,
                compute_dtype=options.compute_dtype,
                max_tokens=len(prompt) + options.max_new_tokens,
                chunk=options.chunk,
                threads=options.threads,
                secret=secret,
                transfer=transfer,
            )
        )

    handles = [worker("prefill", options.prefill), worker("decode", options.decode)]
    prefiller, decoder = handles
    try:
        for handle in handles:
            handle.result()
        decoder.call("connect", prefiller.call("listen"))
        before = _route(options, prefiller, decoder, prompt, "warm-up", 1)
        run = _route(options, prefiller, decoder, prompt, "request", options.max_new_tokens)
    finally:
        for handle in handles:
            handle.close()
    result = DemoResult(
        identical=run.decoded.tokens == single,
        generated_tokens=len(run.decoded.tokens),
        text=tokenizer.decode(run.decoded.tokens),
        single_process_text=tokenizer.decode(single),
        prompt_tokens=len(prompt),
        layers=max(span.layer for span in run.prefilled.spans) + 1,
        frames=run.sender_stats["frames"] - before.sender_stats["frames"],
        payload_bytes=run.sender_stats["payload_bytes"] - before.sender_stats["payload_bytes"],
        direct_frames=run.sender_stats["direct_frames"] - before.sender_stats["direct_frames"],
        ttft_ms=(run.decoded.first_token_ns - run.prefilled.start_ns) / 1e6,
        prefill_ms=(run.prefilled.stop_ns - run.prefilled.start_ns) / 1e6,
        transfer_ms=(run.decoded.kv_ns - run.prefilled.first_send_ns) / 1e6,
        exposed_transfer_ms=max(0, run.decoded.kv_ns - run.prefilled.stop_ns) / 1e6,
        tpot_ms=(run.decoded.stop_ns - run.decoded.first_token_ns) / 1e6 / max(len(run.decoded.tokens) - 1, 1),
        rendezvous=options.rendezvous,
        prefill=options.prefill,
        decode=options.decode,
        model=options.model,
    )
    return result, [*run.prefilled.spans, *run.wire_spans, *run.decoded.spans]


class _Run(NamedTuple):
    """One request through both workers."""

    prefilled: PrefillResult
    decoded: DecodeResult
    wire_spans: list[Span]
    sender_stats: dict[str, int]


def _check(options: DemoOptions) -> None:
    """Everything that would otherwise fail somewhere inside a worker."""
    for name, side in (("prefill", options.prefill), ("decode", options.decode)):
        if side.block_size < 1:
            raise InputError(f"{name}: block size {side.block_size} must be at least 1")
        if DType.parse(side.dtype) in (DType.INT8, DType.UINT8):
            raise InputError(f"{name}: the runtime does not compute with {side.dtype} KV")
    if DType.parse(options.compute_dtype) not in (DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16):
        raise InputError(f"compute dtype {options.compute_dtype}: must be float32, float16 or bfloat16")
    if options.threads < 1:
        raise InputError(f"{options.threads} threads: must be at least 1")


def _route(
    options: DemoOptions, prefiller: WorkerHandle, decoder: WorkerHandle, prompt: list[int], request: str, tokens: int
) -> _Run:
    """Route one request, in the order of the rendezvous mode."""
    if options.rendezvous == "concurrent":
        decoder.call("accept", request, len(prompt), tokens)
        prefilled = prefiller.call("prefill", request, prompt)
    else:
        prefilled = prefiller.call("prefill", request, prompt)
        decoder.call("accept", request, len(prompt), tokens)
    decoded = decoder.call("decode", request, prefilled.first_token, tokens)
    return _Run(prefilled, decoded, *prefiller.call("finish", request))


def _single_process(options: DemoOptions) -> tuple[list[int], list[int], TextTokenizer]:
    """Prompt ids, what one process with the prefill side's pool generates, and the tokenizer."""
    import torch

    from hetkv.runtime.generate import generate
    from hetkv.runtime.model import Decoder

    torch.set_num_threads(options.threads)
    tokenizer = TextTokenizer.load(options.model)
    prompt = tokenizer.encode(options.prompt)
    model = Decoder.load(options.model, DType.parse(options.compute_dtype).torch)
    side = options.prefill
    pool = KVPool.allocate(
        model.kv_spec,
        -(-(len(prompt) + options.max_new_tokens) // side.block_size),
        layout=side.layout,
        block_size=side.block_size,
        dtype=side.dtype,
    )
    return prompt, generate(model, prompt, options.max_new_tokens, pool, chunk=options.chunk), tokenizer
