"""What the simulator is worth, measured: the sections of docs/simulator-accuracy.md."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from hetkv.costmodel import step_model
from hetkv.costmodel.calibration.report import section
from hetkv.simulator.deployment import LinkPlan, Plan, PoolPlan, Role
from hetkv.simulator.run import simulate
from hetkv.simulator.scaled import HIGH, LOW, ScaledStepModel
from hetkv.simulator.traffic.sources import Traffic
from hetkv.simulator.validation import closed_forms as closedforms
from hetkv.simulator.validation.serving_run import compare, first_third, fit, load_serving_run, replay

SERVING_RUN = "measured/vllm_serving_rtxpro6000_llama31_8b"
SEEDS = (1, 2, 3, 4)


@section("simulator-serving-run", 200)
def serving_run(data: Path) -> str:
    """Fitted on the first third, and with nothing fitted."""
    run = load_serving_run(data / SERVING_RUN)
    catalogue = step_model(
        "RTX-PRO-6000", "Llama-3.1-8B", engine="vllm", engine_version="0.19.0", max_batched_tokens=2048
    )
    capacity = catalogue.kv_capacity_tokens
    third = first_third(run)
    fitted = fit(run, third, third, capacity)
    horizon = run.last_token.max() / 3
    early = fit(run, run.first_token <= horizon, run.last_token <= horizon, capacity)
    whole = np.ones(len(run), dtype=bool)
    columns = [
        ("fitted, rest", compare(run, replay(run, fitted), ~third)),
        ("fitted, seen", compare(run, replay(run, fitted), third)),
        ("fitted early, rest", compare(run, replay(run, early), run.first_token > horizon)),
        ("none fitted, all", compare(run, replay(run, catalogue), whole)),
    ]
    low = compare(run, replay(run, ScaledStepModel(catalogue, LOW)), whole)
    high = compare(run, replay(run, ScaledStepModel(catalogue, HIGH)), whole)
    rows = [
        _row("TTFT p25", "s", columns, "ttft_p25"),
        _row("TTFT p50", "s", columns, "ttft_p50"),
        _row("TTFT p90", "s", columns, "ttft_p90"),
        _plain("TTFT, KS distance of the distributions", columns, "ttft_ks", "{:.3f}"),
        _row("TPOT p25", "ms", columns, "tpot_p25", 1e3),
        _row("TPOT p50", "ms", columns, "tpot_p50", 1e3),
        _row("TPOT p90", "ms", columns, "tpot_p90", 1e3),
        _plain("TPOT, KS distance", columns, "tpot_ks", "{:.3f}"),
        _plain("TPOT per request, bias (median signed error)", columns, "tpot_bias", "{:+.1%}"),
        _plain("TPOT per request, median error", columns, "tpot_median_error", "{:.1%}"),
        _plain("TPOT per request, p90 error", columns, "tpot_p90_error_each", "{:.1%}"),
        _pair("queue starts (s)", columns, "queue_start"),
        _pair("last token of the run (s)", columns, "end"),
        _plain("concurrency, mean gap over time (sequences)", columns, "concurrency_mean_gap", "{:.2f}"),
        _plain("concurrency, mean of the run (sequences)", columns, "concurrency_mean", "{:.1f}"),
    ]
    names = " | ".join(name for name, _ in columns)
    note = catalogue.efficiency.fallback or f"values of {catalogue.efficiency.key}"
    inside = {
        key: low[key] <= low[f"{key}_real"] <= high[key] for key in ("ttft_p50", "ttft_p90", "tpot_p50", "tpot_p90")
    }
    covered = ", ".join(f"{key} {'yes' if ok else 'no'}" for key, ok in inside.items())
    constants = ", ".join(f"{v:.3g}" for v in fitted.constants)
    rate = len(run) / run.queued.max()
    return f"""## Simulator against a real serving run

Llama-3.1-8B, vLLM 0.19.0, one RTX PRO 6000, {len(run)} requests at {rate:.1f} requests/s,
`max_num_seqs` {run.max_num_seqs}, `max_num_batched_tokens` {run.max_num_batched_tokens} ({SERVING_RUN}).
Arrivals (`queued_ts`) and lengths of all requests are input; TTFT counts from `queued_ts`. No request is
excluded. Each cell is simulated / measured and its signed error.
The queue starts with the first request that waits 0.5 s or more.

- *fitted*: five constants (seconds per step, decoding sequence, KV token, prompt token, step with prompts) fitted on
  the first third of the requests ({int(third.sum())}), judged on the rest: {constants}.
- *fitted early*: the same fit, but it may look only at times in the first third of the run's duration
  (before {horizon:.1f} s), judged on the requests whose first token came later.
- *none fitted*: the cost model's catalogue alone ({note}). Inside its 90 % interval:
  {covered}.

