"""The measured data sets as fitting problems: rows to work, constants to predictions, levels of each constant."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hetkv.costmodel.calibration.datasets import BatchRow, ServingRow, Side, StepRow
from hetkv.costmodel.calibration.fit import STEP_NAMES, Array, Layout, Level, Prior, Values, layout
from hetkv.costmodel.catalogue import Catalogue
from hetkv.costmodel.efficiency import Constants
from hetkv.costmodel.memory import kv_capacity_tokens
from hetkv.costmodel.models import model_shape
from hetkv.costmodel.serving import Load, Loop, LoopConstants, aggregated, disaggregated, static_batch
from hetkv.costmodel.step import Placement, Work, coefficients, count_work, seconds
from hetkv.errors import InputError

CHUNK = 8192.0
"""Tokens of one step that the engines of the serving data allow by default."""


def _column(rows: Sequence[Any], get: Callable[[Any], float]) -> Array:
    return np.array([get(row) for row in rows], dtype=np.float64)


def stack(works: Sequence[Work]) -> Work:
    """One `Work` whose fields are arrays, one element for each of `works`."""
    return Work(*(np.array(column, dtype=np.float64) for column in zip(*works, strict=True)))


def constants_of(values: Values) -> Constants:
    """`Constants` whose fields are arrays; they come from bounded priors and skip the check of single values."""
    found = Constants.__new__(Constants)
    for name in STEP_NAMES:
        object.__setattr__(found, name, values[name])
    return found


class StaticSteps:
    """Splitwise: time of the prompt step and mean time of a decode step of a static batch."""

    def __init__(self, rows: Sequence[StepRow], catalogue: Catalogue) -> None:
        self.rows = rows
        self.work = stack(
            [count_work(catalogue.gpu(r.gpu), model_shape(r.model), Placement(r.tp), "bf16", "bf16") for r in rows]
        )
        self.batch, self.prompt = _column(rows, lambda r: r.batch), _column(rows, lambda r: r.prompt)
        self.output = _column(rows, lambda r: r.output)
        self.prompt_s, self.token_s = _column(rows, lambda r: r.prompt_s), _column(rows, lambda r: r.token_s)

    def predict(self, values: Values) -> tuple[Array, Array]:
        """Prompt seconds and seconds per token of each row."""
        k, zero = coefficients(self.work, constants_of(values)), 0 * self.batch
        pairs = self.batch * self.prompt * (self.prompt + 1) / 2
        prompt_s = seconds(k, zero, zero, self.batch * self.prompt, pairs)
        token_s = seconds(k, self.batch, self.batch * (self.prompt + self.output / 2), zero, zero)
        return np.asarray(prompt_s), np.asarray(token_s)

    def residuals(self, values: Values) -> Array:
        prompt_s, token_s = self.predict(values)
        return np.concatenate([np.log(prompt_s / self.prompt_s), np.log(token_s / self.token_s)])

    @staticmethod
    def layout() -> Layout:
        """An eager engine: the host's launches bound small steps, and large messages leave the engine's all-reduce.

        The all-reduce tables hold eager rows too, not fitted here: at small messages they are 4.5 (H100) to 8 times
        (A100) the captured ones, so the start of `reduce_latency`.
        """
        names = (
            "gemm_bytes gemm_flops kv_bytes attention_flops layer_s sequence_layer_s host_layer_s sequence_s prompt_s "
            "prompt_layer_s reduce reduce_latency reduce_large"
        )
        priors = {
            "layer_s": Prior(40e-6, 1e-6, 500e-6, 0.5),
            "sequence_layer_s": Prior(3e-6, 1e-8, 100e-6, 1.0),
            "host_layer_s": Prior(300e-6, 1e-6, 3e-3, 1.0),
            "sequence_s": Prior(200e-6, 1e-6, 2e-3, 0.7),
            "prompt_s": Prior(3e-3, 1e-5, 0.1, 1.0),
            "prompt_layer_s": Prior(100e-6, 1e-6, 3e-3, 1.0),
            "reduce": Prior(1.5, 0.1, 10.0, 1.0),
            "reduce_latency": Prior(5.0, 0.5, 20.0, 0.3),
            "reduce_large": Prior(2.0, 0.5, 8.0, 1.0),
        }
        fixed = {"step_s": 1e-4, "reduce_switch_bytes": 48 * 2.0**20}
        return layout(names.split(), {"": (Level(lambda r: r.gpu, 0.15),)}, fixed, priors)


class StaticBatches:
    """LLM-Inference-Bench: latency of a whole batch. One number cannot separate prompt and token time."""

    def __init__(self, rows: Sequence[BatchRow], catalogue: Catalogue) -> None:
        self.rows = rows
        self.work = stack(
            [count_work(catalogue.gpu(r.gpu), model_shape(r.model), Placement(r.tp), "bf16", "bf16") for r in rows]
        )
        self.capacity = _column(rows, lambda r: capacity(catalogue, r.gpu, r.model, Side(r.tp, 1), "bf16", "bf16"))
        self.batch, self.length = _column(rows, lambda r: r.batch), _column(rows, lambda r: r.length)
        self.latency_s = _column(rows, lambda r: r.latency_s)

    def predict(self, values: Values) -> Array:
        """Seconds of each whole batch."""
        k = coefficients(self.work, constants_of(values))
        room = self.capacity / (self.length * (1 + values["answer"]))
        return static_batch(k, self.batch, self.length, self.length, room) + values["accept_s"]

    def residuals(self, values: Values) -> Array:
        return np.asarray(np.log(self.predict(values) / self.latency_s))

    @staticmethod
    def layout(gpu_width: float = 0.1) -> Layout:
        """Constants by engine, small offsets by GPU. `answer`: share of the output that an engine keeps room for."""
        levels = (Level(lambda r: r.engine, 0.3), Level(lambda r: (r.engine, r.gpu), gpu_width))
        return layout(BATCH_NAMES, {"": levels}, {"accept_s": 0.0}, BATCH_PRIORS)

    @staticmethod
    def own_layout(priors: Mapping[str, Prior] | None = None) -> Layout:
        """To fit one hardware, from generic priors or from those of other hardware, with small offsets by TP.

        `accept_s` is a start-up in the latency. What a kernel does with a key or a row does not depend on TP.
        """
        levels: dict[str, tuple[Level, ...]] = {
            "": (Level(lambda r: r.tp, 0.2),),
            "accept_s": (Level(lambda r: r.tp, 1.0),),
        }
        levels |= dict.fromkeys(("gemm_flops", "kv_group", "kv_unsplit"), ())
        return layout((*BATCH_NAMES, "accept_s"), levels, None, {**BATCH_PRIORS, **(priors or {})})


BATCH_NAMES = (
    "gemm_bytes", "gemm_flops", "few_rows_flops", "kv_bytes", "kv_group", "kv_unsplit", "layer_s", "host_layer_s",
    "step_s", "sequence_s", "reduce", "answer",
)  # fmt: skip
BATCH_PRIORS = {
    "gemm_flops": Prior(0.6, 0.05, 1.0, 0.2),
    "few_rows_flops": Prior(0.6, 0.005, 1.0, 1.5),
    "kv_group": Prior(0.3, 0.001, 1.2, 1.0),
    "kv_unsplit": Prior(1.2, 1.0, 10.0, 0.7),
    "layer_s": Prior(20e-6, 1e-6, 2e-3, 0.5),
    "host_layer_s": Prior(50e-6, 1e-7, 5e-3, 1.0),
    "sequence_s": Prior(50e-6, 1e-7, 5e-3, 1.0),
    "step_s": Prior(500e-6, 1e-5, 0.1, 1.0),
    "reduce": Prior(1.0, 0.1, 8.0, 0.5),
    "answer": Prior(1.0, 0.3, 1.5, 0.3),
    "accept_s": Prior(50e-3, 1e-4, 60.0, 2.0),
}
"""A whole batch's latency does not separate prompt from token time, so the prior of `gemm_flops` is narrow."""


