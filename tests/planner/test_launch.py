"""Launch lines and Kubernetes manifests say what the plan says, in the words of the engines."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import yaml

from hetkv.planner.output.kubernetes import kubernetes_yaml
from hetkv.planner.output.launch import sglang_lines, vllm_lines
from hetkv.simulator.deployment import Plan, parse_plan

PAIR = {
    "model": "Llama-3.1-405B",
    "link": {"gb_s": "nic"},
    "pools": [
        {"role": "prefill", "gpu": "H100-SXM", "tp": 8, "pp": 2, "count": 2},
        {
            "role": "decode",
            "gpu": "MI300X",
            "tp": 4,
            "count": 5,
            "kv_tokens": 64_000,
            "engine": {"block_size": 64, "kv_dtype": "fp8", "weight_dtype": "fp8", "prefix_caching": True},
        },
    ],
}
ALONE = {"model": "Llama-2-7B", "pools": [{"role": "aggregated", "gpu": "Gaudi3", "count": 8}]}


def plan(document: dict) -> Plan:
    return parse_plan(document, "test")


def commands(text: str) -> list[list[str]]:
    """The shell words of each command; comments and the assignment at the head left out."""
    joined = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*$", "", text))
    return [
        shlex.split(line)
        for line in joined.splitlines()
        if " " in line.strip() and not line.startswith(("MODEL=", "HOST="))
    ]


def options(words: list[str]) -> dict[str, str]:
    pairs = zip(words, [*words[1:], ""], strict=True)
    return {a: "" if b.startswith("--") else b for a, b in pairs if a.startswith("--")}


def test_vllm_has_a_command_for_each_pool_with_its_own_settings():
    prefill, decode, proxy = (options(words) for words in commands(vllm_lines(plan(PAIR))))
    assert proxy["--mode"] == "concurrent"
    assert proxy["--prefill"].startswith("http://prefill-0:")
    assert (prefill["--tensor-parallel-size"], prefill["--pipeline-parallel-size"]) == ("8", "2")
    assert (decode["--tensor-parallel-size"], decode["--pipeline-parallel-size"]) == ("4", "1")
    assert (prefill["--block-size"], decode["--block-size"]) == ("16", "64")
    assert (prefill["--dtype"], prefill["--kv-cache-dtype"]) == ("bfloat16", "auto")
    assert (decode["--quantization"], decode["--kv-cache-dtype"]) == ("fp8", "fp8")
    assert decode["--num-gpu-blocks-override"] == "1000"
    assert "--enable-prefix-caching" in decode
    assert "--no-enable-prefix-caching" in prefill


@pytest.mark.parametrize(("index", "role"), [(0, "kv_producer"), (1, "kv_consumer")])
def test_vllm_moves_the_kv_by_hetkv(index, role):
    connector = json.loads(options(commands(vllm_lines(plan(PAIR)))[index])["--kv-transfer-config"])
    assert connector["kv_connector"] == "HetKVConnector"
    assert connector["kv_connector_module_path"] == "hetkv.integrations.vllm"
    assert connector["kv_role"] == role
    expected = {"layerwise": True, "secret_file": "hetkv.secret"} | ({"host": "$HOST"} if index == 0 else {})
    assert connector["kv_connector_extra_config"] == expected


def test_an_instance_on_two_nodes_has_ranks_and_one_on_a_part_of_a_node_has_devices():
    prefill, decode, _ = commands(vllm_lines(plan(PAIR)))
    assert options(prefill)["--nnodes"] == "2"
    assert decode[0] == "HIP_VISIBLE_DEVICES=0,1,2,3"
    assert "--nnodes" not in decode
    nodes = commands(vllm_lines(plan(PAIR), {"H100-SXM": 16}))[0]
    assert "--nnodes" not in nodes


def test_aggregated_instances_have_no_connector():
    (words,) = commands(vllm_lines(plan(ALONE)))
    assert words[0] == "HABANA_VISIBLE_DEVICES=0"
    assert "--kv-transfer-config" not in words
    (words,) = commands(sglang_lines(plan(ALONE)))
    assert "--disaggregation-mode" not in words


def test_sglang_has_its_own_disaggregation_and_a_router():
    prefill, decode, router = commands(sglang_lines(plan(PAIR)))
    assert options(prefill)["--disaggregation-mode"] == "prefill"
    assert options(decode)["--disaggregation-mode"] == "decode"
    assert "--disaggregation-bootstrap-port" in prefill
    assert options(decode)["--page-size"] == "64"
    assert options(decode)["--max-total-tokens"] == "64000"
    assert "--disable-radix-cache" in prefill
    assert "--disable-radix-cache" not in decode
    assert "--pd-disaggregation" in router
    assert router.count("--prefill") == 2


def test_kubernetes_has_one_workload_and_one_service_for_each_pool():
    documents = list(yaml.safe_load_all(kubernetes_yaml(plan(PAIR))))
    assert [d["kind"] for d in documents] == ["Service", "LeaderWorkerSet", "Service", "StatefulSet"]
    group, pods = documents[1]["spec"], documents[3]["spec"]
    assert (group["replicas"], pods["replicas"]) == (2, 5)
    assert group["leaderWorkerTemplate"]["size"] == 2
    leader, worker = (group["leaderWorkerTemplate"][f"{kind}Template"]["spec"] for kind in ("leader", "worker"))
    for pod in (leader, worker):
        assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 8}
        assert pod["nodeSelector"] == {"hetkv/gpu": "H100-SXM"}
    assert "--headless" in worker["containers"][0]["args"]
    assert "--headless" not in leader["containers"][0]["args"]
    pod = pods["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"] == {"amd.com/gpu": 4}
    connector = json.loads(options(leader["containers"][0]["args"])["--kv-transfer-config"])
    assert connector["kv_connector_extra_config"]["host"] == "$(POD_IP)"
    volumes = {v["name"] for v in pod["volumes"]}
    assert volumes == {m["name"] for m in pod["containers"][0]["volumeMounts"]}
    for service, workload in (documents[:2], documents[2:]):
        assert service["metadata"]["name"] == workload["metadata"]["name"]


def test_kubernetes_names_the_devices_of_other_vendors():
    (_, workload) = yaml.safe_load_all(kubernetes_yaml(plan(ALONE)))
    assert workload["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"] == {"habana.ai/gaudi": 1}
