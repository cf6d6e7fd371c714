"""What `TransferConfig(verify="pool")` costs: `python bench/verify_pool.py [--json FILE] [--device cuda:0,cuda:1]`.

One sender and two receivers of one process, one that verifies the pool and one that does not, whose requests take
turns, so that both see the same machine. Printed is the ratio of the median times; NHD pools of 16 to HND pools of 64
tokens a block.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from hetkv.bench.environment import environment
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec
from hetkv.transport.config import TransferConfig
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender

SECRET = b"of these benchmarks only"
CASES = (("bf16", "bf16", 32, 8, 1024), ("bf16", "bf16", 80, 1, 1024), ("bf16", "bf16", 1, 8, 16),
         ("bf16", "fp32", 32, 8, 1024), ("fp32", "bf16", 32, 8, 1024))  # fmt: skip
"""Dtypes of both pools, layers, KV heads, tokens of a request."""


def measure(case: tuple[str, str, int, int, int], devices: tuple[str, str], reps: int) -> dict[str, Any]:
    """Median seconds of a request with and without, and their ratio."""
    here, there, layers, heads, tokens = case
    spec = KVSpec.uniform(layers, heads, 128)
    source = KVPool.allocate(spec, -(-tokens // 16), layout="nhd", block_size=16, dtype=here, device=devices[0])
    blocks = -(-tokens // 64)
    took: dict[str, list[float]] = {"payload": [], "pool": []}
    receivers: dict[str, Receiver] = {}
    with Sender(source, instance="p", secret=SECRET) as sender:
        address = sender.listen()
        try:
            for verify in ("payload", "pool"):
                pool = KVPool.allocate(spec, blocks, layout="hnd", block_size=64, dtype=there, device=devices[1])
                config = TransferConfig(verify=verify)  # type: ignore[arg-type]
                receivers[verify] = Receiver(pool, instance=verify, secret=SECRET, config=config)
                receivers[verify].connect(address)
            for turn in range(reps + 2):
                for verify, receiver in receivers.items():
                    handle = sender.send(f"{verify}-{turn}", list(range(-(-tokens // 16))), tokens)
                    asked = receiver.receive(f"{verify}-{turn}", list(range(blocks)), tokens)
                    begun = time.perf_counter()
                    handle.send_layers()
                    asked.wait(60)
                    if turn >= 2:
                        took[verify].append(time.perf_counter() - begun)
                    handle.wait(60)
        finally:
            for receiver in receivers.values():
                receiver.close()
    median = {verify: statistics.median(times) for verify, times in took.items()}
    return {
        "from": here, "to": there, "layers": layers, "heads": heads, "tokens": tokens, "reps": reps,
        "payload_us": round(median["payload"] * 1e6, 1), "pool_us": round(median["pool"] * 1e6, 1),
        "ratio": round(median["pool"] / median["payload"], 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--device", default="cpu,cpu", help="of the source and of the destinations (default cpu,cpu)")
    parser.add_argument("--reps", type=int, default=30)
    options = parser.parse_args()
    one, _, two = options.device.partition(",")
    report: dict[str, Any] = {**environment(), "devices": [one, two or one], "results": []}
    for case in CASES:
        report["results"].append(found := measure(case, (one, two or one), options.reps))
        print(f"{found['from']} to {found['to']}, {found['layers']} layers x {found['heads']} heads x "
              f"{found['tokens']} tokens: {found['payload_us']} us, verify=pool {found['pool_us']} us, "
              f"{found['ratio']} x", flush=True)  # fmt: skip
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
