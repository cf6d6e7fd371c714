"""Instances of one host, all to all; each second one is killed: `python -m tests.transport.fleet` prints JSON.

Each instance is a process that sends and receives. It asks the others for requests without pause, compares what arrives
with what their pools hold, and counts in a file that all share, so that a kill loses no count. A killed instance starts
again at once under the same name and ports. `--pause` spaces requests out, so that the rate is that of the links and
not of the processors: a lasting loss after restarts shows there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hetkv.bench.environment import environment
from hetkv.errors import HetkvError, WaitTimeoutError
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec
from hetkv.transport.config import TransferConfig
from hetkv.transport.exchange import Exchange
from hetkv.transport.receiver import RecvHandle

SECRET = b"a secret of the fleet"
SPEC = KVSpec.uniform(2, 2, 64)
BLOCKS, BLOCK = 64, 16
CALLERS = 2
"""Requests that an instance waits for at a time, each with a quarter of the pool for itself."""
LEASE_S = 10.0
BUCKETS_A_SECOND = 10
COUNTS = ("begun", "complete", "failed", "wrong", "hung", "links", "rest", "runs_ms")
"""The last: when the instance's process had its modules, since `--epoch`."""


@dataclass
class Board:
    """What all processes write to: completed requests by tenth of a second, and counts, each by instance."""

    ended: np.ndarray
    counts: np.ndarray

    @classmethod
    def open(cls, folder: Path, instances: int, seconds: float, mode: str = "r+") -> Board:
        def array(name: str, shape: tuple[int, ...]) -> np.ndarray:
            return np.memmap(folder / name, np.uint32, mode, shape=shape)

        buckets = int(seconds * BUCKETS_A_SECOND)
        return cls(array("ended", (instances, buckets)), array("counts", (instances, len(COUNTS))))

    def add(self, instance: int, name: str, value: int = 1) -> None:
        """One thread of an instance at a time."""
        self.counts[instance, COUNTS.index(name)] += value

    def set(self, instance: int, name: str, value: int) -> None:
        self.counts[instance, COUNTS.index(name)] = value

    def of(self, name: str) -> np.ndarray:
        return self.counts[:, COUNTS.index(name)]


