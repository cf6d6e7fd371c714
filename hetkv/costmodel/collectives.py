"""All-reduce time on one node, as two straight lines in the message size: latency bound, then bandwidth bound."""

from __future__ import annotations

from typing import NamedTuple

from hetkv.costmodel.catalogue import Gpu

SWITCH_LATENCY_S = 5e-6
MESH_LATENCY_S = 12e-6
HOST_LATENCY_S = 25e-6
NETWORK_LATENCY_S = 30e-6


class ReduceTime(NamedTuple):
    """`max(small_s + small_s_per_byte * n, large_s + large_s_per_byte * n)` seconds for a message of `n` bytes."""

    small_s: float
    small_s_per_byte: float
    large_s: float
    large_s_per_byte: float

    def seconds(self, num_bytes: float) -> float:
        return max(self.small_s + self.small_s_per_byte * num_bytes, self.large_s + self.large_s_per_byte * num_bytes)


def all_reduce(gpu: Gpu, ranks: int) -> ReduceTime:
    """All-reduce of `ranks` GPUs: each sends and receives `2 (ranks-1)/ranks` of the message over its own link.

    Inside a node the link is the switch port, or the links to the other members of a mesh; across nodes the NIC.
    """
    if ranks <= 1:
        return ReduceTime(0.0, 0.0, 0.0, 0.0)
    node = int(gpu.value("gpus_per_node"))
    if ranks > node:
        bandwidth, latency = gpu.value("nic_gbit_s") / 8 * 1e9, NETWORK_LATENCY_S
    else:
        bandwidth = gpu.link_bandwidth(ranks - 1)
        latency = {"switch": SWITCH_LATENCY_S, "mesh": MESH_LATENCY_S, "host": HOST_LATENCY_S}[gpu.topology]
    per_byte = 2 * (ranks - 1) / ranks / (0.75 * bandwidth)
    return ReduceTime(latency, per_byte * 0.5, latency, per_byte)
