"""What checksum and MACs cost of a transfer through shared memory on CPUs: `python -m bench.price` prints it as JSON.

One layer of 16 MiB is packed into the wire's layout and unpacked from it, with the checksum and without it, in turn, so
that all see the same state of the machine. MACs: each frame's message and each header on a stream is signed by one side
and checked by the other; a SipHash of 256 bytes stands for each, called from Python, which makes it dearer than it is.
`share` is the part of the time that would be saved: of both sides together, and of the slower one, as they overlap; of
medians, and of the least times, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any

from hetkv.bench.environment import environment
from hetkv.bench.remap import BUFFERS, NARROW_BYTES
from hetkv.bench.remap_cases import WIRE, Case, Place, extent, make_jobs, make_memory
from hetkv.core import core

SLOT_BYTES = 1 << 20
MACS_A_FRAME = 4


def prepared(source: Place, destination: Place, checksum: bool) -> list[Any]:
    """Jobs over several buffers, so that none is still in the cache; with the memory that they point into."""
    case = Case("move", source, destination, checksum=checksum)
    size = extent(case, NARROW_BYTES)
    made = []
    for i in range(BUFFERS):
        sides = [make_memory(place, size.segments, size.tokens, case.head_dim, i) for place in (source, destination)]
        made.append((make_jobs(case, *sides, size.tokens), sides))
    return made


def measure(pool: Place, repeats: int, threads: int) -> dict[str, Any]:
    """Pack out of `pool`, unpack into it."""
    ways = {
        (name, checksum): prepared(*places, checksum)
        for name, places in (("pack", (pool, WIRE)), ("unpack", (WIRE, pool)))
        for checksum in (True, False)
    }
    times: dict[tuple[str, bool], list[float]] = {way: [] for way in ways}
    for i in range(repeats + BUFFERS):
        order = list(ways) if i % 2 else list(reversed(ways))
        for way in order:
            begin = time.perf_counter()
            core.remap(ways[way][i % BUFFERS][0], 1, threads)
            if i >= BUFFERS:
                times[way].append(time.perf_counter() - begin)
    calls, key, message = 10_000, bytes(16), bytes(256)
    begin = time.perf_counter()
    for _ in range(calls):
        core.siphash24(key, message)
    macs = (time.perf_counter() - begin) / calls * MACS_A_FRAME * (NARROW_BYTES // SLOT_BYTES)
    row: dict[str, Any] = {"pool": str(pool), "macs_us": round(macs * 1e6, 1)}
    for name, pick in (("median", statistics.median), ("least", min)):
        found = {way: pick(values) for way, values in times.items()}
        both = found["pack", True] + found["unpack", True] + macs
        slower = max(("pack", "unpack"), key=lambda side: found[side, True])
        row[name] = {
            "us": {f"{side}{'' if kept else ' without'}": round(s * 1e6, 1) for (side, kept), s in found.items()},
            "share": round(1 - (found["pack", False] + found["unpack", False]) / both, 4),
            "share_of_slower": round(1 - found[slower, False] / (found[slower, True] + macs / 2), 4),
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    rows = [measure(pool, options.repeats, options.threads) for pool in (Place("nhd"), Place("hnd", block_size=64))]
    print(json.dumps({**environment(), "load": load, "layer_bytes": NARROW_BYTES, "results": rows}, indent=1))


if __name__ == "__main__":
    main()
