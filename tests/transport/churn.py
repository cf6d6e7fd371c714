"""Transfers between real processes under faults: `python -m tests.transport.churn 5000` prints what happened as JSON.

Senders are processes of their own; some are killed in the middle of their requests and started again, some send
messages with flipped bits, and some requests are begun too late for their lease. Every accepted request is compared
with what its sender had, byte for byte.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hetkv.bench.child import Child
from hetkv.errors import HetkvError
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec
from hetkv.transport.config import TransferConfig
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender
from tests.transport.peers import SECRET, settled, until

SPEC = KVSpec.uniform(2, 2, 32)
NUM_BLOCKS, BLOCK = 64, 16
KEPT = 8
"""Blocks of the receiver that no request is given."""
CONFIG = TransferConfig(slot_bytes=8192, window_bytes=8 * 8192, heartbeat_s=0.5, peer_timeout_s=5.0)
WAIT_S = 30.0
LEASE_S = 20.0
SHORT_S = 0.05


def fill(pool: KVPool, blocks: list[int], seed: int) -> None:
    """What the request of that seed has in its blocks, on both sides' account."""
    generator = torch.Generator().manual_seed(seed)
    for layer in range(len(SPEC.layers)):
        for name in "kv":
            view = pool.view(layer, name).view(torch.int16)
            shape = (len(blocks), *view.shape[1:])
            view[blocks] = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator)


def same(pool: KVPool, blocks: list[int], tokens: int, seed: int) -> bool:
    """Whether the blocks hold what `fill` put into the sender's."""
    generator = torch.Generator().manual_seed(seed)
    equal = True
    for layer in range(len(SPEC.layers)):
        for name in "kv":
            view = pool.view(layer, name).view(torch.int16)[blocks]
            made = torch.randint(-(2**15), 2**15, view.shape, dtype=torch.int16, generator=generator)
            equal = equal and torch.equal(view.flatten(0, 1)[:tokens], made.flatten(0, 1)[:tokens])
    return equal


class ChurnSender:
    """The other process: a sender that does what it is asked."""

    def __init__(self, address: str, instance: str) -> None:
        pool = KVPool.allocate(SPEC, NUM_BLOCKS)
        self.node = Sender(pool, secret=SECRET, instance=instance, config=CONFIG)
        self.node.connect(address)

    def send(self, requests: list[tuple[str, list[int], int, int]]) -> None:
        """Requests of (id, blocks, tokens, seed): all layers at once."""
        for request, blocks, tokens, seed in requests:
            fill(self.node.pool, blocks, seed)
            handle = self.node.send(request, blocks, tokens, hold_s=LEASE_S)
            for layer in range(len(SPEC.layers)):
                handle.send_layer(layer)

    def corrupt(self, seed: int) -> None:
        """A message with flipped bits on each link."""
        chosen = random.Random(seed)
        for peer in self.node.peers:
            self.node.engine.inject(peer.link, chosen.randbytes(chosen.choice([56, 72, 96, 144])))

    def connect(self, address: str) -> None:
        """Connect again, where the link was lost."""
        until(lambda: not self.node.peers, lambda: f"not lost: {self.node.peers}, {self.node.stats()}", WAIT_S)
        self.node.connect(address)

    def rest(self) -> dict[str, int]:
        """What it still holds, once it is at rest."""
        until(lambda: not self.node.stats()["open_requests"], seconds=LEASE_S + 5)  # one whose receiver never came
        settled(self.node)
        return {name: int(self.node.stats()[name]) for name in ("open_requests", "pending_tickets")}

    def close(self) -> None:
        self.node.close()


