"""Runs the named pairs (named_pairs.py) through the real engine, and writes docs/compatibility.md from them.

python tests/transport/named_pairs_run.py            # rewrites the document
python tests/transport/named_pairs_run.py --check    # exits with 1 where the document is not what the transfers say
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple
from zlib import crc32

import torch

from hetkv.control.compat import Conversion, segment_conversion
from hetkv.errors import IncompatibleError
from hetkv.kv.pool import KVPool
from hetkv.kv.reshard import overlap, routes
from hetkv.kv.scale import ScaleLayout
from hetkv.kv.spec import KVSpec, Shard
from hetkv.reference.remap import bits
from hetkv.transport.config import TransferConfig
from hetkv.transport.link_plan import wanted
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender, SendHandle
from tests.transport.named_pairs import MATRICES, TABLES, Pair, Side
from tests.transport.peers import SECRET, WAIT_S, Blocks, deliver, duplicate, randomise, same_bytes, until

DOCUMENT = Path(__file__).parents[2] / "docs" / "compatibility.md"
PROSE = """\
Made by `python -m tests.transport.named_pairs_run` from transfers, and checked by
`tests/transport/test_named_pairs.py`: each pair moves random KV between
nodes of one process through the real engine, block ids shuffled on both sides.
*identical*: every byte of every destination pool, also outside the request's blocks, is what the oracle
(`hetkv/reference/remap.py`) says. A side is its parallelism, layout, block size (one per cache group where they differ)
and dtype. Bytes are those of the payloads, over all routes."""
SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class Outcome(NamedTuple):
    """What a pair's transfer showed."""

    result: str
    """`identical` to the oracle, or `rejected`; `wrong` fails the test."""
    how: str
    """The conversions of its links, or the text of the rejection."""
    routes: int
    payload_bytes: int