def shape_name(model: str) -> str:
    """The model's shape: DeepSeek-R1 and V3 have one."""
    name = model_shape(model).name if model else ""
    return "DeepSeek-V3" if name == "DeepSeek-R1" else name


def kv_dtype(row: ServingRow) -> str:
    """The serving data do not record it: engines that run fp8 weights there were started with an fp8 KV cache."""
    return "fp8" if row.dtype == "fp8" else "bf16"


def capacity(catalogue: Catalogue, gpu: str, model: str, side: Side, dtype: str, kv: str) -> float:
    """KV tokens of one instance. A configuration that was measured although it should not fit gets room for one."""
    try:
        shape, place = model_shape(model), catalogue.gpu(gpu)
        return float(kv_capacity_tokens(place, shape, side.tp, 1, side.dp, dtype, kv, int(CHUNK), 0.9))
    except InputError:
        return 1.0


class ServingLoops:
    """`disaggregated_hopper.csv`: TTFT and TPOT of closed loops."""

    def __init__(self, rows: Sequence[ServingRow], catalogue: Catalogue) -> None:
        self.rows = rows
        self.decode = stack([self._work(r, r.decode, catalogue) for r in rows])
        self.prefill = stack([self._work(r, r.prefill or r.decode, catalogue) for r in rows])
        self.separate = np.array([r.disaggregated for r in rows])
        self.prefill_workers = _column(rows, lambda r: (r.prefill or r.decode).workers)
        self.decode_workers = _column(rows, lambda r: r.decode.workers)
        tokens = _column(rows, lambda r: capacity(catalogue, r.gpu, r.model, r.decode, r.dtype, kv_dtype(r)))
        self.load = Load(
            _column(rows, lambda r: r.concurrency), _column(rows, lambda r: r.prompt), _column(rows, lambda r: r.output)
        )
        self.room = tokens / (self.load.prompt + self.load.output)
        self.has_ttft = np.array([r.ttft_s > 0 for r in rows])
        self.ttft_s = np.where(self.has_ttft, _column(rows, lambda r: r.ttft_s), 1.0)
        self.tpot_s = _column(rows, lambda r: r.tpot_s)

    @staticmethod
    def _work(row: ServingRow, side: Side, catalogue: Catalogue) -> Work:
        place = Placement(side.tp, 1, side.dp)
        return count_work(catalogue.gpu(row.gpu), model_shape(row.model), place, row.dtype, kv_dtype(row))

    def predict(self, values: Values) -> Loop:
        """TTFT and TPOT of each row."""
        c = constants_of(values)
        around = LoopConstants(
            values["front_request_s"],
            values["front_token_s"],
            values["interleave"],
            values["burst"],
            values["accept_s"],
        )
        k = coefficients(self.decode, c)
        found = aggregated(k, self.load, self.room, CHUNK, around)
        if not self.separate.any():
            return found
        zero = 0.0 * self.load.prompt
        separate = disaggregated(
            coefficients(self.prefill, c),
            k,
            self.load,
            self.prefill_workers,
            self.decode_workers,
            self.room,
            CHUNK,
            zero,
            around,
        )
        return Loop(*(np.where(self.separate, a, b) for a, b in zip(separate, found, strict=True)))

    def first_token_residuals(self, steps: Values) -> Callable[[Values], Array]:
        """Residuals of TTFT in the constants that only TTFT has, with the fitted step constants `steps` held."""

        def residuals(values: Values) -> Array:
            chosen = {**steps, "burst": values["burst"], "accept_s": values["accept_s"]}
            return np.asarray(np.log(self.predict(chosen).ttft_s / self.ttft_s))

        return residuals

    @staticmethod
    def first_token_layout() -> Layout:
        source = Level(lambda r: r.source, 0.7)
        return layout(("burst", "accept_s"), {"": (source, Level(lambda r: (r.source, r.engine), 0.5))})

    def residuals(self, values: Values) -> Array:
        """Of TPOT alone: a TTFT also holds the load generator's own queueing, which would bend the step constants."""
        return np.asarray(np.log(self.predict(values).tpot_s / self.tpot_s))

    def errors(self, values: Values) -> Array:
        """log(measured / predicted) of TTFT and TPOT, NaN where a TTFT was not measured; shape (2, rows)."""
        loop = self.predict(values)
        first = np.where(self.has_ttft, np.log(self.ttft_s / loop.ttft_s), np.nan)
        return np.stack([first, np.log(self.tpot_s / loop.tpot_s)])

    @staticmethod
    def layout(experts: bool = False, models: bool = True) -> Layout:
        """Constants by engine; what depends on kernels also by dtype and by (engine, version, GPU, dtype).

        An engine's kernels are tuned for a model's shapes: with `models`, each model of a set-up has an offset of its
        own. For a model that was not measured, fit without: then all of its set-up goes to what models have in common.
        """
        names = (
            "gemm_bytes gemm_flops kv_bytes attention_flops layer_s step_s sequence_s prompt_s prompt_layer_s reduce "
            "front_token_s front_request_s interleave"
        )
        if experts:
            names += " expert_bytes expert_flops"
        engine = Level(lambda r: r.engine, 0.3)
        exact = Level(lambda r: (r.engine, r.version, r.gpu, r.dtype), 0.1)
        own = (Level(lambda r: (shape_name(r.model), r.engine, r.version, r.gpu, r.dtype), 0.3),) if models else ()
        levels = {
            "": (engine, *own),
            "gemm_flops": (Level(lambda r: r.dtype, 0.4), engine._replace(width=0.15), exact, *own),
            "layer_s": (engine, Level(lambda r: (r.engine, r.dtype), 0.15), exact, *own),
            "expert_bytes": (engine, exact, *own),
            "expert_flops": (Level(lambda r: r.dtype, 0.4), engine._replace(width=0.15), exact, *own),
            "interleave": (Level(lambda r: r.source, 0.03),),
        }
        levels |= dict.fromkeys(("prompt_s", "front_token_s", "front_request_s"), (engine,))
        return layout(names.split(), levels, None, {"interleave": Prior(0.95, 0.4, 1.1, 0.03)})
