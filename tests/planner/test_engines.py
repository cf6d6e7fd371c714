"""What can be started: the table of engines, and plans and launch lines that keep to it."""

from __future__ import annotations

from typing import Any

import pytest

from hetkv.engines import CONNECTOR_VLLM, Use, obstacle
from hetkv.errors import InfeasibleError, InputError
from hetkv.planner.columns import build_columns
from hetkv.planner.output.launch import sglang_lines, vllm_lines
from hetkv.planner.problem import Problem, parse_problem
from hetkv.planner.solve import solve
from hetkv.simulator.deployment import parse_plan
from tests.planner.cases import small


def large(**changes: Any) -> Problem:
    """A model that needs a whole node, as docs/examples/llama-3-405b.yaml asks for it."""
    document: dict[str, Any] = {
        "models": [{"name": "Llama-3.1-405B", "tp": [4, 8], "pp": [1, 2]}],
        "classes": [
            {
                "name": "chat",
                "rate": 2,
                "prompt_tokens": "lognormal:1024:0.8",
                "output_tokens": "geometric:256",
                "ttft_ms": 3000,
                "tpot_ms": 80,
            }
        ],
        "gpus": [{"gpu": "H100-SXM", "usd_per_gpu_hour": 3.5, "basis": "on_demand", "as_of": "2026-05"}],
        "link": {"gb_s": "nic"},
        "engine": {"weight_dtype": "fp8"},
    }
    return parse_problem({**document, **changes}, "large")


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (Use("vllm", pp=2), ""),
        (Use("vllm", pp=2, disaggregated=True), "HetKVConnector takes pp 1 at most, not 2"),
        (Use("sglang", pp=2, disaggregated=True), ""),
        (Use("vllm", "0.18.0", disaggregated=True), f"HetKVConnector takes vllm {CONNECTOR_VLLM}, not 0.18.0"),
        (Use("vllm", "0.32.1", disaggregated=True), ""),
        (Use("vllm", "2024", disaggregated=True), ""),  # the key of a calibration, no version
        (Use("vllm", state=True), ""),
        (Use("vllm", state=True, disaggregated=True), "HetKVConnector does not take the states of a hybrid model"),
        (Use("vllm", kv_dtype="int4"), "vllm takes the kv_dtype bf16, fp16, fp8, not int4"),
        (Use("vllm", dp=2), "dp 2 shares the experts of one model, and this model has none"),
        (Use("vllm", dp=2, moe=True), ""),
        (Use("vllm", "0.12.0", dp=16, moe=True), ""),
        (Use("vllm", "0.8.5", dp=2, moe=True), "vllm takes dp 1 at most, not 2"),
        (Use("vllm", "0.8.5"), ""),
        (Use("vllm", tp=4, dp=4, moe=True, node=8), ""),
        (Use("vllm", tp=2, pp=2, dp=4, moe=True, node=8), ""),
        (
            Use("vllm", tp=8, pp=2, dp=2, moe=True, node=8),
            "vllm has whole replicas on every node: 2 of 16 GPUs do not fill nodes of 8",
        ),
        (
            Use("vllm", tp=2, pp=3, dp=4, moe=True, node=8),
            "vllm has whole replicas on every node: 4 of 6 GPUs do not fill nodes of 8",
        ),
        (
            Use("vllm", tp=4, dp=3, moe=True, node=8),
            "vllm has whole replicas on every node: 3 of 4 GPUs do not fill nodes of 8",
        ),
        (Use("sglang", tp=8, pp=2, dp=2, moe=True, node=8), ""),
        (Use("vllm", dp=2, moe=True, disaggregated=True), "HetKVConnector takes dp 1 at most, not 2"),
        (Use("sglang", dp=16, moe=True, disaggregated=True), ""),
        (Use("trtllm"), "no launch line is known for engine 'trtllm' (known: vllm, sglang)"),
    ],
)
def test_the_table_says_what_stands_in_the_way(use: Use, says: str) -> None:
    assert obstacle(use) == says


def test_a_column_that_cannot_be_started_is_not_offered() -> None:
    found = build_columns(large())
    assert found.columns
    assert all(c.pp == 1 for c in found.columns if c.role != "aggregated")
    assert any(c.pp == 2 for c in found.columns if c.role == "aggregated")  # vLLM alone runs pipelines
    assert any("cannot be started: HetKVConnector takes pp 1" in why for why in found.rejected.values())


