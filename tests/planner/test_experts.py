"""Columns of attention replicas that share the experts: sizes, memory, rates, and how they are started."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from hetkv.costmodel import Placement, load_catalogue, model_shape, step_model
from hetkv.costmodel.collectives import LINK_SHARE, exchange
from hetkv.costmodel.memory import weight_bytes
from hetkv.planner.columns import build_columns
from hetkv.planner.output.kubernetes import kubernetes_yaml
from hetkv.planner.output.launch import sglang_lines, vllm_lines
from hetkv.planner.problem import Problem, parse_problem
from hetkv.planner.sizes import considered
from hetkv.simulator.deployment import Plan, parse_plan
from tests.planner.test_launch import commands, options


def problem(**changes: Any) -> Problem:
    """DeepSeek-V3 on H200."""
    document = {
        "models": [{"name": "DeepSeek-V3"}],
        "classes": [
            {
                "name": "chat",
                "rate": 4.0,
                "prompt_tokens": "fixed:2000",
                "output_tokens": "fixed:500",
                "ttft_ms": 4000,
                "tpot_ms": 60,
                "ttft_percentile": 90,
                "tpot_percentile": 90,
            }
        ],
        "gpus": [{"gpu": "H200", "usd_per_gpu_hour": 3.5, "basis": "on_demand", "as_of": "2026-05"}],
        "engine": {"weight_dtype": "fp8", "name": "sglang"},
    }
    return parse_problem({**document, **changes}, "experts")


def pool(role: str = "aggregated", **sizes: int) -> Plan:
    one = {"role": role, "gpu": "H200", "engine": {"weight_dtype": "fp8"}, **sizes}
    return parse_plan({"model": "DeepSeek-V3", "pools": [one]}, "test")


def test_experts_are_whole_on_a_rank_where_there_are_replicas() -> None:
    assert (Placement(8).ep, Placement(2, 1, 4).ep, Placement(1, 1, 16).ep) == (1, 8, 16)


def test_sizes_of_a_model_with_experts() -> None:
    """Within a node every product, beyond it two and four nodes of replicas of one GPU; a dense model has none."""
    spec, offer = problem().models[0], problem().gpus[0]
    rows = considered(spec, offer, model_shape("DeepSeek-V3"))
    found = {(p.tp, p.dp) for p, why in rows if p.dp > 1 and not why}
    assert found == {(1, 2), (1, 4), (1, 8), (2, 2), (2, 4), (4, 2), (1, 16), (1, 32)}
    assert not any(p.dp > 1 and p.pp > 1 for p, _ in rows)
    assert all(p.dp == 1 for p, _ in considered(spec, offer, model_shape("Llama-3.1-70B")))


def test_ranks_have_equally_many_experts() -> None:
    spec, offer = problem().models[0], problem().gpus[0]
    why = {p.dp: why for p, why in considered(spec, offer, model_shape("Mixtral-8x7B")) if p.tp == 1 and p.pp == 1}
    assert why[8] == ""
    assert why[16] == "ep 16 (tp * dp) does not divide the 8 experts of Mixtral-8x7B"


def test_memory_of_a_rank_by_hand() -> None:
    """256 experts of 3 x 7168 x 2048 weights in 58 layers, a byte each: over 16 ranks, 16 of them on each."""
    shape = model_shape("DeepSeek-V3")
    narrow, wide = (weight_bytes(shape, 1, 1, dp, "fp8") for dp in (8, 16))
    assert narrow - wide == pytest.approx(58 * 16 * 3 * 7168 * 2048)
    assert weight_bytes(shape, 8, 1, 1, "fp8") < narrow  # attention is whole on every rank of the replicas


def test_an_exchange_moves_half_of_what_a_ring_all_reduce_does() -> None:
    gpu = load_catalogue().gpu("H200")
    inside, across = exchange(gpu, 8), exchange(gpu, 16)
    assert inside.seconds(1e9) - inside.seconds(0) == pytest.approx(7 / 8 * 1e9 / (LINK_SHARE * 450e9), rel=0.01)
    nic = gpu.value("nic_gbit_s") / 8 * 1e9
    assert across.small_s_per_byte == pytest.approx(15 / 16 / (LINK_SHARE * nic))
    assert exchange(gpu, 1).seconds(1e9) == 0


def test_replicas_carry_several_times_the_requests_of_tensor_parallelism() -> None:
    """The latent is held once in place of eight times: DeepSeek-V3 on 8 H200 decodes 2.4 times as much with DP 8."""
    found = {(c.tp, c.dp): c for c in build_columns(problem()).columns if c.role == "decode" and c.pp == 1}
    ratio = found[1, 8].relaxed / found[8, 1].relaxed
    assert 1.8 < ratio < 4.0
    assert found[1, 16].kv_tokens > 2.2 * found[1, 8].kv_tokens  # half the experts on a rank
    assert found[1, 16].relaxed > found[1, 8].relaxed


def test_a_wider_exchange_takes_longer_at_the_same_batch_a_rank() -> None:
    """Of the tokens of a rank more leave the node, while the experts of a rank are read by more of them."""
    narrow, wide = (step_model("H200", "DeepSeek-V3", dp=dp, weight_dtype="fp8") for dp in (8, 16))
    assert wide.work.reduce_small_s_per_token * 16 > narrow.work.reduce_small_s_per_token * 8
    assert wide.work.expert_bytes_s == pytest.approx(narrow.work.expert_bytes_s / 2)


def test_hetkvs_connector_has_no_replicas_and_says_so() -> None:
    found = build_columns(problem(engine={"weight_dtype": "fp8"}))
    assert all(c.dp == 1 for c in found.columns if c.role != "aggregated")
    assert any(c.dp == 16 for c in found.columns if c.role == "aggregated")
    assert "HetKVConnector takes dp 1" in found.rejected["DeepSeek-V3 on H200-SXM tp 1 dp 8, disaggregated"]
    marked = build_columns(problem(engine={"weight_dtype": "fp8"}, allow_unstartable=True)).columns
    assert all(bool(c.unstartable) == (c.dp > 1 or c.pp > 1) for c in marked if c.role != "aggregated")


def test_launch_lines_on_one_node() -> None:
    (words,) = commands(vllm_lines(pool(tp=2, dp=4)))
    assert options(words)["--data-parallel-size"] == "4"
    assert "--enable-expert-parallel" in words
    assert "--data-parallel-size-local" not in words
    (words,) = commands(vllm_lines(pool(tp=8)))
    assert "--enable-expert-parallel" not in words
    (words, *_) = commands(sglang_lines(pool(tp=2, dp=4)))
    assert {k: options(words)[k] for k in ("--tp-size", "--dp-size", "--ep-size")} == {
        "--tp-size": "8",
        "--dp-size": "4",
        "--ep-size": "8",
    }
    assert "--enable-dp-attention" in words


def test_launch_lines_on_several_nodes() -> None:
    text = vllm_lines(pool(dp=16))
    (words,) = commands(text)
    found = options(words)
    assert (found["--data-parallel-size"], found["--data-parallel-size-local"]) == ("16", "8")
    assert found["--data-parallel-address"] == "$HEAD"
    assert "--nnodes" not in found
    assert "add --headless --data-parallel-start-rank $((RANK * 8)) where RANK is not 0" in text
    (group,) = [d for d in yaml.safe_load_all(kubernetes_yaml(pool(dp=16))) if d and d["kind"] == "LeaderWorkerSet"]
    template = group["spec"]["leaderWorkerTemplate"]
    worker, leader = (template[f"{kind}Template"]["spec"]["containers"][0] for kind in ("worker", "leader"))
    assert template["size"] == 2
    assert leader["command"] == ["vllm", "serve"]
    assert "--data-parallel-start-rank $((LWS_WORKER_INDEX * 8))" in worker["command"][2]
    assert "--headless" in worker["args"]
    assert "--headless" not in leader["args"]


def test_replicas_that_do_not_fill_nodes_are_no_plan_of_vllm() -> None:
    """A line would start none of them on a node, or others than the first node expects."""
    why = "cannot be started: vllm has whole replicas on every node: 2 of 16 GPUs do not fill nodes of 8"
    sizes = {"name": "DeepSeek-V3", "tp": [8], "pp": [2], "dp": [2]}
    for name in ("vllm", "sglang"):
        found = build_columns(problem(models=[sizes], engine={"weight_dtype": "fp8", "name": name}))
        assert (why in found.rejected.values()) == (name == "vllm")
        assert any(c.role == "aggregated" for c in found.columns) == (name == "sglang")
    assert "CANNOT BE STARTED: vllm has whole replicas" in vllm_lines(pool(tp=8, pp=2, dp=2))
    assert "CANNOT BE STARTED" not in vllm_lines(pool(tp=8, dp=2))
