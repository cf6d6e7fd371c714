"""Collectives. An all-reduce is two straight lines in the message size: the engine's kernel, the vendor's library."""

from __future__ import annotations

from functools import lru_cache
from importlib import resources
from typing import NamedTuple

import yaml

from hetkv.costmodel.catalogue import Gpu

LATENCY_S = {"switch": 5e-6, "mesh": 12e-6, "host": 25e-6}
NETWORK_LATENCY_S = 30e-6
LINK_SHARE = 0.5
"""Share of the link's bandwidth that a ring all-reduce of large messages gets; the measured GPUs have 0.4 to 0.6."""


SWITCH_BYTES = 3 * 2**20
"""Where engines leave their own all-reduce kernel for the library's; bench/accuracy/fit_collectives.py cuts there."""


class ReduceTime(NamedTuple):
    """`small_s + small_s_per_byte * n` seconds for a message of `n` bytes, the large line from `SWITCH_BYTES` on."""

    small_s: float
    small_s_per_byte: float
    large_s: float
    large_s_per_byte: float

    def seconds(self, num_bytes: float) -> float:
        if num_bytes < SWITCH_BYTES:
            return self.small_s + self.small_s_per_byte * num_bytes
        return self.large_s + self.large_s_per_byte * num_bytes


def _rising(small_s: float, small_s_per_byte: float, large_s: float, large_s_per_byte: float) -> ReduceTime:
    """Lift the large line so that a larger message never takes less time than a smaller one."""
    floor = small_s + (small_s_per_byte - large_s_per_byte) * SWITCH_BYTES
    return ReduceTime(small_s, small_s_per_byte, max(large_s, floor), large_s_per_byte)


@lru_cache(maxsize=1)
def _measured() -> dict[str, dict[int, ReduceTime]]:
    entry = resources.files("hetkv.costmodel") / "data" / "collectives.yaml"
    table = yaml.safe_load(entry.read_text(encoding="utf-8"))
    return {
        gpu: {ranks: _rising(*lines) for ranks, lines in rows.items() if ranks != "source"}
        for gpu, rows in table.items()
    }


def all_reduce(gpu: Gpu, ranks: int) -> ReduceTime:
    """All-reduce of `ranks` GPUs: the measured lines where `data/collectives.yaml` has them, else the topology's bound.

    In the bound each GPU sends `2 (ranks-1)/ranks` of the message: through its switch port, over its links to the other
    members of a mesh, or over the NIC when the ranks span nodes.
    """
    if ranks <= 1:
        return ReduceTime(0.0, 0.0, 0.0, 0.0)
    known = _measured().get(gpu.name, {}).get(ranks)
    if known is not None:
        return known
    bandwidth, latency = _port(gpu, ranks)
    per_byte = 2 * (ranks - 1) / ranks / (LINK_SHARE * bandwidth)
    return ReduceTime(latency, per_byte, latency, per_byte)


def exchange(gpu: Gpu, ranks: int) -> ReduceTime:
    """All-to-all of `ranks` GPUs, each of which sends `n` bytes evenly to all: tokens to the experts, or back.

    No all-to-all was measured: a bound by the port and latency of `all_reduce`'s bound, at the `LINK_SHARE` of measured
    all-reduces. It keeps `1/ranks` of the bytes, and sends the rest once: half of what a ring all-reduce sends. A step
    has two in each layer with experts (dispatch and combine) of `experts_per_token` copies of a token, as DeepEP's
    kernels send them (github.com/deepseek-ai/DeepEP). Engines that gather all tokens on every rank and reduce, vLLM's
    default, send as much with as many ranks as experts a token, and more beyond.
    """
    if ranks <= 1:
        return ReduceTime(0.0, 0.0, 0.0, 0.0)
    bandwidth, latency = _port(gpu, ranks)
    per_byte = (ranks - 1) / ranks / (LINK_SHARE * bandwidth)
    return ReduceTime(latency, per_byte, latency, per_byte)


def _port(gpu: Gpu, ranks: int) -> tuple[float, float]:
    """Bytes per second that one of `ranks` GPUs sends to all others together, and the latency of a message."""
    if ranks > int(gpu.value("gpus_per_node")):
        return gpu.value("nic_gbit_s") / 8 * 1e9, NETWORK_LATENCY_S
    return gpu.link_bandwidth(ranks - 1), LATENCY_S[gpu.topology]