def pattern(instance: int) -> np.ndarray:
    """The sender's half of a pool: `[layer, segment, block, token, head, channel]`."""
    made = np.random.default_rng(instance).integers(0, 30000, (2, 2, BLOCKS // 2, BLOCK, 2, 64), dtype=np.uint16)
    return made.view(np.float16)


class Member:
    """One instance."""

    def __init__(self, number: int, options: argparse.Namespace) -> None:
        self.number, self.options = number, options
        self.board = Board.open(options.folder, options.instances, options.most_seconds)
        self.board.set(number, "runs_ms", int((time.time() - options.epoch) * 1000))
        self.life = f"{os.getpid()}"
        self.patterns = [pattern(one) for one in range(options.instances)]
        self.memory = np.zeros((2, 2, BLOCKS, BLOCK, 2, 64), np.float16)
        self.memory[:, :, : BLOCKS // 2] = self.patterns[number]
        pool = KVPool.from_tensors(SPEC, self.memory, "layer segment block token head channel")
        config = TransferConfig(
            slot_bytes=1 << 16, window_bytes=2 * options.instances << 16, lease_s=LEASE_S, hold_s=LEASE_S,
            spin_us=0, peer_timeout_s=options.peer_timeout,
        )  # fmt: skip
        self.node = Exchange(pool, secret=SECRET, instance=f"i{number}", config=config)
        self.stopping = threading.Event()
        self.lock = threading.Lock()
        self.asked = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.asked.bind(("127.0.0.1", options.ports + 3 * number + 2))
        self.asked.settimeout(0.2)

    def run(self) -> None:
        """Until the parent closes this process's input."""
        self.node.sender.listen(f"127.0.0.1:{self.options.ports + 3 * self.number}")
        work = [self.link, self.answer, *[lambda part=part: self.call(part) for part in range(CALLERS)]]
        threads = [threading.Thread(target=one) for one in work]
        for thread in threads:
            thread.start()
        sys.stdin.read()
        self.stopping.set()
        for thread in threads:
            thread.join()
        deadline = time.monotonic() + LEASE_S + 5
        sides = (self.node.sender, self.node.receiver)
        while any(side.stats()["open_requests"] for side in sides) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.board.set(self.number, "rest", 1 + sum(int(side.stats()["open_requests"]) for side in sides))
        self.node.close()

    def link(self) -> None:
        """Links to all others' senders, and again to those that were lost."""
        while not self.stopping.is_set():
            linked = {peer.description.instance for peer in self.node.receiver.peers}
            self.board.set(self.number, "links", len(linked))
            for other in range(self.options.instances):
                if other == self.number or f"i{other}" in linked or self.stopping.is_set():
                    continue
                with contextlib.suppress(HetkvError):
                    self.node.receiver.connect(f"127.0.0.1:{self.options.ports + 3 * other}")
            self.stopping.wait(0.1)

    def answer(self) -> None:
        """Sends what others ask for: a datagram with the id and the blocks."""
        while not self.stopping.is_set():
            try:
                request, blocks = json.loads(self.asked.recv(4096))
            except TimeoutError:
                continue
            except OSError:
                return
            with contextlib.suppress(HetkvError):
                self.node.sender.send(request, blocks, len(blocks) * BLOCK).send_layers()

    def call(self, part: int) -> None:
        """Asks for one request after the other."""
        chosen = random.Random(f"{self.life} {part}")
        share = BLOCKS // 2 // CALLERS
        mine = list(range(BLOCKS // 2 + part * share, BLOCKS // 2 + (part + 1) * share))
        for number in range(1 << 30):
            if self.stopping.is_set():
                return
            peers = [peer.description.instance for peer in self.node.receiver.peers]
            if not peers:
                time.sleep(0.01)
                continue
            source = int(chosen.choice(peers)[1:])
            blocks = chosen.sample(range(BLOCKS // 2), chosen.choice([1, 4, share]))
            request, into = f"{self.number}-{self.life}-{part}-{number}", mine[: len(blocks)]
            self.memory[:, :, into] = 0
            try:
                handle = self.node.receiver.receive(request, into, len(blocks) * BLOCK, src_instance=f"i{source}")
            except HetkvError:
                continue  # the link has ended meanwhile
            to = ("127.0.0.1", self.options.ports + 3 * source + 2)
            with contextlib.suppress(OSError):
                self.asked.sendto(json.dumps([request, blocks]).encode(), to)
            self.finish(handle, into, self.patterns[source][:, :, blocks])
            self.stopping.wait(self.options.pause)

    def finish(self, handle: RecvHandle, into: list[int], expected: np.ndarray) -> None:
        end = "complete"
        try:
            handle.wait(LEASE_S + 2)
        except WaitTimeoutError:
            end = "hung"
        except HetkvError:
            end = "failed"
        bucket = int((time.time() - self.options.epoch) * BUCKETS_A_SECOND)
        same = end != "complete" or bool((self.memory[:, :, into].view(np.uint16) == expected.view(np.uint16)).all())
        with self.lock:
            self.board.add(self.number, "begun")
            self.board.add(self.number, end if same else "wrong")
            if end == "complete" and 0 <= bucket < self.board.ended.shape[1]:
                self.board.ended[self.number, bucket] += 1


class Fleet:
    """The parent's side."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.board = Board.open(options.folder, options.instances, options.most_seconds, "w+")
        self.killed: dict[int, float] = {}
        """When, by instance that has not started again yet."""
        self.starts: list[float] = []
        """Seconds from a kill until the new process had its modules."""
        self.processes = [self.start(number) for number in range(options.instances)]

    def start(self, number: int) -> subprocess.Popen[bytes]:
        options = self.options
        command = [sys.executable, "-m", "tests.transport.fleet", "--member", str(number)]
        for name in ("instances", "ports", "folder", "epoch", "most_seconds", "peer_timeout", "pause"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        return subprocess.Popen(command, stdin=subprocess.PIPE)

    def linked(self, seconds: float) -> bool:
        """Wait until each instance is linked to all others."""
        deadline = time.monotonic() + seconds
        while (self.board.of("links") < self.options.instances - 1).any():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def kill(self, number: int) -> None:
        """Kill an instance and start it again."""
        self.note(number)
        self.processes[number].send_signal(signal.SIGKILL)
        self.processes[number].wait()
        for name in ("links", "runs_ms"):
            self.board.set(number, name, 0)
        self.killed[number] = self.now()
        self.processes[number] = self.start(number)

    def note(self, number: int) -> None:
        """Keep what the instance's last start took, if it has ended."""
        runs = int(self.board.of("runs_ms")[number]) / 1000
        if number in self.killed and runs:
            self.starts.append(runs - self.killed.pop(number))

    def now(self) -> float:
        return time.time() - self.options.epoch

    def rate(self, begin: float, end: float) -> float:
        """Completed requests a second of all instances."""
        first, last = int(begin * BUCKETS_A_SECOND), int(end * BUCKETS_A_SECOND)
        return float(self.board.ended[:, first:last].sum()) * BUCKETS_A_SECOND / max(1, last - first)

    def stop(self) -> list[int]:
        """Let all end; their exit codes."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        codes = []
        for process in self.processes:
            try:
                codes.append(process.wait(LEASE_S * 3))
            except subprocess.TimeoutExpired:
                process.kill()
                codes.append(process.wait() or 1)
        return codes


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Steady turn, kills, recovery. Rates are requests a second of all instances together."""
    fleet, chosen = Fleet(options), random.Random(options.seed)
    try:
        if not fleet.linked(120):
            raise SystemExit(f"not all are linked after 120 s: {fleet.board.of('links')}")
        all_linked = fleet.now()
        time.sleep(2)
        begin = fleet.now()
        time.sleep(options.steady)
        first_kill = fleet.now()
        before = fleet.rate(begin, first_kill)
        order: list[int] = []
        for kill in range(options.kills):
            if not order:
                order = chosen.sample(range(options.instances), options.instances)
            time.sleep(max(0.0, first_kill + kill - fleet.now()))
            fleet.kill(order.pop())
        last_kill = fleet.now()
        during = fleet.rate(first_kill, last_kill)
        relinked = fleet.linked(options.recovery)
        linked = fleet.now() - last_kill
        time.sleep(max(0.0, last_kill + options.recovery - fleet.now()))
        end = fleet.now()
        after = [fleet.rate(last_kill + at / 2, last_kill + at / 2 + 1) for at in range(int(2 * (end - last_kill)) - 2)]
        back = next((at / 2 + 1 for at, rate in enumerate(after) if rate >= options.back * before), None)
        relinked = relinked or fleet.linked(30)
        for number in list(fleet.killed):
            fleet.note(number)
    finally:
        codes = fleet.stop()
    counts = {name: int(fleet.board.of(name).sum()) for name in ("begun", "complete", "failed", "wrong", "hung")}
    return {
        "instances": options.instances,
        "kills": options.kills,
        "pause_s": options.pause,
        "seconds_until_linked": round(all_linked, 1),
        "requests_a_second": {
            "before": round(before, 1),
            "during": round(during, 1),
            "after_by_half_second": [round(rate, 1) for rate in after],
            "last_half": round(fleet.rate((last_kill + end) / 2, end), 1),
        },
        "back_share": options.back,
        "seconds_until_back": back,
        "all_linked_again": relinked,
        "seconds_until_all_linked": round(linked, 1),
        "interpreter_starts_s": [round(float(np.quantile(fleet.starts, at)), 2) for at in (0.5, 1)]
        if fleet.starts
        else [],
        **counts,
        "open_at_rest": [int(value) - 1 for value in fleet.board.of("rest")],
        "exit_codes": codes,
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=24)
    parser.add_argument("--kills", type=int, default=60, help="one a second")
    parser.add_argument("--steady", type=float, default=10.0, help="seconds before the first kill")
    parser.add_argument("--recovery", type=float, default=15.0, help="seconds after the last kill")
    parser.add_argument("--back", type=float, default=0.9, help="share of the rate before that counts as recovered")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between a caller's requests")
    parser.add_argument("--peer-timeout", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ports", type=int, default=21000, help="the first of three for each instance")
    parser.add_argument("--member", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--epoch", type=float, default=time.time(), help=argparse.SUPPRESS)
    parser.add_argument("--most-seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.most_seconds = options.most_seconds or 300 + options.steady + options.kills + options.recovery
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        return measure(options)


def main() -> None:
    options = parse()
    if options.member is not None:
        Member(options.member, options).run()
        return
    load = os.getloadavg()[0]
    print(json.dumps({**environment(), "load": load, **run(options)}, indent=1))


if __name__ == "__main__":
    main()
