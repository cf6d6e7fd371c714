"""OpenAI servers and the proxy, as a user starts them, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

HTTP = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""The servers are on this host, whatever the environment says of proxies."""
START_S = float(os.environ.get("HETKV_VLLM_SERVER_START_S", "900"))
TOKENS = 8
MODES = ("prefill_first", "concurrent")
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

    def cpu_seconds(self) -> float:
        """Processor time of all its processes since they started."""
        parent = psutil.Process(self.process.pid)
        times = [process.cpu_times() for process in (parent, *parent.children(recursive=True))]
        return sum(each.user + each.system for each in times)

    def post(self, body: dict[str, Any], **more: str) -> dict[str, Any]:
        """One whole answer. `more`: headers, with `_` for `-`."""
        data = json.dumps(body).encode()
        headers = {
            "Content-Type": "application/json",
            **{name.replace("_", "-"): value for name, value in more.items()},
        }
        request = urllib.request.Request(self.url + "/v1/completions", data, headers)
        with HTTP.open(request, timeout=600) as response:
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


def server(log: Path, model: str, role: str, block_size: int, policy: str = "recompute") -> Process:
    """`vllm serve` of one role.

    In float32: logits of bfloat16 have ties, between which a batch of another size, or sampling, decides.
    """
    transfer = {**CONNECTOR, "kv_role": role, "kv_load_failure_policy": policy}
    options = ["--host", "127.0.0.1", "--model", model, "--skip-tokenizer-init", "--dtype", "float32",
               "--max-model-len", "2048", "--enforce-eager", "--block-size", str(block_size),
               "--no-enable-prefix-caching", "--kv-transfer-config", json.dumps(transfer)]  # fmt: skip
    return Process(log, ["vllm.entrypoints.openai.api_server", *options])


@contextlib.contextmanager
def cluster(model: str, folder: Path, policy: str = "recompute") -> Iterator[dict[str, Process]]:
    """A prefill and a decode server of different block sizes, and a proxy in each mode, by name."""
    servers = {
        "prefill": server(folder / "prefill.log", model, "kv_producer", 32, policy),
        "decode": server(folder / "decode.log", model, "kv_consumer", 128, policy),
    }
    try:
        for process in servers.values():
            process.wait()
        urls = ["--prefill", servers["prefill"].url, "--decode", servers["decode"].url]
        for mode in MODES:
            servers[mode] = Process(folder / f"{mode}.log", ["hetkv", "proxy", *urls, "--mode", mode])
            servers[mode].wait()
        yield servers
    finally:
        for process in servers.values():
            process.kill(signal.SIGTERM)


def body_of(model: str, prompt: list[int] | list[list[int]], **more: Any) -> dict[str, Any]:
    """A request of one prompt, or of a list of them."""
    return {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": TOKENS,
            "ignore_eos": True, "return_token_ids": True, **more}  # fmt: skip


def choices_of(answer: dict[str, Any]) -> list[list[int]]:
    """Tokens of each choice."""
    return [choice["token_ids"] for choice in answer["choices"]]


def tokens_of(answer: dict[str, Any]) -> list[int]:
    """Tokens of the first choice."""
    return choices_of(answer)[0]
