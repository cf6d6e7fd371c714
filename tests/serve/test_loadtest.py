"""`hetkv loadtest` against the running system: it sends the traffic it was given, and counts as the simulator does."""

from __future__ import annotations

import asyncio
import csv
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hetkv.cli import main
from hetkv.serve.loadtest import LoadTest, Prompts, Target
from hetkv.simulator.deployment import Engine, Plan, PoolPlan
from hetkv.simulator.metrics import METRICS
from hetkv.simulator.request import Request
from hetkv.simulator.run import simulate
from hetkv.simulator.traffic.sources import Traffic
from tests.serve.serving import Serving


def loadtest(server: Serving, folder: Path, *options: str) -> tuple[int, dict[str, Any], list[dict[str, str]]]:
    """Exit status, summary, and a row per request."""
    out, rows = folder / "out.json", folder / "rows.csv"
    code = main(["loadtest", "--url", server.url + "/v1", *options, "--json", str(out), "--csv", str(rows)])
    with rows.open() as file:
        return code, json.loads(out.read_text()), list(csv.DictReader(file))


def test_a_rate(server: Serving, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traffic = ["--rate", "40", "--requests", "50", "--prompt-tokens", "uniform:5:60", "--output-tokens", "uniform:2:9"]
    code, summary, rows = loadtest(
        server, tmp_path, *traffic, "--concurrency", "30", "--seed", "3", "--slo-ttft-ms", "60000"
    )
    assert code == 0
    sent = list(Traffic(rate=40, requests=50, prompt_tokens="uniform:5:60", output_tokens="uniform:2:9")
                .build().requests(3))  # fmt: skip
    assert [(int(row["prompt"]), int(row["output"])) for row in rows] == [(one.prompt, one.output) for one in sent]
    assert [float(row["arrival"]) for row in rows] == pytest.approx([one.arrival for one in sent])
    assert (summary["finished"], summary["model"], summary["errors"]) == (50, "tiny", {})
    assert summary["output_tokens"] == sum(one.output for one in sent)
    assert 0 < summary["ttft_ms"]["p50"] <= summary["ttft_ms"]["p99"]
    assert summary["slo_attainment"] == 1  # no limits were given
    assert "50 of 50 requests finished" in capsys.readouterr().out
    server.wait_empty()


def test_names_are_the_simulators(server: Serving, tmp_path: Path) -> None:
    traffic = ["--rate", "50", "--requests", "5", "--prompt-tokens", "5", "--output-tokens", "3"]
    _, measured, _ = loadtest(server, tmp_path, *traffic)
    plan = Plan("Llama-3.1-8B", [PoolPlan("aggregated", "H100-SXM")], Engine())
    simulated = simulate(plan, Traffic(rate=50, requests=5).build()).summary
    known = {metric.key for metric in METRICS} - {"utilisation", "usd_per_million_output_tokens", "seconds"}
    assert known & set(simulated) <= set(measured)


def test_a_trace_whose_prompts_share_prefixes(server: Serving, tmp_path: Path) -> None:
    """Mooncake's hashes become equal tokens, which the fleet finds in its prefix caches."""
    trace = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 100 * n, "input_length": 520, "output_length": 2, "hash_ids": [7, n]} for n in range(4)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = server.metrics()
    code, summary, _ = loadtest(server, tmp_path, "--trace", str(trace), "--concurrency", "1")
    assert (code, summary["finished"]) == (0, 4)
    after = server.metrics()
    computed = 'hetkv_instance_computed_prompt_tokens{instance="'
    got = sum(value - before[name] for name, value in after.items() if name.startswith(computed) and "prefill" in name)
    assert 520 <= got <= 520 + 3 * (520 - 512) + 4


def test_steps_have_every_token(server: Serving, tmp_path: Path) -> None:
    """What `--steps` writes is what was computed: prompts by one side, all tokens but the first by the other."""

    def computed() -> tuple[int, int]:
        files = list(server.log.parent.glob("*.csv"))
        found = [row for file in files for row in csv.DictReader(file.read_text().splitlines())]
        return sum(int(row["prompt"]) for row in found), sum(int(row["decoding"]) for row in found)

    server.wait_empty()
    prompts, tokens = computed()
    traffic = ["--rate", "40", "--requests", "12", "--prompt-tokens", "uniform:5:60", "--output-tokens", "7"]
    _, summary, _ = loadtest(server, tmp_path, *traffic, "--seed", "77")
    server.wait_empty()
    time.sleep(0.1)
    more_prompts, more_tokens = computed()
    assert more_prompts - prompts == summary["prompt_tokens"]
    assert more_tokens - tokens == 12 * 6


def test_a_run_that_is_cancelled_leaves_nothing(server: Serving) -> None:
    workload = Traffic(rate=1000, requests=20, prompt_tokens="20", output_tokens="500").build()
    test = LoadTest(Target(url=server.url, model="tiny"))

    async def cut() -> int:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(test.run(workload, 1), 0.5)
        return len(asyncio.all_tasks())

    assert asyncio.run(cut()) == 1
    assert len(test.records) < 20
    server.wait_empty()


def test_errors_are_counted_by_their_text(server: Serving, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traffic = ["--rate", "1000", "--requests", "3", "--prompt-tokens", "2000", "--output-tokens", "3"]
    code, summary, rows = loadtest(server, tmp_path, *traffic)
    assert (code, summary["rejected"], summary["finished"]) == (1, 3, 0)
    [(text, count)] = summary["errors"].items()
    assert (count, "maximum context length is 1024" in text) == (3, True)
    assert {row["status"] for row in rows} == {"rejected"}
    assert "3 x" in capsys.readouterr().out


def test_prompts_differ_unless_their_hashes_are_equal() -> None:
    prompts = Prompts(1000, 16, seed=1)
    same = [prompts.of(Request(number, 0.0, 40, 1, (5, 6, number))) for number in range(2)]
    assert same[0][:32] == same[1][:32] != same[0][32:]
    assert len(same[0]) == 40
    others = {tuple(prompts.of(Request(number, 0.0, 8, 1))) for number in range(50)}
    assert len(others) == 50
    assert all(10 <= token < 1000 for prompt in others for token in np.array(prompt))
    text = Prompts(0, 0, seed=1).of(Request(0, 0.0, 12, 1))
    assert isinstance(text, str)
    assert len(text.split()) == 12