@dataclass
class Churn:
    """Rounds of requests from some senders into one receiver."""

    receiver: Receiver
    address: str
    chosen: random.Random
    senders: list[Child] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    number: int = 0

    def start(self, index: int) -> Child:
        """Start, or start again, the sender of that index."""
        child = Child(f"sender {index}", ChurnSender, (self.address, f"p{index}"))
        child.answer()
        until(lambda: any(peer.description.instance == f"p{index}" for peer in self.receiver.peers), seconds=WAIT_S)
        return child

    def round(self, index: int, fault: str) -> int:
        """Some requests of one sender, with one fault among them; how many."""
        sender, pool = self.senders[index], self.receiver.pool
        free = list(range(KEPT, NUM_BLOCKS))
        theirs = list(range(NUM_BLOCKS))
        self.chosen.shuffle(free)
        self.chosen.shuffle(theirs)
        requests: list[tuple[str, list[int], int, int]] = []
        handles: list[tuple[Any, list[int], int, int]] = []
        while len(requests) < 8:
            tokens = self.chosen.choice([1, 7, 16, 33, 64, 100, 160])
            need = -(-tokens // BLOCK)
            if need > len(free):
                break
            mine, free = free[:need], free[need:]
            blocks, theirs = theirs[:need], theirs[need:]
            self.number += 1
            requests.append((f"churn-{self.number}", blocks, tokens, self.number))
            lease = SHORT_S if fault == "lease" and len(requests) == 1 else LEASE_S
            begun = self.receiver.receive(requests[-1][0], mine, tokens, src_instance=f"p{index}", lease_s=lease)
            handles.append((begun, mine, tokens, self.number))
        if fault == "lease":
            time.sleep(4 * SHORT_S)
        sender.pipe.send(("send", requests))
        if fault == "corrupt":
            sender.pipe.send(("corrupt", self.number))
        if fault == "kill":
            time.sleep(self.chosen.random() * 0.02)
            sender.signal(signal.SIGKILL)
        self.finish(pool, handles, fault)
        if fault == "kill":
            sender.kill()
            sender.process.close()
            sender.pipe.close()
            self.senders[index] = self.start(index)
            return len(requests)
        sender.answer()
        if fault == "corrupt":
            sender.answer()
            sender.ask("connect", self.address)
            until(lambda: any(peer.description.instance == f"p{index}" for peer in self.receiver.peers), seconds=WAIT_S)
        return len(requests)

    def finish(self, pool: KVPool, handles: list[tuple[Any, list[int], int, int]], fault: str) -> None:
        for handle, blocks, tokens, seed in handles:
            begin = time.monotonic()
            try:
                handle.wait(WAIT_S)
            except HetkvError as error:
                if fault == "none":
                    raise AssertionError("a request failed for no reason") from error
                self.counts[type(error).__name__] += 1
            else:
                self.counts["accepted"] += 1
                if not same(pool, blocks, tokens, seed):
                    self.counts["wrong"] += 1
            if time.monotonic() - begin > LEASE_S + 2:
                self.counts["past the deadline"] += 1


def held() -> dict[str, int]:
    """Descriptors, threads and memory of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count() + len(os.listdir("/proc/self/task")),
        "resident_mib": pages * os.sysconf("SC_PAGE_SIZE") >> 20,
    }


def churn(
    transfers: int, *, senders: int = 2, seed: int = 1, rate: float = 0.01, seconds: float = math.inf
) -> dict[str, Any]:
    """So many transfers, or those of so many seconds; each fault befalls that share of them, by rounds of up to 8."""
    chosen = random.Random(seed)
    pool = KVPool.allocate(SPEC, NUM_BLOCKS, layout="hnd")
    kept = [pool.view(layer, name)[:KEPT].clone() for layer in range(len(SPEC.layers)) for name in "kv"]
    begin = time.monotonic()
    with Receiver(pool, secret=SECRET, instance="d0", config=CONFIG) as receiver:
        run = Churn(receiver, receiver.listen(), chosen)
        run.senders = [run.start(index) for index in range(senders)]
        # Warm: each slot has its memory.
        run.counts["transfers"] = sum(run.round(index, "none") for index in range(senders) for _ in range(4))
        before = held()
        try:
            while run.counts["transfers"] < transfers and time.monotonic() - begin < seconds:
                lot = chosen.random() / (8 * rate)
                fault = ("kill", "corrupt", "lease")[int(lot)] if lot < 3 else "none"
                run.counts[f"rounds with {fault}"] += 1
                run.counts["transfers"] += run.round(chosen.randrange(senders), fault)
            settled(receiver)
            until(lambda: receiver.stats()["quarantined_slots"] == 0)
            rest = [child.ask("rest") for child in run.senders]
            after = held()
        finally:
            for child in run.senders:
                child.close()
        untouched = all(
            torch.equal(now.view(torch.int16), then.view(torch.int16))
            for now, then in zip(
                (pool.view(layer, name)[:KEPT] for layer in range(len(SPEC.layers)) for name in "kv"), kept, strict=True
            )
        )
    return {
        "seed": seed,
        "seconds": round(time.monotonic() - begin, 1),
        "counts": dict(run.counts),
        "untouched": untouched,
        "senders_hold": rest,
        "before": before,
        "after": after,
    }


def many(transfers: int, processes: int, seconds: float) -> dict[str, Any]:
    """The transfers spread over so many receivers at once, each with a seed and senders of its own."""
    parts = [churn_part(index, transfers, processes, seconds) for index in range(processes)]
    runs = [json.loads(part.communicate()[0] or "{}") for part in parts]
    counts: Counter[str] = Counter()
    for run in runs:
        counts.update(run.get("counts", {}))
    return {
        "transfers": transfers,
        "failed": [p.args[-1] for p in parts if p.returncode],
        "counts": counts,
        "runs": runs,
    }


def churn_part(index: int, transfers: int, processes: int, seconds: float) -> subprocess.Popen[str]:
    share = transfers // processes + (index < transfers % processes)
    command = [sys.executable, "-m", "tests.transport.churn", str(share), "--seed", str(index + 1)]
    command += ["--seconds", str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("transfers", type=int, nargs="?", default=300)
    parser.add_argument("--processes", type=int, default=1, help="receivers at once, each with two senders")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no transfer after so many")
    options = parser.parse_args()
    if options.processes > 1:
        found = many(options.transfers, options.processes, options.seconds)
        print(json.dumps(found, indent=1))
        return 1 if found["failed"] else 0
    print(json.dumps(churn(options.transfers, seed=options.seed, seconds=options.seconds), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
