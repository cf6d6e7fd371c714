"""The step time: operations and bytes of one engine step, divided by what the GPU and the engine reach.

`docs/cost-model.md` derives each term. The same function serves one step (floats) and calibration (numpy arrays), so it
uses operators only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hetkv.costmodel.catalogue import DTYPE_BYTES, Gpu
from hetkv.costmodel.collectives import all_reduce, exchange
from hetkv.costmodel.efficiency import Constants, Efficiency
from hetkv.costmodel.interface import Estimate, StepModel
from hetkv.costmodel.memory import kv_capacity_tokens, request_bytes
from hetkv.costmodel.models import ModelShape
from hetkv.costmodel.request_bytes import RequestBytes
from hetkv.errors import InputError

Array = NDArray[np.float64]

ACTIVATION_BYTES = 2
FEW_ROWS = 256.0
"""Rows of a matrix product up to which `few_rows_flops` holds. Rows of prompts do not count: they come in hundreds."""
UNSPLIT_HEADS = 512.0
"""Sequences times query heads of a rank beyond which vLLM's paged attention no longer splits the keys of one sequence
over several blocks of threads (its v1 and v2 kernels); `kv_unsplit` holds beyond."""


class Work(NamedTuple):
    """One instance's work in seconds at the catalogue's peaks, one rank, all layers. `_s` terms multiply the counts.

    `tokens` are all tokens of the step (decode and prompt). Fields may be numpy arrays, one element per configuration.
    """

    layers: Any
    dense_bytes_s: Any
    dense_s_per_token: Any
    head_bytes_s: Any
    head_s_per_sequence: Any
    expert_bytes_s: Any
    expert_s_per_token: Any
    expert_miss: Any
    kv_s_per_token: Any
    kv_group: Any
    query_heads: Any
    sliding_s_per_token: Any
    sliding_window: Any
    state_s_per_sequence: Any
    pair_s: Any
    sliding_pair_s: Any
    reduce_small_s: Any
    reduce_small_s_per_token: Any
    reduce_large_s: Any
    reduce_large_s_per_token: Any
    token_bytes: Any
    host_speed: Any


@dataclass(frozen=True)
class Placement:
    """How one instance is split: `tp` ranks share heads, `dp` attention replicas share the experts, `pp` stages.

    With several replicas the experts are expert parallel: whole, spread over all `ep` ranks. With one they are split
    like an MLP: whole ones would take the same bytes, operations and all-reduces, in uneven parts.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "dp"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"`{name}` must be a whole number of at least 1, got {value!r}")

    @property
    def gpus(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def ep(self) -> int:
        """Ranks that have whole experts; 1 where every rank has a part of each. Engines make it `tp * dp`."""
        return self.tp * self.dp if self.dp > 1 else 1


def count_work(gpu: Gpu, model: ModelShape, place: Placement, weight_dtype: str, kv_dtype: str) -> Work:
    """Operations and bytes of `model` on one rank of `place`, over the peaks of `gpu`.

    Raises `InputError` when a dtype is unknown, a figure is missing, or there are more stages than layers.
    """
    if kv_dtype not in DTYPE_BYTES:
        raise InputError(f"unknown KV dtype {kv_dtype!r}; known are {', '.join(DTYPE_BYTES)}")
    if place.pp > model.layers:
        raise InputError(f"{model.name} has {model.layers} layers, too few for {place.pp} pipeline stages")
    bandwidth, shards = gpu.memory_bandwidth, place.tp * place.dp
    dense_dtype = "bf16" if model.experts_only_quantised else weight_dtype
    dense_bytes = model.dense_params * DTYPE_BYTES[dense_dtype] / place.tp
    kv_bytes = model.kv_elements_per_token(place.tp) * DTYPE_BYTES[kv_dtype] / max(1, model.attention_layers)
    bf16, expert_flops = gpu.flops("bf16"), gpu.flops(weight_dtype)
    pair_flops = 2 * model.heads / shards * (model.qk_dim + model.v_dim)
    reduce_s, swap = all_reduce(gpu, place.tp), exchange(gpu, shards if place.dp > 1 else 1)
    reduces, swaps = 2 * model.layers, 2 * model.moe_layers
    token_bytes = model.hidden * ACTIVATION_BYTES / place.dp
    swap_bytes = model.experts_per_token * token_bytes / place.tp
    swap_s, swap_s_per_token = swaps * swap.small_s, swaps * swap.small_s_per_byte * swap_bytes
    latent_absorbed = model.kv_elements * 4 * model.heads / shards if model.latent else 0
    kv_s = max(kv_bytes / place.dp / bandwidth, latent_absorbed / bf16)
    full, sliding, window = model.full_layers, model.sliding_layers, model.sliding_window
    if model.index_topk:
        full, sliding, window = 0, model.full_layers, model.index_topk
    return Work(
        layers=model.layers,
        dense_bytes_s=dense_bytes / bandwidth,
        dense_s_per_token=2 * model.dense_params / shards / gpu.flops(dense_dtype),
        head_bytes_s=model.head_params * 2 / place.tp / bandwidth,
        head_s_per_sequence=2 * model.head_params / shards / bf16,
        expert_bytes_s=model.routed_params * DTYPE_BYTES[weight_dtype] / shards / bandwidth,
        expert_s_per_token=2 * model.moe_layers * model.experts_per_token * model.expert_params / shards / expert_flops,
        expert_miss=1 - model.experts_per_token / model.experts if model.experts else 1.0,
        kv_s_per_token=full * kv_s,
        kv_group=1.0 if model.latent else max(1.0, model.heads / model.kv_heads),
        query_heads=model.heads / place.tp,
        sliding_s_per_token=sliding * kv_s,
        sliding_window=float(window),
        state_s_per_sequence=2 * model.state_layers * model.state_elements * 4 / shards / bandwidth,
        pair_s=full * pair_flops / bf16,
        sliding_pair_s=sliding * pair_flops / bf16,
        reduce_small_s=reduces * reduce_s.small_s + swap_s,
        reduce_small_s_per_token=reduces * reduce_s.small_s_per_byte * token_bytes + swap_s_per_token,
        reduce_large_s=reduces * reduce_s.large_s + swap_s,
        reduce_large_s_per_token=reduces * reduce_s.large_s_per_byte * token_bytes + swap_s_per_token,
        token_bytes=token_bytes,
        host_speed=gpu.value("host_speed"),
    )


def coefficients(work: Work, c: Constants) -> tuple[Any, ...]:
    """Fold constants into work, so that a step is a few multiplications: the groups that `seconds` unpacks."""
    host = 1 / work.host_speed
    kv_reads = work.kv_group**c.kv_group / c.kv_bytes
    dense = (
        (work.dense_bytes_s / c.gemm_bytes) ** 4,
        work.dense_s_per_token / c.gemm_flops,
        work.head_bytes_s / c.gemm_bytes + work.layers * c.layer_s + work.reduce_small_s * c.reduce_latency,
        work.head_s_per_sequence * (1 / c.gemm_flops + 1 / c.few_rows_flops - 1)
        + work.state_s_per_sequence / c.kv_bytes
        + work.layers * c.sequence_layer_s,
        work.kv_s_per_token * kv_reads,
        work.pair_s / c.attention_flops,
    )
    experts = (work.expert_bytes_s / c.expert_bytes, work.expert_s_per_token / c.expert_flops, work.expert_miss)
    sliding = (work.sliding_s_per_token * kv_reads, work.sliding_pair_s / c.attention_flops, work.sliding_window)
    reduce = (
        work.reduce_small_s_per_token * c.reduce,
        (work.reduce_large_s - work.reduce_small_s) * c.reduce_latency,
        (work.reduce_large_s_per_token * c.reduce_large - work.reduce_small_s_per_token) * c.reduce,
        c.reduce_switch_bytes / work.token_bytes,
    )
    launch = (work.layers * c.host_layer_s * host, work.layers * c.prompt_layer_s * host)
    serial = (c.step_s * host, c.sequence_s * host, c.prompt_s * host)
    few_rows = work.dense_s_per_token * (1 / c.few_rows_flops - 1)
    unsplit = (c.kv_unsplit - 1, UNSPLIT_HEADS / work.query_heads)
    return (
        *dense,
        *reduce,
        *launch,
        *serial,
        few_rows if _any(few_rows) else None,
        unsplit if _any(unsplit[0]) else None,
        experts if _any(work.expert_bytes_s) else None,
        sliding if _any(work.sliding_window) else None,
    )


def _any(value: Any) -> bool:
    """Whether a float or an array holds anything but zero."""
    return bool(value.any()) if hasattr(value, "any") else bool(value)


def seconds(k: tuple[Any, ...], batch: Any, context: Any, prompt: Any, pairs: Any) -> Any:
    """Time of one step of `batch` decoding sequences holding `context` tokens, with `prompt` tokens of `pairs` pairs.

    Bytes and operations of the same kernels meet in a 4-norm: the larger one, a little more where they are equal. So do
    the GPU's time and the host's launch time, in an 8-norm.
    """
    (
        gb,
        gf,
        fixed,
        seq,
        kv,
        pr,
        r1,
        s0,
        s1,
        cut,
        host,
        hlaunch,
        step,
        hseq,
        hprompt,
        few_rows,
        unsplit,
        experts,
        sliding,
    ) = k
    tokens = batch + prompt
    flop = gf * tokens
    if few_rows is not None:
        flop = flop + few_rows * 0.5 * (batch + FEW_ROWS - abs(batch - FEW_ROWS))
    crowded = 1.0
    if unsplit is not None:
        crowded = 1 + unsplit[0] * (batch > unsplit[1])
        kv = kv * crowded
    flop = flop * flop
    device = (gb + flop * flop) ** 0.25 + fixed + seq * batch + kv * context + pr * pairs
    device = device + r1 * tokens + (tokens > cut) * (s0 + s1 * tokens)
    if experts is not None:
        byte_s, flop_s, miss = experts
        byte, flop = byte_s * (1 - miss**tokens), flop_s * tokens
        byte, flop = byte * byte, flop * flop
        device = device + (byte * byte + flop * flop) ** 0.25
    if sliding is not None:
        kv, pr, length = sliding
        held, reach = length * batch, length * prompt
        device = device + kv * crowded * 0.5 * (context + held - abs(context - held))
        device = device + pr * 0.5 * (pairs + reach - abs(pairs - reach))
    mixed = prompt > 0
    host = host + hlaunch * mixed
    device, host = device * device, host * host
    device, host = device * device, host * host
    return (device * device + host * host) ** 0.125 + step + hseq * batch + hprompt * mixed


class RooflineStepModel(StepModel):
    """`StepModel` of one instance. `efficiency.fallback` says when nothing was measured for the combination."""

    def __init__(
        self,
        gpu: Gpu,
        model: ModelShape,
        place: Placement,
        efficiency: Efficiency,
        weight_dtype: str,
        kv_dtype: str,
        max_batched_tokens: int,
        memory_share: float,
        hybrid_kv_cache: bool = True,
    ) -> None:
        self.gpu, self.model, self.place, self.efficiency = gpu, model, place, efficiency
        self.work = count_work(gpu, model, place, weight_dtype, kv_dtype)
        self._coefficients = coefficients(self.work, efficiency.constants)
        spans, confidence = efficiency.spans, efficiency.confidence
        self._decode_scale, self._prompt_scale = spans.decode.at(confidence), spans.prefill.at(confidence)
        self._without_experts = (*self._coefficients[:-2], None, self._coefficients[-1])
        self.stages = place.pp
        self.kv_element_bytes = DTYPE_BYTES[kv_dtype]
        self._chunk = max_batched_tokens * place.dp
        hop = model.hidden * ACTIVATION_BYTES
        self._hop_s = (place.pp - 1) * 10e-6 if place.pp > 1 else 0.0
        self._hop_s_per_token = (place.pp - 1) * hop / gpu.link_bandwidth(1) if place.pp > 1 else 0.0
        kv = request_bytes(model, place.tp, kv_dtype)
        self._kv = kv if hybrid_kv_cache else kv.merged()
        self._capacity = kv_capacity_tokens(
            gpu, model, place.tp, place.pp, place.dp, weight_dtype, kv_dtype, max_batched_tokens, memory_share
        )

    def step_seconds(
        self, decode_batch: int, decode_context: float, prefill_tokens: int = 0, prefill_pairs: float = 0.0
    ) -> float:
        """Central prediction of one step, see `StepModel`.

        With `pp` stages a decode step is the time in which every sequence advances once: the batch is cut into as many
        micro-batches as there are stages (fewer where it is smaller), and each of them passes through all stages.
        Prompt tokens pass through all stages in steps of the engine's budget; where more of them are asked for, the
        later ones follow one stage later.
        """
        scale = self._prompt_scale if prefill_tokens else self._decode_scale
        if self._simple:
            return float(
                scale * seconds(self._coefficients, decode_batch, decode_context, prefill_tokens, prefill_pairs)
            )
        parts = min(self.stages, max(1, decode_batch))
        cuts = min(self.stages, max(1, -(-prefill_tokens // self._chunk)))
        return float(scale * self._split(parts, cuts, decode_batch, decode_context, prefill_tokens, prefill_pairs))

    def step_seconds_of(self, batch: Array, context: Array, prompt: Array, pairs: Array) -> Array:
        """`step_seconds` of arrays of one shape."""
        scale = np.where(prompt > 0, self._prompt_scale, self._decode_scale)
        if self._simple:
            found: Array = scale * seconds(self._coefficients, batch, context, prompt, pairs)
            return found
        parts = np.minimum(self.stages, np.maximum(1, batch))
        cuts = np.minimum(self.stages, np.maximum(1, -(-prompt // self._chunk)))
        split: Array = scale * self._split(parts, cuts, batch, context, prompt, pairs)
        return split

    def step_share(self, decode_batch: Any, prefill_tokens: Any) -> Any:
        """Steps of prompts alone follow each other by one stage. A step with decoding sequences is a round of all."""
        if self.stages == 1:
            return 1.0
        cuts = np.minimum(self.stages, np.maximum(1, -(-prefill_tokens // self._chunk)))
        alone = (decode_batch <= 0) & (prefill_tokens > 0)
        return np.where(alone, 1 / self.stages, 1 / (1 + (cuts - 1) / self.stages))

    @property
    def _simple(self) -> bool:
        return self.stages == 1 and self.place.dp == 1

    def _split(self, parts: Any, cuts: Any, batch: Any, context: Any, prompt: Any, pairs: Any) -> Any:
        """Floats or arrays: decoding in `parts` micro-batches and prompts in `cuts`, the last of which ends the step.

        Of `dp` attention replicas only those work that have a prompt: with as many prompts as their pairs suggest (one
        of `n` tokens has about `n**2 / 2`), the fullest one has its share of them. Experts are shared by all.
        """
        batch, context, prompt, pairs = batch / parts, context / parts, prompt / cuts, pairs / cuts
        one = seconds(self._coefficients, batch, context, prompt, pairs)
        if self.place.dp > 1:
            prompts = prompt * prompt / np.maximum(2 * pairs, 1.0)
            crowd = self.place.dp / np.clip(prompts, 1.0, self.place.dp)
            one = one + seconds(self._without_experts, batch, context, prompt * crowd, pairs * crowd)
            one = one - seconds(self._without_experts, batch, context, prompt, pairs)
        hops = self._hop_s + self._hop_s_per_token * (batch + prompt)
        return (one + hops) * (1 + (cuts - 1) / self.stages)

    def step_estimate(
        self, decode_batch: int, decode_context: float, prefill_tokens: int = 0, prefill_pairs: float = 0.0
    ) -> Estimate:
        value = self.step_seconds(decode_batch, decode_context, prefill_tokens, prefill_pairs)
        spans = self.efficiency.spans_of(decode_batch)
        span, scale = (spans.prefill, self._prompt_scale) if prefill_tokens else (spans.decode, self._decode_scale)
        return Estimate(value, min(value, value / scale * span.low), max(value, value / scale * span.high))

    @property
    def kv_capacity_tokens(self) -> int:
        return self._capacity

    @property
    def kv_bytes_per_token(self) -> float:
        return self._kv.token

    @property
    def kv(self) -> RequestBytes:
        return self._kv
