"""Which sizes of an instance are tried on a GPU type: TP, PP and DP, and why a size that was asked for is not."""

from __future__ import annotations

from itertools import product

from hetkv.costmodel import ModelShape, Placement
from hetkv.planner.problem import GpuOffer, ModelSpec

WIDE = (2, 4)
"""Nodes of an instance whose experts are spread over several: wide expert parallelism."""


def sizes(model: ModelSpec, offer: GpuOffer, shape: ModelShape) -> list[Placement]:
    """The sizes to try, in order."""
    return [place for place, why in considered(model, offer, shape) if not why]


def considered(model: ModelSpec, offer: GpuOffer, shape: ModelShape) -> list[tuple[Placement, str]]:
    """Every size that the model's lists (or their defaults) name, with what speaks against it, if anything.

    TP divides the heads and stays in a node, and so does `tp * dp` by default, or else the experts are spread over
    `WIDE` whole nodes of replicas of one GPU; an instance is part of a node or whole nodes.
    """
    node = offer.gpus_per_node or 1
    powers = [2**i for i in range(node.bit_length()) if 2**i <= node]
    found = []
    for tp, pp, dp in product(
        model.tp or powers,
        model.pp or (1, 2, 4),
        model.dp or ([*powers, *(n * node for n in WIDE if n * node > powers[-1])] if shape.experts else [1]),
    ):
        wide = tp == 1 and node > 1 and dp in [n * node for n in WIDE]
        if model.dp is None and dp > 1 and (pp > 1 or (tp * dp > node and not wide)):
            continue
        place = Placement(tp, pp, dp)
        found.append((place, _against(place, node, offer, shape)))
    return found


def _against(place: Placement, node: int, offer: GpuOffer, shape: ModelShape) -> str:
    if place.tp > node:
        return f"tp {place.tp} does not stay in a node of {node}"
    if shape.heads % place.tp:
        return f"tp {place.tp} does not divide the {shape.heads} heads of {shape.name}"
    if place.pp > shape.layers:
        return f"pp {place.pp} exceeds the {shape.layers} layers of {shape.name}"
    if place.ep > 1 and shape.experts % place.ep:
        return f"ep {place.ep} (tp * dp) does not divide the {shape.experts} experts of {shape.name}"
    if node % place.gpus and place.gpus % node:
        return f"{place.gpus} GPUs are neither part of a node of {node} nor whole nodes"
    if offer.cap is not None and place.gpus > offer.cap:
        return f"{place.gpus} GPUs are more than the cap of {offer.cap}"
    return ""