def test_it_is_offered_and_marked_where_that_is_asked_for() -> None:
    found = build_columns(large(allow_unstartable=True))
    marked = [c for c in found.columns if c.unstartable]
    assert {(c.role, c.pp) for c in marked} == {("prefill", 2), ("decode", 2)}


def test_sglang_prefills_on_pipelines() -> None:
    found = build_columns(large(engine={"name": "sglang", "weight_dtype": "fp8"}))
    assert any(c.pp == 2 for c in found.columns if c.role == "prefill")


def test_a_plan_of_the_example_has_no_line_that_cannot_be_started() -> None:
    plan = solve(large(), alternatives=False, events=100_000)
    for deployment in plan.deployments.values():
        assert "CANNOT BE STARTED" not in vllm_lines(deployment)


def test_a_launch_line_that_cannot_work_says_so() -> None:
    plan = parse_plan(
        {
            "model": "Llama-3.1-70B",
            "pools": [{"role": r, "gpu": "H100", "tp": 4, "pp": 2} for r in ("prefill", "decode")],
            "link": {"gb_s": 50},
        },
        "test",
    )
    assert vllm_lines(plan).count("CANNOT BE STARTED: HetKVConnector takes pp 1") == 2
    assert "CANNOT BE STARTED" not in sglang_lines(plan)


def test_nothing_that_can_be_started_is_no_plan_with_a_reason() -> None:
    with pytest.raises(InfeasibleError, match=r"cannot|can be started on none .* HetKVConnector takes vllm"):
        solve(small(roles="disaggregated", engine={"version": "0.18.0"}))


def test_an_engine_that_nobody_knows_is_rejected() -> None:
    with pytest.raises(InputError, match=r"unknown engine 'vlm'; known are vllm, sglang"):
        small(engine={"name": "vlm"})


def test_each_gpu_type_may_have_its_own_engine_and_dtype() -> None:
    offers = [
        {"gpu": "H100", "usd_per_gpu_hour": 3.5, "basis": "on_demand", "as_of": "2026-05"},
        {
            "gpu": "MI300X",
            "usd_per_gpu_hour": 2.0,
            "basis": "on_demand",
            "as_of": "2026-05",
            "engine": {"kv_dtype": "fp8"},
        },
    ]
    found = build_columns(small(gpus=offers)).columns
    widths = {c.gpu: c.steps.kv_bytes_per_token for c in found}
    assert widths["H100-SXM"] == 2 * widths["MI300X"]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"tp": [3]}, "tp 3 does not divide the 32 heads of Llama-3.1-8B"),
        ({"tp": [16]}, "tp 16 does not stay in a node of 8"),
        ({"tp": [1], "pp": [64]}, "pp 64 exceeds the 32 layers"),
    ],
)
def test_a_size_that_cannot_be_says_why(model: dict[str, Any], says: str) -> None:
    with pytest.raises(InfeasibleError, match=says):
        solve(small(models=[{"name": "Llama-3.1-8B", "pp": [1], **model}]), alternatives=False)


@pytest.mark.parametrize(("field", "kind"), [("weight_dtype", "weight"), ("kv_dtype", "KV")])
@pytest.mark.parametrize("of_gpu", [False, True], ids=["problem", "gpu"])
def test_an_unknown_dtype_is_an_error_that_names_it(field: str, kind: str, of_gpu: bool) -> None:
    gpu = {"gpu": "H100-SXM", "usd_per_gpu_hour": 2.5, "basis": "on_demand", "as_of": "2026-05"}
    document = {
        "models": [{"name": "Llama-3.1-8B"}],
        "classes": [
            {
                "name": "chat",
                "rate": 1,
                "prompt_tokens": "512",
                "output_tokens": "64",
                "ttft_ms": 500,
                "tpot_ms": 50,
            }
        ],
        "gpus": [gpu | {"engine": {field: "fp3"}} if of_gpu else gpu],
        "engine": {} if of_gpu else {field: "fp3"},
    }
    with pytest.raises(InputError, match=rf"^problem: .*unknown {kind} dtype 'fp3'; known are bf16, "):
        parse_problem(document, "problem")
