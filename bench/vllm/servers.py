"""The processes that `bench/vllm/pd.py` measures: vLLM servers and hetkv's proxy, and what they are asked."""

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
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from hetkv.errors import HetkvError

STOP_S = 20
CONNECT_TRIES = 3
METRIC_TRIES = 100
CPU_BACKEND = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
"""What lets two servers share a small host, where the environment does not say otherwise."""


UCX = {"UCX_POSIX_ERROR_HANDLING": "y", "UCX_SYSV_ERROR_HANDLING": "y"}
"""What hetkv sets for itself. Without it NIXL goes over TCP on one host, at the pace of the producer's steps."""


class Answer(NamedTuple):
    """One streamed request. Times in seconds."""

    tokens: list[int]
    ttft: float
    whole: float
    first: int
    """Tokens of the first piece: a server slower than its engine sends several at once, so the first one late."""

    @property
    def tpot(self) -> float | None:
        """From the first piece to the last, by the tokens between; `None` where all came at once."""
        later = len(self.tokens) - self.first
        return (self.whole - self.ttft) / later if later else None


class Server:
    """A process of a group of its own; `url` is where it answers."""

    def __init__(self, name: str, folder: Path, arguments: list[str], **environment: str) -> None:
        self.name, self.port = name, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"{name}.log"
        command = [sys.executable, "-m", *arguments, "--host", "127.0.0.1", "--port", str(self.port)]
        with self.log.open("a") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **environment}, start_new_session=True
            )

    def wait(self, seconds: float) -> None:
        """Until it answers."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(self.url + "/health", timeout=2).status_code == 200:
                    return
            if self.process.poll() is not None:
                break
            time.sleep(0.5)
        raise HetkvError(f"{self.name} did not start; see {self.log}")

    def signal(self, number: int) -> None:
        """To the whole group, where there still is one."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def stop(self) -> None:
        """End the group: what is left of it after `STOP_S` is killed."""
        try:
            self.signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_S)
        finally:
            self.signal(signal.SIGKILL)  # also children that its leader left
            self.process.wait()

    def observed(self, name: str, after: tuple[float, float]) -> tuple[float, float]:
        """Sum and count of a histogram of its metrics, once there is one observation more than `after` had."""
        for _ in range(METRIC_TRIES):
            text = httpx.get(self.url + "/metrics", timeout=30).text
            found = [re.search(rf"^{name}_{part}\{{.*\}} (\S+)$", text, re.MULTILINE) for part in ("sum", "count")]
            total, count = (float(match[1]) if match else 0.0 for match in found)
            if count == after[1] + 1:
                return total, count
            if count > after[1]:
                raise HetkvError(f"{self.name}: several observations of {name} for one request: it has several workers")
            time.sleep(0.05)
        raise HetkvError(f"{self.name}: no further observation of {name}")


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def vllm(name: str, folder: Path, model: str, block: int, transfer: dict[str, Any] | None, extra: list[str]) -> Server:
    """One vLLM server."""
    arguments = ["vllm.entrypoints.openai.api_server", "--model", model, "--dtype", "bfloat16"]
    arguments += ["--max-model-len", "2048", "--skip-tokenizer-init", "--block-size", str(block)]
    arguments += ["--no-enable-prefix-caching", *extra]
    if transfer is not None:
        arguments += ["--kv-transfer-config", json.dumps(transfer)]
    given = {name: os.environ.get(name, value) for name, value in {**CPU_BACKEND, **UCX}.items()}
    return Server(name, folder, arguments, **given, VLLM_NIXL_SIDE_CHANNEL_PORT=str(free_port()))


def proxy(name: str, folder: Path, prefill: Server, decode: Server, mode: str) -> Server:
    """hetkv's proxy before a pair of servers."""
    arguments = ["hetkv", "proxy", "--prefill", prefill.url, "--decode", decode.url, "--mode", mode]
    return Server(name, folder, arguments)


CLIENT = httpx.Client(timeout=600)  # made once: it would cost every request milliseconds


def ask(url: str, model: str, prompt: list[int], tokens: int) -> Answer:
    """One greedy request, streamed."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "return_token_ids": True}  # fmt: skip
    start, ttft, first = time.perf_counter(), 0.0, 0
    seen: list[int] = []
    with CLIENT.stream("POST", url + "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise HetkvError(f"{url}: HTTP {response.status_code}: {response.read()[:300]!r}")
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            piece = json.loads(line[6:])
            if "choices" not in piece:
                raise HetkvError(f"{url}: {str(piece)[:300]}")
            seen += piece["choices"][0]["token_ids"]
            if seen and not first:
                ttft, first = time.perf_counter() - start, len(seen)
    return Answer(seen, ttft, time.perf_counter() - start, first)


def connect(url: str, model: str, prompt: list[int]) -> None:
    """A first request, so that the two sides are connected. On a busy machine NIXL's handshake may run out of time."""
    for left in reversed(range(CONNECT_TRIES)):
        try:
            ask(url, model, prompt, 2)
            return
        except HetkvError:
            if not left:
                raise
