"""Where the time of one small request goes: `python -m bench.latency [--json FILE]`.

Two processes of one host, CPU pools, one request at a time, whose ticket is there before. The sender's caller hands all
layers over and waits; the receiver's caller waits all the time. Stages are medians, from the spans of
`TransferConfig(trace=True)` of both engines, whose clock is the host's. `rest_us`: what passes between the end of one
request and the next, while the sender's caller spins in Python: after a long rest the caches hold less of what a
request needs. `floor_us`: pack and unpack, which no arrangement of threads makes shorter.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from hetkv.bench.child import Child
from hetkv.bench.environment import environment
from hetkv.bench.traffic_cases import Case
from hetkv.bench.traffic_pair import SPIN_US, make_pool
from hetkv.transport.config import TransferConfig
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender

WAIT_S = 60.0
CASES = (Case("1 layer x 8 heads, 16 tokens", 1, 8, 16), Case("32 layers x 8 heads, 1 token", 32, 8, 1))
RESTS_US = (300, 4000)
STAGES = ("call", "pack begins", "pack", "commit built", "unpack begins", "unpack", "caller knows")
Spans = dict[int, tuple[float, float, float]]
"""By request: when the first remap began and the last ended, and when the last commit was built."""


class _Side:
    def __init__(self, kind: type[Any], side: int, case: Case, secret: bytes):
        self.case = case
        self.pool, self.blocks = make_pool(case, side, "cpu")
        config = TransferConfig(spin_us=SPIN_US, trace=True)
        self.node = kind(self.pool, secret=secret, instance=f"latency-{kind.role}", config=config)

    def spans(self) -> Spans:
        of: dict[int, list[tuple[Any, ...]]] = defaultdict(list)
        for span in self.node.engine.take_trace():
            of[span[1]].append(span)
        found = {}
        for handle, spans in of.items():
            remaps = [span for span in spans if span[0] != "wire"]
            built = max((span[4] for span in spans if span[0] == "wire"), default=0)
            found[handle] = min(s[3] for s in remaps) / 1e9, max(s[4] for s in remaps) / 1e9, built / 1e9
        return found

    def close(self) -> None:
        self.node.close()


class _SenderSide(_Side):
    def __init__(self, case: Case, secret: bytes) -> None:
        super().__init__(Sender, 0, case, secret)

    def listen(self) -> str:
        return str(self.node.listen())

    def run(self, name: str, count: int, rest_us: int) -> tuple[list[tuple[float, float, int]], Spans]:
        """When each call was made and returned, and the request's handle."""
        calls = []
        for number in range(count):
            handle = self.node.send(f"{name}-{number}", self.blocks[0], self.case.tokens)
            batch = self.node.batch([handle])
            until = time.monotonic() + rest_us / 1e6
            while time.monotonic() < until:
                pass
            began = time.monotonic()
            batch.send_layers()
            calls.append((began, time.monotonic(), handle.handle))
            handle.wait(WAIT_S)
        return calls, self.spans()


class _ReceiverSide(_Side):
    def __init__(self, case: Case, secret: bytes) -> None:
        super().__init__(Receiver, 1, case, secret)

    def connect(self, address: str) -> None:
        self.node.connect(address)

    def run(self, name: str, count: int) -> tuple[list[tuple[float, int]], Spans]:
        """When each request was known to be complete, and its handle."""
        ends = []
        for number in range(count):
            handle = self.node.receive(f"{name}-{number}", self.blocks[0], self.case.tokens)
            handle.wait(WAIT_S)
            ends.append((time.monotonic(), handle.handle))
        return ends, self.spans()


def measure(case: Case, rest_us: int, count: int) -> dict[str, Any]:
    """Medians of the stages and of the whole, in microseconds."""
    secret = os.urandom(32)
    sender, receiver = Child("sender", _SenderSide, (case, secret)), Child("receiver", _ReceiverSide, (case, secret))
    try:
        sender.answer(), receiver.answer()
        receiver.ask("connect", sender.ask("listen"))
        for name, reps in (("warm", 20), ("timed", count)):
            receiver.pipe.send(("run", name, reps))
            calls, packed = sender.ask("run", name, reps, rest_us)
            ends, unpacked = receiver.answer()
    finally:
        sender.close()
        receiver.close()
    steps, whole = [], []
    for (began, called, sent), (end, received) in zip(calls, ends, strict=True):
        pack, unpack = packed[sent], unpacked[received]
        times = (0.0, called - began, *(at - began for at in (*pack, unpack[0], unpack[1], end)))
        steps.append([b - a for a, b in pairwise(times)])
        whole.append(end - began)
    columns = zip(STAGES, zip(*steps, strict=True), strict=True)
    stages = {name: round(statistics.median(column) * 1e6, 1) for name, column in columns}
    return {
        "name": case.name, "rest_us": rest_us, "reps": count, "visible_us": round(statistics.median(whole) * 1e6, 1),
        "visible_us_least": round(min(whole) * 1e6, 1), "stages_us": stages,
        "floor_us": round(stages["pack"] + stages["unpack"], 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--reps", type=int, default=300, help="requests of each row")
    options = parser.parse_args()
    report: dict[str, Any] = {**environment(), "load_average": round(os.getloadavg()[0], 1)}
    report["real_time"] = os.sched_getscheduler(0) != os.SCHED_OTHER  # under chrt, which keeps other work off the cores
    report["results"] = []
    for case in CASES:
        for rest_us in RESTS_US:
            report["results"].append(found := measure(case, rest_us, options.reps))
            stages = ", ".join(f"{name} {us}" for name, us in found["stages_us"].items())
            times = f"{found['visible_us']} us (least {found['visible_us_least']})"
            print(f"{case.name}, {rest_us} us between two: {times}: {stages}", flush=True)
            if options.json:
                options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