class Instance(NamedTuple):
    """The pools of one side: one a rank, and one of the whole model that its heads are cut from."""

    whole: KVPool
    ranks: list[KVPool]

    @classmethod
    def make(cls, spec: KVSpec, side: Side, tokens: int, seed: int) -> Instance:
        """Random bytes, equal on replicas; room for two requests of `tokens` and three blocks more."""
        sizes = [side.block] * spec.num_groups if isinstance(side.block, int) else list(side.block)
        states = spec.state_groups
        sizes = [1 if group in states else size for group, size in enumerate(sizes)]
        blocks = [2 * (1 if group in states else -(-tokens // size)) + 3 for group, size in enumerate(sizes)]

        def pool(shard: Shard) -> KVPool:
            scale = side.scale
            if scale is not None and len(scale) > 1:
                scale = scale[slice(*shard.heads[0])]
            return KVPool.allocate(
                spec, blocks, layout=side.layout, block_size=sizes, dtype=side.dtype, shard=shard,
                scale=None if scale is None else ScaleLayout(scale),
            )  # fmt: skip

        grid = itertools.product(range(side.pp), range(side.tp))
        shards = [Shard.of(spec, side.tp, tp, side.pp, pp, side.stages) for pp, tp in grid]
        made = cls(randomise(pool(Shard.whole(spec)), seed), [pool(shard) for shard in shards])
        for rank in made.ranks:
            for layer, memory in rank.layers.items():
                for name in memory.layout.segments:
                    heads = made.whole.view(layer, name)[:, :, slice(*rank.shard.heads[layer])]
                    bits_of(rank.view(layer, name)).copy_(bits_of(heads))
        return made

    def nodes(self, kind: type, name: str, side: Side, stack: ExitStack) -> list:
        shards = [pool.shard for pool in self.ranks]
        config = TransferConfig(slot_bytes=side.slot_bytes, window_bytes=8 * side.slot_bytes)
        return [
            stack.enter_context(
                kind(pool, secret=SECRET, instance=name, rank=rank, instance_shards=shards, config=config)
            )
            for rank, pool in enumerate(self.ranks)
        ]


class Flow:
    """One direction of a pair: senders on one instance, receivers on the other, one request."""

    def __init__(self, pair: Pair, name: str, ours: Instance, theirs: Instance, stack: ExitStack) -> None:
        self.pair, self.name, self.ours, self.theirs = pair, name, ours, theirs
        self.senders: list[Sender] = ours.nodes(Sender, "source", pair.source, stack)
        self.receivers: list[Receiver] = theirs.nodes(Receiver, "destination", pair.destination, stack)

    def connect(self) -> None:
        addresses = [sender.listen() for sender in self.senders]
        for receiver in self.receivers:
            receiver.connect(addresses)
        for sender in self.senders:
            links = sum(
                any(peer.rank == sender.rank and peer.instance == sender.instance for peer in receiver.peers)
                for receiver in self.receivers
            )
            until(lambda sender=sender, links=links: len(sender.peers) == links)

    def start(self, from_blocks: Blocks, to_blocks: Blocks) -> None:
        """Tickets first; then every rank's layers, chunk by chunk."""
        pair, spec = self.pair, self.ours.whole.spec
        states = spec.state_groups
        counts = [1 if group in states else pair.tokens for group in range(spec.num_groups)]
        cached = [0 if group in states else pair.cached for group in range(spec.num_groups)]
        self.expected = [duplicate(pool) for pool in self.theirs.ranks]
        for pool in self.expected:
            want = wanted(self.receivers[0].description, counts, cached)
            deliver([(self.ours.whole, from_blocks)], pool, to_blocks, want)
        self.requests = [
            r.receive(self.name, to_blocks, pair.tokens, num_cached_tokens=pair.cached) for r in self.receivers
        ]
        for sender in self.senders:
            if sender.peers:
                tx = sender.send(self.name, from_blocks, pair.tokens)
                self.requests.append(tx)
                send_chunks(tx, sender.pool, pair)

    def finish(self) -> bool:
        """Wait for all ranks; whether every byte of the destination is as the oracle says."""
        for request in self.requests:
            request.wait(WAIT_S)
        return all(same_bytes(pool, wanted) for pool, wanted in zip(self.theirs.ranks, self.expected, strict=True))

    def payload_bytes(self) -> int:
        return sum(sender.stats()["payload_bytes"] for sender in self.senders)


def send_chunks(tx: SendHandle, pool: KVPool, pair: Pair) -> None:
    for start, stop in itertools.pairwise((0, *pair.chunks, pair.tokens)):
        for layer in pool.layers:
            if pool.spec.layers[layer].kind != "state":
                tx.send_layer(layer, (start, stop))
            elif stop == pair.tokens:
                tx.send_layer(layer)


@functools.cache
def run(pair: Pair) -> Outcome:
    """Transfer a pair's request and compare every byte with the oracle, or have it rejected."""
    seed = crc32(pair.name.encode())
    ours = Instance.make(pair.spec, pair.source, pair.tokens, seed)
    theirs = Instance.make(pair.theirs or pair.spec, pair.destination, pair.tokens, seed + 1)
    with ExitStack() as stack:
        there = Flow(pair, "there", ours, theirs, stack)
        if pair.rejected:
            return rejection(there)
        flows = [there]
        if pair.back:
            turned = pair._replace(source=pair.destination, destination=pair.source)
            flows.append(Flow(turned, "back", theirs, ours, stack))
        for flow in flows:
            flow.connect()
        generator = torch.Generator().manual_seed(seed)
        states = pair.spec.state_groups
        counts = [1 if group in states else pair.tokens for group in range(pair.spec.num_groups)]
        tables = [two_tables(side.whole, counts, generator) for side in (ours, theirs)]
        for number, flow in enumerate(flows):
            ends = [table[number] for table in tables]
            flow.start(*(ends if number == 0 else ends[::-1]))
        right = [flow.finish() for flow in flows]
        shards = [pool.shard for pool in ours.ranks], [pool.shard for pool in theirs.ranks]
        return Outcome(
            "identical" if all(right) else "wrong",
            "; ".join(conversions(pair.spec, ours, theirs)),
            len(routes(pair.spec, *shards)),
            there.payload_bytes(),
        )


def rejection(flow: Flow) -> Outcome:
    """Connect sides that do not fit; nothing may be written."""
    before = duplicate(flow.theirs.ranks[0])
    try:
        flow.receivers[0].connect(flow.senders[0].listen())
    except IncompatibleError as error:
        intact = same_bytes(flow.theirs.ranks[0], before) and not flow.receivers[0].peers
        result = "rejected" if intact and error.field == flow.pair.rejected else "wrong"
        return Outcome(result, str(error), 0, 0)
    return Outcome("wrong", "not rejected", 0, 0)


def conversions(spec: KVSpec, ours: Instance, theirs: Instance) -> Iterator[str]:
    """Each way in which a segment travels, once, in layer order."""
    seen = set()
    for source, destination in itertools.product(ours.ranks, theirs.ranks):
        for layer, heads in overlap(spec, source.shard, destination.shard):
            owned = source.shard.heads[layer], destination.shard.heads[layer]
            for name, there in destination.layers[layer].layout.segments.items():
                here = source.layers[layer].layout.segments[name]
                text = tell(here.dtype.value, segment_conversion(here, there, heads, *owned), there.dtype.value)
                if text not in seen:
                    seen.add(text)
                    yield text


def tell(ours: str, step: Conversion, theirs: str) -> str:
    """In words: which side converts what."""
    wire = step.wire.value
    if ours == wire == theirs and step.pack is None and step.unpack is None:
        return f"{short(wire)} moved as bits"
    done = [
        f"{who} {short(a)} to {short(b)}" + ("" if factors is None else ", scaled")
        for who, a, b, factors in (("pack", ours, wire, step.pack), ("unpack", wire, theirs, step.unpack))
        if a != b or factors is not None
    ]
    return ", ".join(done)


def two_tables(pool: KVPool, counts: list[int], generator: torch.Generator) -> tuple[Blocks, Blocks]:
    """Shuffled blocks of two requests, none in both."""
    need = [-(-count // pool.cache_groups[group][0]) for group, count in enumerate(counts)]
    ids = [torch.randperm(pool.cache_groups[group][1], generator=generator).tolist() for group in range(len(counts))]
    first = [blocks[:count] for blocks, count in zip(ids, need, strict=True)]
    return first, [blocks[count : 2 * count] for blocks, count in zip(ids, need, strict=True)]


def bits_of(view: torch.Tensor) -> torch.Tensor:
    return view if view.dtype == torch.uint8 else bits(view)


def short(dtype: str) -> str:
    return SHORT.get(dtype, dtype.removeprefix("float8_"))


def side_text(side: Side) -> str:
    block = side.block if isinstance(side.block, int) else "/".join(map(str, side.block))
    ranks = [f"{name} {count}" for name, count in (("TP", side.tp), ("PP", side.pp)) if count > 1]
    return ", ".join([*([" x ".join(ranks)] if ranks else []), f"{side.layout} {block}", short(side.dtype)])


def table(pairs: list[Pair]) -> list[str]:
    """Rows of pairs that work, or of pairs that are rejected."""
    if pairs[0].rejected:
        return ["| pair | rejected with |", "|---|---|", *(f"| {pair.name} | `{run(pair).how}` |" for pair in pairs)]
    lines = ["| pair | from | to | result | converted how | routes | bytes sent |", "|---|---|---|---|---|---|---|"]
    for pair in pairs:
        got = run(pair)
        ends = f"{side_text(pair.source)} | {side_text(pair.destination)}"
        lines.append(f"| {pair.name} | {ends} | {got.result} | {got.how} | {got.routes} | {got.payload_bytes:,} |")
    return lines


def matrix(names: tuple[str, ...], pairs: list[Pair]) -> list[str]:
    """From each row's name to each column's."""
    lines = ["| from \\ to | " + " | ".join(map(short, names)) + " |", "|---|" + "---|" * len(names)]
    cells = [run(pair) for pair in pairs]
    for row, name in enumerate(names):
        found = cells[row * len(names) : (row + 1) * len(names)]
        words = [word(cell.how) if cell.result == "identical" else cell.result for cell in found]
        lines.append(f"| {short(name)} | " + " | ".join(words) + " |")
    return lines


def word(how: str) -> str:
    """Who converts."""
    packed, unpacked = how.startswith("pack"), "unpack" in how
    return "both" if packed and unpacked else "sender" if packed else "receiver" if unpacked else "bits"


def document() -> str:
    """docs/compatibility.md."""
    lines = ["# Compatibility", "", *wrap(PROSE, 120)]
    for title, (pairs, prose) in TABLES.items():
        lines += ["", f"## {title}", "", *wrap(prose, 120), "", *table(pairs)]
        for name, text, axis, cells in MATRICES if title == "Layer kinds" else ():
            lines += ["", f"## {name}", "", *wrap(text, 120), "", *matrix(axis, cells)]
    return "\n".join(lines) + "\n"


def main() -> int:
    torch.set_num_threads(1)
    made = document()
    if "--check" in sys.argv:
        return int(made != DOCUMENT.read_text(encoding="utf-8"))
    DOCUMENT.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
