#!/usr/bin/env python3
"""TTFT, TPOT and throughput of vLLM: P/D with hetkv, P/D with NixlConnector, and one instance, in one run.

Run with the Python of an environment that holds vLLM and hetkv (`make test-vllm` makes one):

    .venv-vllm/bin/python bench/vllm_pd.py --json vllm_pd.json

All servers are up at once and are asked in turn, so that all see the same machine. Every P/D system runs behind one
proxy. Tokens are greedy and compared with those of the one instance: a system whose tokens differ has no figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from hetkv.bench.environment import environment
from hetkv.errors import HetkvError

HETKV = {"kv_connector": "HetKVConnector", "kv_connector_module_path": "hetkv.integrations.vllm"}
NIXL = {"kv_connector": "NixlConnector"}
STOP_S = 20
CONNECT_TRIES = 3
CPU_BACKEND = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
"""What lets five servers share a small host, where the environment does not say otherwise."""
METRIC_TRIES = 100
REST_S = 1.1
"""Between two requests: vLLM's processes spin for a second after each step, so who comes next would share with them."""


class Answer(NamedTuple):
    """One streamed request. Times in seconds."""

    tokens: list[int]
    ttft: float
    tpot: float
    total: float


class Server:
    """A process of a group of its own; `url` is where it answers."""

    def __init__(self, name: str, folder: Path, arguments: list[str], **environment: str) -> None:
        self.name, self.port = name, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"{name}.log"
        command = [sys.executable, "-m", *arguments, "--host", "127.0.0.1", "--port", str(self.port)]
        with self.log.open("w") as out:
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

    def stop(self) -> None:
        """End the group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def observed(self, name: str, after: tuple[float, float] | None = None) -> tuple[float, float]:
        """Sum and count of a histogram of its metrics; with `after`, once there is one observation more."""
        for _ in range(METRIC_TRIES):
            text = httpx.get(self.url + "/metrics", timeout=30).text
            found = [re.search(rf"^{name}_{part}\{{.*\}} (\S+)$", text, re.MULTILINE) for part in ("sum", "count")]
            total, count = (float(match[1]) if match else 0.0 for match in found)
            if after is None or count > after[1]:
                return total, count
            time.sleep(0.05)
        raise HetkvError(f"{self.name}: no further observation of {name}")


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def checkpoint(folder: Path, args: argparse.Namespace) -> str:
    """A random-weight Llama, where none is given."""
    if args.model:
        return str(args.model)
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden, intermediate_size=3 * args.hidden, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=args.kv_heads, head_dim=64, vocab_size=1024,
        max_position_embeddings=4096,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    return str(folder / "model")


def vllm(name: str, folder: Path, model: str, block: int, transfer: dict[str, Any] | None, extra: list[str]) -> Server:
    """One vLLM server."""
    arguments = ["vllm.entrypoints.openai.api_server", "--model", model, "--dtype", "bfloat16"]
    arguments += ["--max-model-len", "2048", "--skip-tokenizer-init", "--block-size", str(block)]
    arguments += ["--no-enable-prefix-caching", *extra]
    if transfer is not None:
        arguments += ["--kv-transfer-config", json.dumps(transfer)]
    given = {name: os.environ.get(name, value) for name, value in CPU_BACKEND.items()}
    return Server(name, folder, arguments, **given, VLLM_NIXL_SIDE_CHANNEL_PORT=str(free_port()))


CLIENT = httpx.Client(timeout=600)  # made once: it would cost every request milliseconds


def ask(url: str, model: str, prompt: list[int], tokens: int) -> Answer:
    """One greedy request, streamed."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "return_token_ids": True}  # fmt: skip
    start, first, seen = time.perf_counter(), 0.0, []
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
            first = first or time.perf_counter()
    stop = time.perf_counter()
    return Answer(seen, first - start, (stop - first) / max(1, tokens - 1), stop - start)


def connect(url: str, model: str, prompt: list[int]) -> None:
    """A first request, so that the two sides are connected. On a busy machine NIXL's handshake may run out of time."""
    for left in reversed(range(CONNECT_TRIES)):
        try:
            ask(url, model, prompt, 2)
            return
        except HetkvError:
            if not left:
                raise


def spread(values: list[float]) -> dict[str, Any]:
    """Median, quartiles and every value."""
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": statistics.median(values), "quartiles": [quartiles[0], quartiles[2]], "all": values}


