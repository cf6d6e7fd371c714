"""What `TransferConfig(isolate_peers=True)` costs: `python -m bench.isolate_peers [--json FILE]`.

Senders of another process, through shared memory, and two receivers of this one, one that isolates its peers and one
that does not, whose requests take turns, so that both see the same machine. Everything is computed before it is asked
for: the time is from `receive` to the end of `wait`. `in turn`: one request at a time, each from the next sender, so
that slots change hands where the window has none of that sender's; `at once`: one of each sender together. Printed is
the ratio of the median times, and that of the least, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from hetkv.bench.environment import environment
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec
from hetkv.transport.config import TransferConfig
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender

SECRET = b"of these benchmarks only"
MIB = 1 << 20
WAIT_S = 60.0


class Case(NamedTuple):
    """`slots` of 1 MiB are the receiver's window."""

    peers: int
    slots: int
    layers: int
    tokens: int
    at_once: bool


CASES = (
    Case(1, 4, 1, 16, False), Case(4, 32, 1, 16, False), Case(4, 4, 1, 16, False),
    Case(1, 4, 32, 1024, False), Case(4, 32, 32, 1024, False), Case(4, 4, 32, 1024, False),
    Case(4, 32, 32, 1024, True), Case(4, 4, 32, 1024, True),
)  # fmt: skip


def pool(case: Case) -> KVPool:
    return KVPool.allocate(KVSpec.uniform(case.layers, 8, 128), -(-case.tokens // 16), block_size=16, dtype="bf16")


def name(isolated: bool, turn: int, peer: int) -> str:
    return f"{isolated}-{turn}-{peer}"


def send(case: Case, pipe: Connection) -> None:
    """The senders: link with the addresses that come, then send each turn's requests before it is asked for."""
    blocks = list(range(-(-case.tokens // 16)))
    senders = [Sender(pool(case), instance=f"p{peer}", secret=SECRET) for peer in range(case.peers)]
    for address in pipe.recv():
        for sender in senders:
            sender.connect(address)
    pipe.send(None)
    while (turn := pipe.recv()) is not None:
        handles = []
        for isolated in (False, True):
            for peer, sender in enumerate(senders):
                handles.append(sender.send(name(isolated, turn, peer), blocks, case.tokens))
                handles[-1].send_layers()
        pipe.send(None)
        for handle in handles:
            handle.wait(WAIT_S)
    for sender in senders:
        sender.close()


def ask(receiver: Receiver, isolated: bool, turn: int, case: Case) -> list[float]:
    """Seconds of each request of a turn, or of all of them together."""
    blocks, took, asked = list(range(-(-case.tokens // 16))), [], []
    pools = len(blocks)
    begun = time.perf_counter()
    for peer in range(case.peers):
        if not case.at_once:
            begun = time.perf_counter()
        mine = [peer * pools + block for block in blocks] if case.at_once else blocks
        handle = receiver.receive(name(isolated, turn, peer), mine, case.tokens, src_instance=f"p{peer}")
        asked.append(handle)
        if not case.at_once:
            handle.wait(WAIT_S)
            took.append(time.perf_counter() - begun)
    for handle in asked:
        handle.wait(WAIT_S)
    return took or [time.perf_counter() - begun]


def measure(case: Case, reps: int) -> dict[str, Any]:
    """Median and least seconds with and without, and their ratios."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=send, args=(case, there))
    child.start()
    there.close()  # so that the end of the child is the end of the pipe
    times: dict[bool, list[float]] = {False: [], True: []}
    receivers: dict[bool, Receiver] = {}
    try:
        for isolated in times:
            config = TransferConfig(slot_bytes=MIB, window_bytes=case.slots * MIB, isolate_peers=isolated)
            spec, blocks = KVSpec.uniform(case.layers, 8, 128), case.peers * -(-case.tokens // 16)
            memory = KVPool.allocate(spec, blocks, block_size=16, dtype="bf16")
            receivers[isolated] = Receiver(memory, instance=f"d{isolated:d}", secret=SECRET, config=config)
        here.send([receiver.listen() for receiver in receivers.values()])
        here.recv()
        while any(len(receiver.peers) < case.peers for receiver in receivers.values()):
            time.sleep(0.01)
        for turn in range(reps + 2):
            here.send(turn)
            here.recv()
            for isolated in (False, True) if turn % 2 else (True, False):
                took = ask(receivers[isolated], isolated, turn, case)
                times[isolated] += took if turn >= 2 else []
        here.send(None)
        child.join(WAIT_S)
    finally:
        child.kill()
        for receiver in receivers.values():
            receiver.close()
    plain, isolated_s = (statistics.median(times[isolated]) for isolated in (False, True))
    least, least_isolated = min(times[False]), min(times[True])
    size = case.layers * 2 * 8 * 128 * 2 * case.tokens * (case.peers if case.at_once else 1)
    return {
        **case._asdict(), "reps": reps, "bytes": size, "plain_us": round(plain * 1e6, 1),
        "isolated_us": round(isolated_s * 1e6, 1), "ratio": round(isolated_s / plain, 3),
        "least_us": round(least * 1e6, 1), "least_isolated_us": round(least_isolated * 1e6, 1),
        "least_ratio": round(least_isolated / least, 3),
        "plain_gb_s": round(size / plain / 1e9, 3), "isolated_gb_s": round(size / isolated_s / 1e9, 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--reps", type=int, default=30, help="turns of large requests; small ones: 20 times that")
    options = parser.parse_args()
    report: dict[str, Any] = {**environment(), "results": []}
    for case in CASES:
        report["results"].append(found := measure(case, options.reps * (20 if case.layers == 1 else 1)))
        print(f"{case.peers} peers {'at once' if case.at_once else 'in turn'}, {case.slots} slots, {case.layers} "
              f"layers x {case.tokens} tokens: {found['plain_us']} us, isolated {found['isolated_us']} us, "
              f"{found['ratio']} x (least {found['least_ratio']} x)", flush=True)  # fmt: skip
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
