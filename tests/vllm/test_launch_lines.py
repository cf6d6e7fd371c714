"""Every vLLM line that the planner prints is accepted by vLLM's own parser and by the connector's checks."""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
import time
from typing import Any

import pytest
from vllm.config import KVTransferConfig
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

from hetkv.engines import VLLM_CONNECTOR
from hetkv.integrations.vllm.settings import Settings
from hetkv.planner.output.launch import vllm_lines
from hetkv.simulator.deployment import Plan, parse_plan

PAIR = [
    {"role": "prefill", "gpu": "H100", "tp": 4, "count": 2},
    {"role": "decode", "gpu": "MI300X", "tp": 2, "count": 6},
]

PLANS = {
    "disaggregated": {"model": "Llama-3.1-70B", "pools": PAIR, "link": {"gb_s": "nic"}},
    "not layerwise": {"model": "Llama-3.1-70B", "pools": PAIR, "link": {"gb_s": 25, "overlap": "none"}},
    "two nodes": {"model": "Llama-3.1-405B", "pools": [{"role": "aggregated", "gpu": "H100", "tp": 8, "pp": 2}]},
    "replicas": {
        "model": "DeepSeek-V3",
        "pools": [{"role": "aggregated", "gpu": "H200", "dp": 8, "engine": {"weight_dtype": "fp8"}}],
    },
    "experts on two nodes": {
        "model": "DeepSeek-V3",
        "pools": [{"role": "aggregated", "gpu": "H200", "dp": 16, "engine": {"weight_dtype": "fp8"}}],
    },
    "windows": {"model": "gpt-oss-20b", "pools": PAIR, "link": {"gb_s": "nic"}},
    "windows kept whole": {
        "model": "gpt-oss-20b",
        "pools": [{"role": "aggregated", "gpu": "H100", "engine": {"hybrid_kv_cache": False}}],
    },
    "every setting": {
        "model": "Qwen/Qwen3-8B",
        "pools": [
            {
                "role": "aggregated",
                "gpu": "A10G",
                "tp": 2,
                "count": 3,
                "kv_tokens": 40_000,
                "engine": {
                    "block_size": 32,
                    "kv_dtype": "fp8",
                    "weight_dtype": "fp16",
                    "max_num_seqs": 64,
                    "chunked_prefill": False,
                    "prefix_caching": True,
                    "memory_share": 0.85,
                },
            }
        ],
    },
}


@pytest.fixture(scope="module")
def parser() -> FlexibleArgumentParser:
    return make_arg_parser(FlexibleArgumentParser())


def commands(plan: Plan) -> list[list[str]]:
    """The words of each command, the shell's variables filled in."""
    text = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*$", "", vllm_lines(plan)))
    text = text.replace('"$MODEL"', "/models/m").replace("'\"$HOST\"'", "10.0.0.1").replace('"$RANK"', "1")
    text = text.replace('"$HEAD"', "10.0.0.2")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(("MODEL=", "HOST="))]
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("name", PLANS)
def test_vllms_parser_takes_every_line(name: str, parser: FlexibleArgumentParser) -> None:
    plan = parse_plan(PLANS[name], name)
    served = 0
    for words in commands(plan):
        if "serve" not in words:
            continue
        served += 1
        args = parser.parse_args(words[words.index("serve") + 1 :])
        validate_parsed_serve_args(args)
        if args.kv_transfer_config is not None:
            check_connector(args)
    assert served == len(plan.pools)


def check_connector(args: Any) -> None:
    """What the connector would reject when it starts."""
    config = args.kv_transfer_config
    if isinstance(config, str | dict):
        config = KVTransferConfig(**(json.loads(config) if isinstance(config, str) else config))
    assert config.kv_connector == "HetKVConnector"
    Settings.parse(config.kv_connector_extra_config)
    assert args.pipeline_parallel_size <= VLLM_CONNECTOR.pp
    assert args.data_parallel_size <= VLLM_CONNECTOR.dp


@pytest.mark.parametrize("name", ["disaggregated", "not layerwise"])
def test_the_proxy_starts_from_its_line(name: str) -> None:
    (words,) = (w for w in commands(parse_plan(PLANS[name], name)) if "serve" not in w)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = " ".join([sys.executable, "-m", *words, f"--port {port}"])  # its loops are the shell's
    process = subprocess.Popen(["bash", "-c", f"exec {line}"], stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.1)
        pytest.fail("the proxy does not listen")
    finally:
        process.terminate()
        process.wait(30)