def measure(
    systems: dict[str, str], producers: dict[str, Server], model: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Each prompt to all systems, in an order of chance, one request at a time; then each with several at once."""
    draw = random.Random(args.seed)
    prompts = [[draw.randrange(5, 1000) for _ in range(args.prompt)] for _ in range(args.requests)]
    for url in systems.values():
        connect(url, model, prompts[0][: args.prompt // 2])
    histogram = "vllm:hetkv_exposed_seconds"
    before = {server: server.observed(histogram) for server in producers.values()}
    answers: dict[str, list[Answer]] = {name: [] for name in systems}
    exposed: dict[str, list[float]] = {name: [] for name in producers}
    for prompt in prompts:
        for name in draw.sample(list(systems), len(systems)):
            time.sleep(REST_S)
            answers[name].append(ask(systems[name], model, prompt, args.tokens))
            if name in producers:
                server = producers[name]
                after = server.observed(histogram, before[server])
                exposed[name].append(after[0] - before[server][0])
                before[server] = after
    out: dict[str, Any] = {}
    for name, seen in answers.items():
        same = sum(a.tokens == b.tokens for a, b in zip(seen, answers["one instance"], strict=True))
        out[name] = {"identical": same, "of": len(seen)}
        if same < len(seen):
            continue
        out[name]["ttft_s"] = spread([answer.ttft for answer in seen])
        out[name]["tpot_s"] = spread([answer.tpot for answer in seen])
        if name in exposed:
            out[name]["exposed_s"] = spread(exposed[name])
        start = time.perf_counter()
        with ThreadPoolExecutor(args.concurrency) as pool:
            done = list(pool.map(lambda prompt, url=systems[name]: ask(url, model, prompt, args.tokens), prompts))
        out[name]["tokens_per_s"] = sum(len(a.tokens) for a in done) / (time.perf_counter() - start)
    return out


def show(results: dict[str, Any]) -> None:
    """A short table for people."""
    print(f"{'system':<24}{'identical':>11}{'TTFT ms':>10}{'TPOT ms':>10}{'exposed ms':>12}{'tokens/s':>10}")
    for name, result in results.items():
        cells = [f"{result['identical']}/{result['of']}"]
        for key in ("ttft_s", "tpot_s", "exposed_s"):
            cells.append(f"{result[key]['median'] * 1e3:.1f}" if key in result else "")
        cells.append(f"{result['tokens_per_s']:.0f}" if "tokens_per_s" in result else "")
        print(f"{name:<24}{cells[0]:>11}{cells[1]:>10}{cells[2]:>10}{cells[3]:>12}{cells[4]:>10}")

    for key, name, other in (
        ("ttft_s", "hetkv prefill_first", "NixlConnector"),
        ("exposed_s", "hetkv concurrent", "hetkv prefill_first"),
    ):
        if all(key in results.get(system, {}) for system in (name, other)):
            ratio = results[name][key]["median"] / results[other][key]["median"]
            print(f"{key.removesuffix('_s')}: {name} is {ratio:.3f} x {other}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--model", help="checkpoint directory; default: a random-weight Llama of the sizes below")
    for name, value in (("layers", 6), ("hidden", 256), ("heads", 8), ("kv-heads", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--prefill-block", type=int, default=128)
    parser.add_argument("--decode-block", type=int, default=128)
    parser.add_argument("--requests", type=int, default=30)
    parser.add_argument("--prompt", type=int, default=1000, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--no-nixl", action="store_true", help="leave NixlConnector out")
    parser.add_argument("--nixl-device", default="cpu", help="kv_buffer_device of NixlConnector")
    parser.add_argument("--start-timeout", type=float, default=300.0, help="seconds for a server to start")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("vllm", nargs="*", help="options for every vLLM server, behind --")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="vllm_pd_"))
    model = checkpoint(folder, args)
    servers: list[Server] = []

    def pair(name: str, transfer: dict[str, Any]) -> tuple[Server, Server]:
        sides = (("kv_producer", args.prefill_block), ("kv_consumer", args.decode_block))
        made = [vllm(f"{name}_{role}", folder, model, block, {**transfer, "kv_role": role}, args.vllm)
                for role, block in sides]  # fmt: skip
        servers.extend(made)
        return made[0], made[1]

    def proxy(name: str, sides: tuple[Server, Server], mode: str) -> str:
        arguments = [
            "hetkv.integrations.vllm.proxy",
            "--prefill",
            sides[0].url,
            "--decode",
            sides[1].url,
            "--mode",
            mode,
        ]
        server = Server(name, folder, arguments)
        servers.append(server)
        server.wait(args.start_timeout)
        return server.url

    try:
        alone = vllm("one_instance", folder, model, args.decode_block, None, args.vllm)
        servers.append(alone)
        ours = pair("hetkv", HETKV)
        theirs = None if args.no_nixl else pair("nixl", {**NIXL, "kv_buffer_device": args.nixl_device})
        for server in list(servers):
            server.wait(args.start_timeout)
        systems = {
            "one instance": alone.url,
            "hetkv prefill_first": proxy("proxy_prefill_first", ours, "prefill_first"),
            "hetkv concurrent": proxy("proxy_concurrent", ours, "concurrent"),
        }
        if theirs is not None:
            systems["NixlConnector"] = proxy("proxy_nixl", theirs, "prefill_first")
        producers = {name: ours[0] for name in systems if name.startswith("hetkv")}
        results = measure(systems, producers, model, args)
    except HetkvError as error:
        sys.exit(f"vllm_pd: {error}")
    finally:
        for server in reversed(servers):
            server.stop()
    show(results)
    if args.json:
        options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        args.json.write_text(json.dumps({**environment(), "options": options, "systems": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
