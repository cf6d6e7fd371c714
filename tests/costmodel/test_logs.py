"""`hetkv calibrate --log`: files as engines leave them, what is read, and entries that plan and simulate use."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hetkv.cli import main
from hetkv.costmodel import load_catalogue, load_efficiencies, step_model
from hetkv.costmodel.calibration.engine_steps import EngineSteps
from hetkv.costmodel.calibration.fit import PRIORS, STEP_NAMES
from hetkv.costmodel.calibration.logs import Period, Prompt, Setup, read
from hetkv.costmodel.calibration.logs import request_log as requests
from hetkv.costmodel.calibration.own_runs import from_log
from hetkv.costmodel.efficiency import Constants, Key
from hetkv.errors import InputError
from hetkv.simulator.validation.serving_run import ServingRun, replay
from tests.costmodel.test_calibrate import DATA, needs_data

CATALOGUE = load_catalogue()
SETUP = Setup("MI325X", "Llama-3.1-8B", "vllm", "0.19.0", "bf16", chunk=2048)
RUN = "measured/vllm_serving_rtxpro6000_llama31_8b/requests.jsonl"


def write_log(path: Path, count: int = 120) -> Path:
    """A request log of MI325X whose steps take the times that were measured on MI300X; it runs 20 to 30 at once."""
    truth = step_model("MI300X", "Llama-3.1-8B", engine="vllm", engine_version="2024", max_batched_tokens=2048)
    random = np.random.default_rng(3)
    prompt, output = random.integers(100, 2000, count), random.integers(50, 400, count)
    queued = np.cumsum(random.exponential(0.20, count))
    blank = np.zeros(count)
    done = replay(ServingRun(prompt, output, queued, blank, blank, blank, 256, 2048), truth)
    lines = [
        {
            "input_toks": int(prompt[i]), "output_toks": int(output[i]), "queued_ts": 1e9 + queued[i],
            "scheduled_ts": 1e9 + done.scheduled[i], "first_token_ts": 1e9 + done.first_token[i],
            "last_token_ts": 1e9 + done.last_token[i],
        }
        for i in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_request_log_moves_a_vendors_prior_to_the_gpu_and_narrows_the_interval(tmp_path: Path) -> None:
    log, own = write_log(tmp_path / "requests.jsonl"), tmp_path / "own.json"
    arguments = ["--gpu", "mi325x", "--model", SETUP.model, "--engine-version", "0.19.0", "--chunk", "2048"]
    assert main(["calibrate", "--log", str(log), *arguments, "--out", str(own)]) == 0
    truth = step_model("MI300X", "Llama-3.1-8B", engine="vllm", engine_version="2024", max_batched_tokens=2048)
    before = step_model("MI325X", "Llama-3.1-8B", engine="vllm", engine_version="0.19.0")
    after = step_model("MI325X", "Llama-3.1-8B", engine_version="0.19.0", efficiencies=load_efficiencies([own]))
    assert after.efficiency.fallback == ""
    for batch in (20, 28):
        measured = truth.step_seconds(batch, batch * 1000)
        assert after.step_seconds(batch, batch * 1000) == pytest.approx(measured, rel=0.15)
        span = after.step_estimate(batch, batch * 1000)
        assert span.low < measured < span.high
        assert span.high / span.low < 2
        wide = before.step_estimate(batch, batch * 1000)
        assert wide.high / wide.low > 5


@needs_data
def test_a_real_log_calibrates_without_looking_ahead() -> None:
    """The first 22 s predict the periods of the rest; nothing that happened later changes the entry."""
    setup = Setup("RTX-PRO-6000", "Llama-3.1-8B", "vllm", "0.19.0", "bf16", chunk=2048)
    whole = requests.parse((DATA / RUN).read_text(), "run")
    horizon = float(whole.queued.min()) + 22
    seen = requests.observations(whole, horizon)
    entry, _ = from_log(seen, setup, load_efficiencies(), CATALOGUE, "run")
    later = [row for row in requests.observations(whole)[7:20] if isinstance(row, Period)]
    base = load_efficiencies().find("RTX-PRO-6000", "nvidia", "vllm", "0.19.0", "bf16")

    def error(constants: Constants) -> np.ndarray:
        values = {name: np.full(len(later), prior.start) for name, prior in PRIORS.items()}
        values.update({name: np.full(len(later), getattr(constants, name)) for name in STEP_NAMES})
        return EngineSteps(later, setup, CATALOGUE).errors(values)[1]

    assert np.median(np.abs(error(entry.constants))) < min(0.1, np.median(np.abs(error(base.constants))) + 0.02)
    inside = np.exp(error(entry.constants))
    assert np.mean((inside >= entry.spans.decode.low) & (inside <= entry.spans.decode.high)) >= 0.8
    assert entry.spans.decode.high / entry.spans.decode.low < 2

    cut = whole.queued < horizon
    late = np.where(whole.last > horizon, horizon + 100, whole.last)
    other = requests.RequestLog(
        *(column[cut] for column in (whole.prompt, whole.output, whole.queued, whole.scheduled, whole.first, late)),
        whole.ended[cut],
    )
    assert requests.observations(other, horizon) == seen


VLLM_LOG = """INFO 07-01 10:00:00 [kv_cache_utils.py:100] GPU KV cache size: 100,000 tokens
INFO 07-01 10:00:10 [loggers.py:1] Engine 000: Avg prompt throughput: 0.0 tokens/s, Avg generation throughput: 1000.0 \
tokens/s, Running: 20 reqs, Waiting: 0 reqs, GPU KV cache usage: 30.0%, Prefix cache hit rate: 0.0%
INFO 07-01 10:00:20 [loggers.py:1] Engine 000: Avg prompt throughput: 0.0 tokens/s, Avg generation throughput: 800.0 \
tokens/s, Running: 20 reqs, Waiting: 0 reqs, GPU KV cache usage: 40.0%, Prefix cache hit rate: 0.0%
INFO 07-01 10:00:30 [loggers.py:1] Engine 000: Avg prompt throughput: 50.0 tokens/s, Avg generation throughput: 800.0 \
tokens/s, Running: 20 reqs, Waiting: 0 reqs, GPU KV cache usage: 40.0%, Prefix cache hit rate: 35.0%
INFO 07-01 10:00:40 [loggers.py:1] Engine 000: Avg prompt throughput: 0.0 tokens/s, Avg generation throughput: 800.0 \
tokens/s, Running: 90 reqs, Waiting: 0 reqs, GPU KV cache usage: 60.0%, Prefix cache hit rate: 35.0%
"""
SGLANG_LOG = """[2026-04-08 14:05:20 TP0] Prefill batch, #new-seq: 1, #new-token: 512, #cached-token: 0
[2026-04-08 14:05:21 TP0] Decode batch, #running-req: 5, #token: 20000, token usage: 0.29, cuda graph: True, \
gen throughput (token/s): 90.0, #queue-req: 0
[2026-04-08 14:05:22 TP0] Decode batch, #running-req: 5, #token: 20800, token usage: 0.29, cuda graph: True, \
gen throughput (token/s): 150.0, #queue-req: 0
"""
SCRAPE = """# TYPE vllm:generation_tokens counter
vllm:generation_tokens_total{{model_name="m"}} {tokens}
# TYPE vllm:prompt_tokens counter
vllm:prompt_tokens_total{{model_name="m"}} {prompt}
# TYPE vllm:iteration_tokens_total histogram
vllm:iteration_tokens_total_bucket{{le="+Inf",model_name="m"}} {steps}
vllm:iteration_tokens_total_sum{{model_name="m"}} 1
vllm:iteration_tokens_total_count{{model_name="m"}} {steps}
# TYPE vllm:inter_token_latency_seconds histogram
vllm:inter_token_latency_seconds_bucket{{le="+Inf",model_name="m"}} {tokens}
vllm:inter_token_latency_seconds_sum{{model_name="m"}} {spent}
vllm:inter_token_latency_seconds_count{{model_name="m"}} {tokens}
# TYPE vllm:request_prompt_tokens histogram
vllm:request_prompt_tokens_bucket{{le="+Inf",model_name="m"}} {count}
vllm:request_prompt_tokens_sum{{model_name="m"}} {prompt}
vllm:request_prompt_tokens_count{{model_name="m"}} {count}
# TYPE vllm:request_prefill_time_seconds histogram
vllm:request_prefill_time_seconds_bucket{{le="+Inf",model_name="m"}} {count}
vllm:request_prefill_time_seconds_sum{{model_name="m"}} {prefill}
vllm:request_prefill_time_seconds_count{{model_name="m"}} {count}
"""


def test_vllms_own_lines_give_steady_periods(tmp_path: Path) -> None:
    """The first line has none before it, the third hides prompt work in the prefix cache, the fourth jumps."""
    path = tmp_path / "vllm.log"
    path.write_text(VLLM_LOG)
    assert read([path], SETUP)[1] == [Period(10.0, 20.0, 40_000.0, 8000.0, 0.0, 0.0)]
    path.write_text(VLLM_LOG.split("\n", 1)[1])
    with pytest.raises(InputError, match="no line `GPU KV cache size"):
        read([path], SETUP)


def test_sglangs_decode_lines_next_to_a_prefill_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "sglang.log"
    path.write_text(SGLANG_LOG)
    assert read([path], SETUP)[1] == [Period(1.0, 5.0, 20_800.0, 150.0)]


def test_two_scrapes_give_a_period_and_a_prompt(tmp_path: Path) -> None:
    first, second = tmp_path / "1.prom", tmp_path / "2.prom"
    first.write_text(SCRAPE.format(tokens=1000, prompt=5000, steps=100, spent=20, count=10, prefill=1))
    second.write_text(SCRAPE.format(tokens=9000, prompt=25_000, steps=600, spent=180, count=50, prefill=5))
    period, prompt = read([first, second], SETUP)[1]
    assert period == Period(8000 / 16 * 0.02, 16.0, 16 * (500 + 100), 8000.0, 20_000.0, 40.0)
    assert prompt == Prompt(0.1, 500.0, 16.0, 16 * (500 + 100))
    with pytest.raises(InputError, match="shrank between two scrapes"):
        read([second, first], SETUP)


def test_results_of_vllm_bench_serve_are_closed_loops(tmp_path: Path) -> None:
    result = {
        "backend": "vllm", "model_id": "m", "completed": 100, "duration": 50.0, "max_concurrency": 8,
        "total_input_tokens": 100_000, "total_output_tokens": 20_000, "mean_ttft_ms": 100.0, "mean_tpot_ms": 12.0,
    }  # fmt: skip
    open_loop = {**result, "max_concurrency": None, "request_rate": 2.0}
    path = tmp_path / "bench.jsonl"
    path.write_text(json.dumps(result) + "\n" + json.dumps(open_loop) + "\n")
    rows, seen = read([path], SETUP)
    assert not seen
    assert [(row.prompt, row.output, row.concurrency, row.tpot_s) for row in rows] == [
        (1000, 200, 8, 0.012),
        (1000, 200, 5, 0.012),
    ]
    assert rows[0].ttft_s == pytest.approx(0.1)
    own = tmp_path / "own.json"
    arguments = ["--gpu", "MI325X", "--model", "meta-llama/Llama-3.1-8B-Instruct", "--engine-version", "0.19.0"]
    assert main(["calibrate", "--log", str(path), *arguments, "--out", str(own)]) == 0
    entry = load_efficiencies([own]).entries[Key("MI325X", "vllm", "0.19.0", "bf16")]
    assert entry.rows == 2
    path.write_text(json.dumps({**result, "failed": 3}))
    with pytest.raises(InputError, match="3 requests failed"):
        read([path], SETUP)


def test_disaggregated_runs_are_rows_of_the_csv(tmp_path: Path) -> None:
    own, out = tmp_path / "own.csv", tmp_path / "out.json"
    columns = (
        "gpu,engine,version,model,dtype,tp,prompt,output,concurrency,tpot_ms,ttft_ms,workers,prefill_tp,prefill_workers"
    )
    own.write_text(f"{columns}\nH200,vllm,0.12.0,Llama-3.1-70B,fp8,4,2000,200,16,9.0,300,1,2,2\n")
    assert main(["calibrate", "--csv", str(own), "--out", str(out)]) == 0
    entry = load_efficiencies([out]).entries[Key("H200-SXM", "vllm", "0.12.0", "fp8")]
    assert (entry.rows, entry.tps, entry.max_batch) == (1, (4,), 16)
    own.write_text(f"{columns},colour\n")
    with pytest.raises(InputError, match="unknown column `colour`"):
        main_csv(own)


def main_csv(path: Path) -> None:
    from hetkv.costmodel.calibration.runs_csv import read_csv

    read_csv(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello\n", "not a request log"),
        ('{"first_token_ts": 1}\n', r":1: missing field `input_toks`"),
        ('{"first_token_ts": 1, "input_toks": "x"}\n', r":1: `input_toks` must be a number"),
        (
            '{"input_toks": 1, "output_toks": 2, "queued_ts": 5, "first_token_ts": 1, "last_token_ts": 6}\n',
            "first token before it was queued",
        ),
        (
            '{"input_toks": 1, "output_toks": 2, "queued_ts": 1, "scheduled_ts": 2, "first_token_ts": 2, '
            '"last_token_ts": 3}\n',
            "nothing to calibrate with",
        ),
    ],
)
def test_bad_logs_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "log"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read([path], SETUP)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--log needs --gpu NAME"),
        (["--gpu", "H100"], "--log needs --model NAME"),
        (["--gpu", "H100", "--model", "Llama-3-8B", "--tp", "0"], "--tp must be at least 1"),
        (["--gpu", "H100", "--model", "Llama-3-8B", "--dtype", "fp7"], "unknown dtype 'fp7'"),
        (["--gpu", "H900", "--model", "Llama-3-8B"], "unknown GPU 'H900'"),
    ],
)
def test_bad_options(tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log"
    path.write_text(SGLANG_LOG)
    assert main(["calibrate", "--log", str(path), *arguments]) == 2
    assert message in capsys.readouterr().err
