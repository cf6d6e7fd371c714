"""Random deployments and traffic for the simulator's tests."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hypothesis import strategies as st

from hetkv.costmodel import RequestBytes
from hetkv.simulator.affine import AffineStepModel
from hetkv.simulator.cluster import Cluster
from hetkv.simulator.events import Events
from hetkv.simulator.failure import Failures, Outage
from hetkv.simulator.kv_links import Links
from hetkv.simulator.pool import Pool
from hetkv.simulator.records import Records
from hetkv.simulator.request import Request
from hetkv.simulator.router import DISCIPLINES

KV_BYTES = 1000.0


class Steps(AffineStepModel):
    """Step times of five constants, with layers of any kind."""

    def __init__(self, kv):
        super().__init__((0.008, 1e-4, 1e-6, 2e-5, 1e-3), 0, kv.token)
        self.layers = kv

    @property
    def kv(self):
        return self.layers


PLAIN = RequestBytes(KV_BYTES)
KINDS = [
    PLAIN,
    RequestBytes(250.0, 1, 3, 9),
    RequestBytes(500.0, 0, 2, 33),
    RequestBytes(100.0, 4, 6, 50, state=2500.0),
]


class Watch(Events):
    """A clock that checks that it never goes back."""

    def __init__(self):
        super().__init__()
        self.handled = 0

    def at(self, time, handler, argument=None):
        def check(value):
            assert self.now >= self.last
            self.last = self.now
            self.handled += 1
            handler(value)

        super().at(time, check, argument)

    last = 0.0


@dataclass
class Case:
    """One deployment and its traffic: rows of (gap, prompt, output, hashes)."""

    rows: list
    disaggregated: bool
    counts: tuple[int, int] = (2, 2)
    kv_blocks: int = 200
    block_size: int = 4
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 64
    chunked_prefill: bool = True
    prefix_caching: bool = False
    first_token_at: str = "prefill"
    prefill_routing: str = "join_shortest_queue"
    decode_routing: str = "join_shortest_queue"
    overlap: bool = True
    restart: bool = True
    kv: RequestBytes = PLAIN
    port: float = 1e6
    fabric: float = float("inf")
    latency: float = 0.0
    outages: list = field(default_factory=list)

    def requests(self):
        now = 0.0
        for i, (gap, prompt, output, hashes) in enumerate(self.rows):
            now += gap
            yield Request(i, now, prompt, output, hashes)

    def run(self, skip_ahead=True):
        """(cluster, columns, clock) after the last event."""
        events, records = Watch(), Records()
        shared = {
            "gpu": "g",
            "gpus": 1,
            "model": Steps(self.kv),
            "layers": 4,
            "kv_blocks": self.kv_blocks,
            "block_size": self.block_size,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "chunked_prefill": self.chunked_prefill,
            "prefix_caching": self.prefix_caching,
            "skip_ahead": skip_ahead,
        }
        if self.disaggregated:
            pools = [
                Pool("p", "prefill", count=self.counts[0], first_token_at=self.first_token_at, **shared),
                Pool("d", "decode", count=self.counts[1], first_token_at=self.first_token_at, **shared),
            ]
            links = Links(events, self.port, self.fabric, self.latency)
        else:
            pools, links = [Pool("a", "aggregated", count=self.counts[0], **shared)], None
        cluster = Cluster(
            pools,
            events,
            records,
            links,
            self.prefill_routing,
            self.decode_routing,
            self.overlap,
            self.restart,
            hash_tokens=16,
        )
        names = list(cluster.instances)
        outages = [Outage(names[i % len(names)], at, down) for i, at, down in self.outages]
        Failures(cluster, events, outages, [], seed=0)
        cluster.start(self.requests())
        events.run()
        cluster.finish()
        return cluster, records.columns(), events

    def without(self, **changes):
        return replace(self, **changes)


@st.composite
def traffic(draw, hashes=False):
    rows = []
    for _ in range(draw(st.integers(1, 25))):
        prompt = draw(st.integers(1, 150))
        keys = None
        if hashes and draw(st.booleans()):
            family, shared = draw(st.integers(0, 2)), draw(st.integers(0, 10))
            blocks = -(-prompt // 16)
            keys = tuple((family * 100 + i) if i < shared else 1000 * (len(rows) + 1) + i for i in range(blocks))
        rows.append((draw(st.sampled_from([0.0, 0.003, 0.0171, 0.2, 1.3])), prompt, draw(st.integers(1, 60)), keys))
    return rows


@st.composite
def cases(draw, failures=False, prefix=False):
    """Small, tight deployments: preemption, blocked tickets and full batches are common."""
    disaggregated = draw(st.booleans())
    down = st.sampled_from([0.05, 0.5, 3.0, float("inf")])
    outage = st.tuples(st.integers(0, 5), st.floats(0, 4), down)
    return Case(
        rows=draw(traffic(hashes=prefix)),
        disaggregated=disaggregated,
        counts=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        kv_blocks=draw(st.sampled_from([30, 60, 110, 1000])),
        block_size=draw(st.sampled_from([4, 16] if prefix else [1, 4, 5, 16])),
        max_num_seqs=draw(st.sampled_from([1, 3, 16])),
        max_num_batched_tokens=draw(st.sampled_from([17, 64, 1000])),
        chunked_prefill=draw(st.booleans()),
        prefix_caching=prefix,
        first_token_at=draw(st.sampled_from(["prefill", "decode"])),
        prefill_routing=draw(st.sampled_from(sorted(DISCIPLINES))),
        decode_routing=draw(st.sampled_from(sorted(DISCIPLINES))),
        overlap=draw(st.booleans()),
        restart=draw(st.booleans()),
        kv=draw(st.sampled_from(KINDS)),
        port=draw(st.sampled_from([3e4, 1e6, 1e9])),
        fabric=draw(st.sampled_from([5e4, float("inf")])),
        latency=draw(st.sampled_from([0.0, 0.002])),
        outages=draw(st.lists(outage, max_size=4)) if failures else [],
    )
