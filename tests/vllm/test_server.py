"""Two OpenAI servers and the proxy, as a user starts them: both modes, streams, metrics, a prefill server that dies."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.engines import DTYPE, checkpoint

HTTP = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""The servers are on this host, whatever the environment says of proxies."""
START_S = float(os.environ.get("HETKV_VLLM_SERVER_START_S", "300"))
TOKENS = 8
CONNECTOR = {"kv_connector": "HetKVConnector", "kv_connector_module_path": "hetkv.integrations.vllm"}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class Process:
    """A server of its own process group. `url` is where it answers."""

    def __init__(self, log: Path, arguments: list[str]) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *arguments, "--port", str(self.port)],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + START_S
        while True:
            try:
                HTTP.open(self.url + "/health", timeout=2)
                return
            except OSError:
                assert self.process.poll() is None, self.log.read_text()[-3000:]
                assert time.monotonic() < deadline, f"{self.log} did not start within {START_S} s"
                time.sleep(0.5)

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """The whole group."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, how)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def post(self, body: dict[str, Any]) -> dict[str, Any]:
        """One whole answer."""
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + "/v1/completions", data, headers)
        with HTTP.open(request, timeout=120) as response:
            answer: dict[str, Any] = json.load(response)
            return answer

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric over its label sets that have `labels`."""
        text = HTTP.open(self.url + "/metrics", timeout=10).read().decode()
        total = 0.0
        for line in text.splitlines():
            found = re.fullmatch(re.escape(name) + r"\{(.*)\} (\S+)", line)
            if found and all(f'{key}="{value}"' in found[1] for key, value in labels.items()):
                total += float(found[2])
        return total


def server(log: Path, model: str, role: str, block_size: int) -> Process:
    """`vllm serve` of one role."""
    transfer = {**CONNECTOR, "kv_role": role, "kv_load_failure_policy": "recompute"}
    options = ["--host", "127.0.0.1", "--model", model, "--skip-tokenizer-init", "--dtype", DTYPE,
               "--max-model-len", "2048", "--enforce-eager", "--block-size", str(block_size),
               "--no-enable-prefix-caching", "--kv-transfer-config", json.dumps(transfer)]  # fmt: skip
    return Process(log, ["vllm.entrypoints.openai.api_server", *options])


@pytest.fixture(scope="module")
def cluster(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Process]]:
    folder = tmp_path_factory.mktemp("servers")
    model = checkpoint(models)
    servers = {
        "prefill": server(folder / "prefill.log", model, "kv_producer", 32),
        "decode": server(folder / "decode.log", model, "kv_consumer", 128),
    }
    try:
        for process in servers.values():
            process.wait()
        urls = ["--prefill", servers["prefill"].url, "--decode", servers["decode"].url]
        for mode in ("prefill_first", "concurrent"):
            servers[mode] = Process(folder / f"{mode}.log", ["hetkv.integrations.vllm.proxy", *urls, "--mode", mode])
            servers[mode].wait()
        yield servers
    finally:
        for process in servers.values():
            process.kill(signal.SIGTERM)


def body_of(models: Path, prompt: list[int], **more: Any) -> dict[str, Any]:
    return {"model": checkpoint(models), "prompt": prompt, "temperature": 0, "max_tokens": TOKENS,
            "ignore_eos": True, "return_token_ids": True, **more}  # fmt: skip


def tokens_of(answer: dict[str, Any]) -> list[int]:
    tokens: list[int] = answer["choices"][0]["token_ids"]
    return tokens


@pytest.mark.parametrize("mode", ["prefill_first", "concurrent"])
def test_proxy(cluster: dict[str, Process], models: Path, prompts: list[list[int]], mode: str) -> None:
    """Token-identical through the proxy, several at once, and counted by vLLM's own metrics."""
    some, decode = prompts[::5], cluster["decode"]
    alone = [tokens_of(decode.post(body_of(models, prompt))) for prompt in some]
    hits, loads = decode.metric("vllm:external_prefix_cache_hits_total"), decode.metric("vllm:hetkv_loads_total")
    local = decode.metric("vllm:prompt_tokens_by_source_total", source="local_compute")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda prompt: cluster[mode].post(body_of(models, prompt)), some))
    assert [tokens_of(answer) for answer in answers] == alone
    assert decode.metric("vllm:hetkv_loads_total") - loads == len(some)
    moved = sum(len(prompt) - 1 for prompt in some)
    assert decode.metric("vllm:external_prefix_cache_hits_total") - hits == moved
    assert decode.metric("vllm:prompt_tokens_by_source_total", source="local_compute") - local == len(some)
    assert decode.metric("vllm:hetkv_load_seconds_count") >= len(some)
    assert cluster["prefill"].metric("vllm:hetkv_exposed_seconds_count") >= len(some)
    assert cluster["prefill"].metric("vllm:hetkv_bytes_total") == decode.metric("vllm:hetkv_bytes_total") > 0


@pytest.mark.parametrize("mode", ["prefill_first", "concurrent"])
def test_stream(cluster: dict[str, Process], models: Path, prompts: list[list[int]], mode: str) -> None:
    prompt = prompts[11]
    alone = tokens_of(cluster["decode"].post(body_of(models, prompt)))
    data = json.dumps(body_of(models, prompt, stream=True)).encode()
    request = urllib.request.Request(cluster[mode].url + "/v1/completions", data, {"Content-Type": "application/json"})
    tokens: list[int] = []
    with HTTP.open(request, timeout=120) as response:
        for line in response:
            if line.startswith(b"data: {"):
                tokens += json.loads(line[6:])["choices"][0]["token_ids"]
    assert tokens == alone


def test_wrong_requests_are_the_servers_to_reject(cluster: dict[str, Process], models: Path) -> None:
    for mode in ("prefill_first", "concurrent"):
        with pytest.raises(urllib.error.HTTPError) as rejected:
            cluster[mode].post(body_of(models, [7] * 3000))
        assert rejected.value.code == 400


def test_prefill_server_killed(cluster: dict[str, Process], models: Path, prompts: list[list[int]]) -> None:
    """Without one the decode server computes; nothing waits for a lease."""
    prompt = prompts[10]
    alone = tokens_of(cluster["decode"].post(body_of(models, prompt)))
    cluster["prefill"].kill()
    for mode in ("prefill_first", "concurrent"):
        start = time.monotonic()
        assert tokens_of(cluster[mode].post(body_of(models, prompt))) == alone
        assert time.monotonic() - start < 30