| | {names} |
|---|{"---|" * len(columns)}
{chr(10).join(rows)}
"""


Columns = list[tuple[str, dict[str, float]]]


def _row(label: str, unit: str, columns: Columns, key: str, scale: float = 1.0) -> str:
    cells = (f"{c[key] * scale:.3g} / {c[f'{key}_real'] * scale:.3g} ({c[f'{key}_error']:+.1%})" for _, c in columns)
    return f"| {label} ({unit}) | {' | '.join(cells)} |"


def _plain(label: str, columns: Columns, key: str, form: str) -> str:
    return f"| {label} | {' | '.join(form.format(c[key]) for _, c in columns)} |"


def _pair(label: str, columns: Columns, key: str) -> str:
    cells = (f"{c[key]:.2f} / {c[f'{key}_real']:.2f}" for _, c in columns)
    return f"| {label} | {' | '.join(cells)} |"


@section("simulator-closed-forms", 210)
def closed_forms(data: Path) -> str:
    """Queues whose answer is known."""
    cases: list[tuple[str, Callable[..., tuple[float, float]]]] = [
        ("M/D/1 prefill queue, load 0.5: mean wait (s)", partial(closedforms.md1, 0.5)),
        ("M/D/1 prefill queue, load 0.7: mean wait (s)", closedforms.md1),
        ("M/M/4 central queue, load 0.5: mean wait (s)", closedforms.mmc),
        ("batch-service decode, fixed lengths: mean time in service (s)", closedforms.decode_sharing),
        (
            "batch-service decode, uniform lengths: mean time in service (s)",
            partial(closedforms.decode_sharing, f"uniform:1:{2 * closedforms.TOKENS - 1}"),
        ),
        ("batch-service decode, 16 places, geometric lengths: mean end to end (s)", closedforms.decode_limited),
    ]
    rows = []
    for label, case in cases:
        pairs = [case(seed=seed) for seed in SEEDS]
        found = np.array([simulated for _, simulated in pairs])
        formula, mean = pairs[0][0], float(found.mean())
        noise = float(found.std(ddof=1) / np.sqrt(len(found)) / formula)
        rows.append(f"| {label} | {formula:.5g} | {mean:.5g} | {mean / formula - 1:+.2%} | {noise:.2%} |")
    return f"""## Simulator against closed forms

Steady state, the first {closedforms.WARM_UP:.0%} of the requests left out; mean of {len(SEEDS)} seeds. The last
column is the standard error of the simulated mean. Formulas: Pollaczek-Khinchine, Erlang C, and the birth-death chain
of a batch whose `j` sequences advance together, one token per step of `a + b j` seconds. Request by request the
two queues equal the recursions of Lindley and of Kiefer and Wolfowitz to rounding (tests).

| | formula | simulated | error | noise |
|---|---|---|---|---|
{chr(10).join(rows)}
"""


@section("simulator-speed", 220)
def speed(data: Path) -> str:
    """How long simulations take on one core."""

    def pair(count: int) -> Plan:
        roles: tuple[Role, ...] = ("prefill", "decode")
        pools = [PoolPlan(role, "H100-SXM", role, count=count) for role in roles]
        return Plan(model="Llama-3.1-8B", pools=pools, link=LinkPlan(50.0))

    def synthetic(rate: float, requests: int) -> Traffic:
        lengths = {"prompt_tokens": "lognormal:1024:0.8", "output_tokens": "lognormal:256:0.8"}
        return Traffic(rate=rate, requests=requests, **lengths)  # type: ignore[arg-type]

    rows = []
    for label, count, traffic in (
        ("Azure 2023 conversation trace", 8, Traffic(trace=str(data / "traces/azure2023_conv.csv"))),
        ("Mooncake conversation trace", 8, Traffic(trace=str(data / "traces/mooncake_conversation.jsonl"))),
        ("synthetic, 100 requests/s", 8, synthetic(100.0, 1_000_000)),
        ("synthetic, 25,600 requests/s", 2048, synthetic(25_600.0, 24_000)),
        ("synthetic, 25,600 requests/s", 2048, synthetic(25_600.0, 250_000)),
    ):
        begin, begin_cpu = time.perf_counter(), time.process_time()
        summary = simulate(pair(count), traffic.build()).summary
        seconds, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
        simulated = f"{2 * count:,} | {summary['requests']:,} | {summary['simulated_seconds']:,.0f}"
        rows.append(f"| {label} | {simulated} | {seconds:.1f} | {cpu:.1f} | {summary['requests'] / cpu:,.0f} |")
    return f"""## Simulator speed

As many prefill as decode instances of one H100 each, layer-wise KV transfer, one process, reading the trace included.
Other work on the machine lengthens the wall time, so the processor time is given as well.

| traffic | instances | requests | simulated s | wall s | processor s | requests per processor s |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}
"""
