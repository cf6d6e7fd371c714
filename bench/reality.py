"""The running system against the simulator, and aggregated against disaggregated serving.

python bench/reality.py --out DIR --budget 450                               # the demo's checkpoint, on CPU
python bench/reality.py --out DIR --budget 450 --model shape:llama-2-7b      # random weights, on the GPUs there are
python bench/reality_predict.py DIR                                          # the simulator's part again, from DIR

Two deployments of two instances each stand side by side, and one at a time is loaded. For each: requests one by one,
then as many as make a full load, which gives the capacity; Poisson arrivals at 30, 60 and 90 % of it for the simulator
to be judged on, and at 20, 45 and 75 % to calibrate on: one before each that is judged, as machines are faster and
slower over minutes. DIR has every request and every engine step, after each part anew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from hetkv.bench.environment import environment, gpus  # noqa: E402
from hetkv.cli.traffic import write_rows  # noqa: E402
from hetkv.errors import InputError  # noqa: E402
from hetkv.serve.loadtest import LoadTest, Target, only_model  # noqa: E402
from hetkv.simulator.metrics import Slo, summarise  # noqa: E402
from hetkv.simulator.request import FINISHED, Request  # noqa: E402
from hetkv.simulator.traffic.lengths import parse_lengths  # noqa: E402
from hetkv.simulator.traffic.sources import Traffic  # noqa: E402
from hetkv.simulator.traffic.workload import Workload  # noqa: E402

DEMO = ROOT / "hetkv" / "runtime" / "data" / "demo"
DEPLOYMENTS = ("aggregated", "disaggregated")
START_S = 150.0
PROBES = 6
SHARES = (0.3, 0.6, 0.9)
CALIBRATED = (0.2, 0.45, 0.75)
"""Shares of the capacity that are judged, and that are calibrated on."""


class Fixed(Workload):
    """`count` requests at once, to be held back by the load test's limit on those in flight."""

    hash_tokens = 0
    about = "requests at once"

    def __init__(self, count: int, prompts: str, outputs: str, gap: float = 0.0) -> None:
        self._count, self._prompts, self._outputs, self._gap = count, prompts, outputs, gap

    def requests(self, seed: int) -> Iterator[Request]:
        draws = np.random.default_rng([seed, 1]), np.random.default_rng([seed, 2])
        prompts = parse_lengths(self._prompts, "--prompt-tokens")(draws[0], self._count).tolist()
        outputs = parse_lengths(self._outputs, "--output-tokens")(draws[1], self._count).tolist()
        for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
            yield Request(number, number * self._gap, prompt, output)


