"""`hetkv demo --shape` without its command line: random weights of a named shape, prefill to decode, timed.

The text means nothing, so nothing is compared with a checkpoint: what is shown is how long the prefill takes, how long
its KV travels, and how much of that is seen.
"""

from __future__ import annotations

import os
import statistics
from collections import Counter

import msgspec
import torch

from hetkv.errors import InputError
from hetkv.kv.dtypes import DType
from hetkv.models import ModelConfig
from hetkv.runtime.plan import InstancePlan, SideOptions, check_instances
from hetkv.runtime.processes import PATIENCE_S, link, running
from hetkv.runtime.request_flow import Rendezvous, Request, Times, counted, route, times
from hetkv.runtime.synthetic import shape, weight_bytes
from hetkv.runtime.timeline import Span
from hetkv.runtime.worker import pool_blocks
from hetkv.transport.config import TransferConfig


class TimingOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What `hetkv demo --shape` takes."""

    shape: str
    layers: int | None = None
    """The first ones alone; default: all."""
    prompt_tokens: int = 1024
    new_tokens: int = 16
    requests: int = 5
    """Timed ones, one after another, after one that warms up."""
    prefill: InstancePlan
    decode: InstancePlan
    """Of one rank each."""
    compute_dtype: str = "bfloat16"
    chunk: int | None = None
    rendezvous: Rendezvous = "concurrent"
    threads: int = 1


class TimingResult(msgspec.Struct, kw_only=True):
    """What `hetkv demo --shape --json` writes. Times are milliseconds, the medians of all requests."""

    shape: str
    layers: int
    weight_bytes: int
    """Of either side."""
    prompt_tokens: int
    generated_tokens: int
    """Of each request."""
    frames: int
    payload_bytes: int
    direct_frames: int
    """Of all requests, by the sender's counters: see `DemoResult`."""
    ttft_ms: float
    prefill_ms: float
    transfer_ms: float
    exposed_transfer_ms: float
    tpot_ms: float
    rendezvous: str
    compute_dtype: str
    prefill: SideOptions
    decode: SideOptions
    devices: list[str]
    """Of the prefill and of the decode."""
    requests: list[Times]


def run_timing(options: TimingOptions) -> tuple[TimingResult, list[list[Span]]]:
    """Start both sides and time the requests; also each request's timeline. `InputError` before any start."""
    config = shape(options.shape, options.layers)
    pair = (options.prefill, options.decode)
    _check(options, config)
    tokens = options.prompt_tokens + options.new_tokens
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(config.vocab_size, (options.prompt_tokens,), generator=generator).tolist()
    with running(
        pair,
        model=config,
        max_tokens=tokens,
        max_requests=1,
        chunk=options.chunk,
        compute_dtype=options.compute_dtype,
        threads=options.threads,
        transfer=TransferConfig(trace=True, lease_s=PATIENCE_S, hold_s=PATIENCE_S),
    ) as instances:
        link(instances)
        route(Request("warm-up", prompt, *instances), 2, options.rendezvous)
        before = counted(instances[:1])
        runs = [
            route(Request(f"request-{index}", prompt, *instances), options.new_tokens, options.rendezvous)
            for index in range(options.requests)
        ]
        counters = {name: count - before[name] for name, count in counted(instances[:1]).items()}
    measured = [times(run) for run in runs]
    result = TimingResult(
        shape=options.shape,
        layers=config.num_layers,
        weight_bytes=weight_bytes(config, DType.parse(options.compute_dtype).torch),
        prompt_tokens=options.prompt_tokens,
        generated_tokens=options.new_tokens,
        **counters,
        **{name: statistics.median(getattr(one, name) for one in measured) for name in Times._fields},
        rendezvous=options.rendezvous,
        compute_dtype=options.compute_dtype,
        prefill=options.prefill.pool,
        decode=options.decode.pool,
        devices=[str(instance.rank_device(0)) for instance in pair],
        requests=measured,
    )
    return result, [run.spans for run in runs]


def _check(options: TimingOptions, config: ModelConfig) -> None:
    dtype = DType.parse(options.compute_dtype)
    if dtype not in (DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16):
        raise InputError(f"compute dtype {options.compute_dtype}: must be float32, float16 or bfloat16")
    for name in ("prompt_tokens", "new_tokens", "requests", "threads", "chunk"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"{value} {name.replace('_', ' ')}: must be at least 1")
    tokens = options.prompt_tokens + options.new_tokens
    if tokens > config.max_context:
        raise InputError(
            f"{tokens} tokens of prompt and answer: the context of {options.shape} is {config.max_context}"
        )
    pair = (options.prefill, options.decode)
    check_instances(pair, config)
    if any(instance.ranks != 1 for instance in pair):
        raise InputError("a shape with random weights runs on one rank a side")
    needs: Counter[torch.device] = Counter()
    for instance in pair:
        needs[instance.rank_device(0)] += weight_bytes(config, dtype.torch) + _pool_bytes(instance, config, tokens)
    for device, need in needs.items():
        if need > (room := _memory(device)):
            raise InputError(
                f"weights ({dtype.value}) and KV of {config.num_layers} layers of {options.shape} need "
                f"{need / 1e9:.1f} GB on {device}, which has {room / 1e9:.1f} GB; --layers N takes its first N layers"
            )


def _pool_bytes(instance: InstancePlan, config: ModelConfig, tokens: int) -> int:
    side = instance.pool
    token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * DType.parse(side.dtype).itemsize
    return pool_blocks(tokens, 1, side.block_size) * side.block_size * token


def _memory(device: torch.device) -> int:
    """All of a device's memory, in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