class System:
    """One `hetkv serve` and its folder."""

    def __init__(self, name: str, args: argparse.Namespace, begin: float) -> None:
        self.name, self.args, self._begin = name, args, begin
        self.folder = args.out / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self._log = self.folder / "serve.log"
        instances = ["--prefill", args.prefill, "--decode", args.decode]
        if name == "aggregated":
            instances = ["--aggregated", args.aggregated]
        command = [
            sys.executable, "-m", "hetkv", "serve", "--model", str(args.model), "--port", "0", *instances,
            "--steps", str(self.folder / "steps"), "--no-prefix-caching", "--max-num-seqs", str(args.max_num_seqs),
            "--max-num-batched-tokens", str(args.max_num_batched_tokens), "--threads", str(args.threads),
            "--kv-tokens", str(args.kv_tokens),
        ]  # fmt: skip
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        with self._log.open("w") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "PYTHONPATH": path})
        self.found: dict[str, Any] = {"command": command[1:], "runs": []}

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._begin:6.1f} s  {self.name}: {text}", flush=True)

    def wait(self) -> None:
        """Until requests are answered. Raises `RuntimeError` with the end of the log where that will not be."""
        deadline = time.monotonic() + START_S
        while not (ready := re.search(r"(http://\S+)/v1 serves", self._log.read_text())):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not start:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.1)
        url = ready[1]
        members = re.findall(r"^\S+: (\w+) on (.+), .+, (\d+) tokens$", self._log.read_text(), re.MULTILINE)
        self.found["instances"] = [
            {"role": role, "device": device, "kv_tokens": int(tokens)} for role, device, tokens in members
        ]
        model = asyncio.run(only_model(url, ""))
        self.target = Target(url=url, model=model, vocabulary=self.args.vocabulary, timeout_s=60)
        self.say(f"ready, {members}")

    def load(self, label: str, workload: Workload, seed: int, limit_s: float, in_flight: int | None = None) -> Any:
        """Send a workload; columns of its requests. Its rows and its figures are kept under `label`."""
        test = LoadTest(
            Target(url=self.target.url, model=self.target.model, vocabulary=self.target.vocabulary,
                   timeout_s=60, concurrency=in_flight)
        )  # fmt: skip
        start, begin, cut, busy = time.time(), time.monotonic(), False, _busy_s()
        try:
            asyncio.run(asyncio.wait_for(test.run(workload, seed), limit_s))
        except (asyncio.TimeoutError, TimeoutError):
            cut = True
        seconds = time.monotonic() - begin
        columns = test.records.columns()
        summary = summarise(columns, Slo(), seconds)
        summary.update(workload=workload.about, seed=seed, errors=test.errors, cut=cut, start=start, end=time.time())
        summary["busy_cores"] = (_busy_s() - busy) / seconds
        self.found.setdefault("loads", {})[label] = summary
        write_rows(str(self.folder / f"{label}.csv"), columns)
        figures = {key: _milliseconds(summary[key]) for key in ("ttft_ms", "tpot_ms")}
        rates = f"{summary['throughput_rps']:.3g} requests/s, {summary['output_tokens_per_s']:.0f} tokens/s"
        rest = f"{summary['busy_cores']:.1f} cores busy{', CUT' if cut else ''} {test.errors or ''}"
        self.say(
            f"{label}: {summary['finished']} of {summary['requests']} in {seconds:.1f} s, {rates}, "
            f"TTFT {figures['ttft_ms']} TPOT {figures['tpot_ms']}, {rest}"
        )
        return columns

    def probe(self, lengths: list[int]) -> None:
        """Requests one by one: two tokens each."""
        self.load("warm", Fixed(4, str(lengths[-1]), "4"), 1, 60, 2)
        args = self.args  # kernels of all sizes of a batch are loaded before anything is timed
        self.load("warm_full", Fixed(args.in_flight, args.prompt_tokens, "8"), 1, 15, args.in_flight)
        for length in lengths:
            tries = [self.load(f"try_{length}", Fixed(1, str(length), "2"), 2, 60) for _ in range(2)]
            gap = 0.02 + 2 * float((tries[-1]["last_token"] - tries[-1]["arrival"])[0])
            self.load(f"probe_{length}", Fixed(PROBES, str(length), "2", gap), 3, 60)
        self.found["probes"] = lengths

    def capacity(self, seconds: float) -> float:
        """Requests per second with `in_flight` requests always there."""
        args = self.args
        columns = self.load("full", Fixed(4 * args.in_flight, args.prompt_tokens, args.output_tokens), 9,
                            max(15.0, seconds), args.in_flight)  # fmt: skip
        ends = np.sort(columns["last_token"][columns["status"] == FINISHED])
        first, stop = len(ends) // 4, len(ends) - max(1, min(len(ends) // 4, args.in_flight // 2))
        if stop - first < 4:
            raise InputError(f"{self.name}: only {len(ends)} requests finished while its capacity was measured")
        rate = float((stop - first) / (ends[stop] - ends[first]))
        self.found["capacity_rps"] = rate
        self.say(f"capacity {rate:.4g} requests/s with {args.in_flight} in flight")
        return rate

    def calibrate(self, share: float, seconds: float) -> None:
        """A load between those that are judged."""
        self._arrivals(f"calibrate_{share:g}", share * self.found["capacity_rps"], seconds, round(1000 * share))

    def _arrivals(self, label: str, rate: float, seconds: float, seed: int) -> None:
        args = self.args
        traffic = Traffic(
            rate=rate, duration=seconds, prompt_tokens=args.prompt_tokens, output_tokens=args.output_tokens
        )
        self.load(label, traffic.build(), seed, 2 * seconds + 30)

    def judge(self, label: str, rate: float, seconds: float, share: float) -> None:
        """Poisson arrivals at a rate that no calibration has seen."""
        seed = 100 + round(100 * share)
        self._arrivals(label, rate, seconds, seed)
        run = {"label": label, "share": share, "rate": rate, "duration": seconds, "seed": seed}
        self.found["runs"].append(run)

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _busy_s() -> float:
    """Seconds that the cores of this machine have worked, for whomever."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def _milliseconds(spread: dict[str, float | None]) -> str:
    return "/".join("-" if spread[key] is None else f"{spread[key]:.1f}" for key in ("p50", "p99")) + " ms"


def main() -> int:
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    if os.getloadavg()[0] > 1:
        print(f"load average {os.getloadavg()[0]:.1f} at the start: not a machine at rest, its figures say little")
    about = {
        **environment(),
        "model": str(args.model).removeprefix(f"{ROOT}/"),
        "traffic": {"prompt_tokens": args.prompt_tokens, "output_tokens": args.output_tokens},
        "engine": {"max_num_seqs": args.max_num_seqs, "max_num_batched_tokens": args.max_num_batched_tokens},
        "in_flight": args.in_flight,
        "load_average_before": os.getloadavg(),
    }
    systems = [System(name, args, begin) for name in args.deployments]

    def keep() -> None:
        found = {system.name: system.found for system in systems}
        (args.out / "measured.json").write_text(json.dumps({**about, "deployments": found}, indent=1) + "\n")

    def left() -> float:
        return float(args.budget - (time.monotonic() - begin))

    failed = ""
    try:
        for system in systems:
            system.wait()
        for system in systems:
            system.probe(args.probe_tokens)
            keep()
        stage = left()
        for system in systems:
            system.capacity(0.08 * stage)
            keep()
        plan = [
            (one, f"rate_{share:g}", share * one.found["capacity_rps"], share, before)
            for share, before in zip(SHARES, CALIBRATED, strict=True)
            for one in systems
        ]
        if len(systems) == 2:  # a common rate shows both deployments under the same traffic
            low, high = sorted(systems, key=lambda one: float(one.found["capacity_rps"]))
            plan.append((high, "common", 0.9 * low.found["capacity_rps"], 0.9, 0.0))
        for number, (system, label, rate, share, before) in enumerate(plan):
            if before:
                system.calibrate(before, args.seconds or 0.03 * stage)
                keep()
            after = sum(0.04 * stage for _, _, _, _, more in plan[number + 1 :] if more)
            seconds = (left() - 15 - after) / (len(plan) - number)
            seconds = args.seconds or max(8.0, seconds - min(12.0, seconds / 4))  # until the last ones have ended
            if left() < 20:
                raise RuntimeError(f"no time left for {system.name} {label}")
            system.judge(label, rate, seconds, share)
            keep()
    except (RuntimeError, InputError) as error:
        failed = str(error)
        print(failed, flush=True)
    finally:
        for system in systems:
            system.end()
        keep()
    from reality_predict import predict

    if not any(system.found["runs"] for system in systems):
        return 1
    try:
        predict(args.out)
    except ImportError as error:  # SciPy, which fits the steps
        print(f"{error}: run bench/reality_predict.py {args.out} where it is installed")
        return 1
    return int(bool(failed))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--budget", type=float, default=450.0, metavar="S", help="seconds of all measurements (450)")
    parser.add_argument("--seconds", type=float, metavar="S", help="of each load at a rate (what the budget leaves)")
    parser.add_argument("--model", default=str(DEMO), help="checkpoint, or shape:NAME with random weights")
    parser.add_argument("--deployments", nargs="+", choices=DEPLOYMENTS, default=DEPLOYMENTS, metavar="NAME",
                        help="one alone where its instances would share a GPU with the other's (both)")  # fmt: skip
    parser.add_argument("--aggregated", default="2xTP1")
    parser.add_argument("--prefill", default="TP1")
    parser.add_argument("--decode", default="TP1")
    parser.add_argument("--in-flight", type=int, default=64, metavar="N", help="requests that make a full load (64)")
    parser.add_argument("--probe-tokens", type=int, nargs="+", metavar="N", help="prompts that are sent one by one")
    parser.add_argument("--prompt-tokens", default=None, metavar="DIST")
    parser.add_argument("--output-tokens", default=None, metavar="DIST")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--kv-tokens", type=int, help="of each instance, two of which share a GPU")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    shape = str(args.model).startswith("shape:")
    args.prompt_tokens = args.prompt_tokens or ("uniform:512:1536" if shape else "uniform:50:400")
    args.output_tokens = args.output_tokens or ("uniform:64:192" if shape else "uniform:16:64")
    if not args.kv_tokens:
        args.kv_tokens = 30_000 if not shape else 64_000 if len(gpus()) > 1 else 20_000
    args.vocabulary = 30000 if shape else 1000
    args.probe_tokens = args.probe_tokens or ([256, 1024, 2000] if shape else [50, 200, 450])
    return args


if __name__ == "__main__":
    sys.exit(main())
