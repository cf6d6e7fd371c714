"""What becomes of transfers that are preempted where ranks stop at different places: real pools, no engine."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from hetkv.errors import WaitTimeoutError
from hetkv.integrations.vllm import scheduler, sending
from hetkv.integrations.vllm.layouts import Caches
from hetkv.integrations.vllm.loading import Loading
from hetkv.integrations.vllm.metadata import Load, Metadata, Reported, Send
from hetkv.integrations.vllm.metrics import HetKVStats
from hetkv.integrations.vllm.scheduler import SchedulerSide
from hetkv.integrations.vllm.sending import Outgoing, Sending
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec, Shard
from hetkv.transport.content import content_digest
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender

SPEC = KVSpec.uniform(2, 4, 16)
SECRET = b"a secret of this test alone."
BLOCK, TOKENS = 16, 128
HALF, BLOCKS = TOKENS // 2, [list(range(TOKENS // BLOCK))]
WAIT_S = 20.0
CONTENT = content_digest(range(TOKENS))


class Ranks:
    """The minimum over ranks, each of which is a thread of this process."""

    def __init__(self, count: int) -> None:
        self.barrier, self.said = threading.Barrier(count), [[False]] * count

    def of(self, rank: int) -> Any:
        def on_all_ranks(statements: list[bool]) -> list[bool]:
            self.said[rank] = statements
            self.barrier.wait(WAIT_S)
            held = [all(each) for each in zip(*self.said, strict=True)]
            self.barrier.wait(WAIT_S)
            return held

        return on_all_ranks


def caches_of(tp: int) -> list[Caches]:
    """One pool a rank, of one cache group."""
    shards = tuple(Shard.of(SPEC, tp=tp, tp_rank=rank) for rank in range(tp))
    names = {f"l{layer}": layer for layer in range(2)}
    pools = [
        KVPool.allocate(SPEC, TOKENS // BLOCK, layout="nhd", block_size=BLOCK, dtype="float32", shard=shard)
        for shard in shards
    ]
    return [Caches(pool, shards, rank, names, (1,)) for rank, pool in enumerate(pools)]


def fill(caches: Caches, value: float) -> None:
    for layer in caches.pool.layers:
        for name in ("k", "v"):
            caches.pool.view(layer, name).fill_(value)


@pytest.mark.parametrize(
    ("handed", "asked"),
    [([HALF, HALF], [HALF, TOKENS]), ([HALF], [HALF, TOKENS]), ([TOKENS, HALF], [TOKENS])],
    ids=["tp2_tp2", "tp1_tp2", "tp2_tp1"],
)
def test_ranks_that_are_done_before_one_that_is_not(handed: list[int], asked: list[int]) -> None:
    """What one consumer rank lost comes again, and no block is held for a rank that wants nothing more.

    `handed`: tokens that each producer rank had sent when it was preempted; `asked`: what each consumer rank wants.
    """
    ours, theirs, ranks = caches_of(len(handed)), caches_of(len(asked)), Ranks(len(handed))
    with ExitStack() as stack:

        def node(kind: type, name: str, caches: Caches) -> Any:
            shards = caches.instance_shards if len(caches.instance_shards) > 1 else ()
            made = kind(caches.pool, secret=SECRET, instance=name, rank=caches.rank, instance_shards=shards)
            return stack.enter_context(made)

        senders = [node(Sender, "p", caches) for caches in ours]
        addresses = tuple(sender.listen("127.0.0.1:0") for sender in senders)
        producers = [
            Sending(sender, caches, HetKVStats(), lambda: None, ranks.of(caches.rank))
            for sender, caches in zip(senders, ours, strict=True)
        ]
        consumers = [Loading(node(Receiver, "d", caches), caches, HetKVStats(), lambda: None) for caches in theirs]
        for consumer in consumers:
            stack.callback(consumer.close)
        loads = [Load("r", "t", CONTENT, "p", addresses, 0, stop, (BLOCKS[0][: stop // BLOCK],)) for stop in asked]
        done: list[int] = []
        pending = list(range(len(asked)))

        def poll() -> None:
            for rank, consumer in enumerate(consumers):
                results = consumer.poll()
                assert not results.failed
                done.extend(rank for _ in results.finished)
            again = {name for consumer in consumers for name in consumer.repeated}
            for consumer, load in zip(consumers, loads, strict=True):
                consumer.repeated.clear()
                if again:  # as the scheduler side orders it
                    consumer.begin(Metadata(loads=[load.let_go]))

        def until(condition: Any) -> None:
            deadline = time.monotonic() + WAIT_S
            while not condition():
                assert time.monotonic() < deadline
                poll()
                time.sleep(0.001)

        def compute(producer: Sending, stop: int) -> None:
            producer.begin_step(
                Metadata(computing=[Send("r", "t", CONTENT, TOKENS, stop, (BLOCKS[0],))], computes=True)
            )
            producer.end_step()

        for caches, producer, stop in zip(ours, producers, handed, strict=True):
            fill(caches, 1.0)
            compute(producer, stop)
        for consumer, load in zip(consumers, loads, strict=True):
            consumer.begin(Metadata(loads=[load]))
        until(lambda: sorted(done) == [rank for rank in pending if asked[rank] == HALF])
        # Every rank has asked: one whose ticket comes after the preemption loses nothing, and nobody asks again.
        until(lambda: all(consumer._receiver.stats()["frames"] > 0 for consumer in consumers))
        if handed[0] == TOKENS:
            until(lambda: producers[0]._all_left("r"))
        with ThreadPoolExecutor(len(producers)) as pool:
            list(pool.map(lambda producer: producer.preempt(Metadata(preempted={"r"})), producers))
        for caches, producer in zip(ours, producers, strict=True):
            fill(caches, 2.0)
            compute(producer, TOKENS)
            producer.begin_step(Metadata(held=[Send("r", "t", CONTENT, TOKENS, TOKENS, (BLOCKS[0],))]))
        free: set[int] = set()

        def let_go() -> bool:
            free.update(rank for rank, producer in enumerate(producers) if producer.poll(set()))
            return len(free) == len(producers)

        until(let_go)
        until(lambda: sorted(done) == pending and not any(consumer._in for consumer in consumers))
        last = theirs[-1].pool
        assert all(bool((last.view(layer, name) == 2.0).all()) for layer in last.layers for name in ("k", "v"))
        assert all(sender.stats()["open_requests"] == 0 for sender in senders)


def test_a_request_that_was_given_up_stays_ended_when_it_is_preempted() -> None:
    """Nobody asks for it again, and its later blocks are nobody's: they may have ids that it has had before."""
    ours, theirs = caches_of(1)[0], caches_of(1)[0]
    with (
        Sender(ours.pool, secret=SECRET, instance="p") as sender,
        Receiver(theirs.pool, secret=SECRET, instance="d") as receiver,
    ):
        producer = Sending(sender, ours, HetKVStats(), lambda: None, lambda statements: statements)
        receiver.connect(sender.listen("127.0.0.1:0"))
        first = Send("r", "t", CONTENT, TOKENS, HALF, (BLOCKS[0][: HALF // BLOCK],))
        producer.begin_step(Metadata(computing=[first]))
        producer.end_step()
        receiving = receiver.receive("t", BLOCKS, TOKENS, content=CONTENT)
        deadline = time.monotonic() + WAIT_S
        while receiver.stats()["payload_bytes"] == 0:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        receiving.abort()
        given_up = producer._out["r"].tx
        assert given_up is not None
        assert given_up.future.exception(WAIT_S) is not None
        producer.preempt(Metadata(preempted={"r"}))
        shuffled = (BLOCKS[0][::-1],)
        producer.begin_step(Metadata(computing=[Send("r", "t", CONTENT, TOKENS, TOKENS, shuffled)]))
        producer.end_step()
        producer.begin_step(Metadata(held=[Send("r", "t", CONTENT, TOKENS, TOKENS, shuffled)]))
        assert producer.poll(set()) == {"r"}


def test_a_rank_that_runs_out_of_time_raises_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """It tells the others before it raises: they wait for its answer."""
    monkeypatch.setattr(sending, "DRAIN_S", 0.01)
    ranks = Ranks(2)

    def stuck(late: bool) -> Outgoing:
        future: Future[None] = Future()

        def wait(timeout: float) -> None:
            if late:
                raise WaitTimeoutError(f"not complete within {timeout} s")

        tx = SimpleNamespace(is_packed=False, error=None, future=future, abort=lambda _: None, wait=wait)
        return Outgoing(cast(Any, tx))

    def preempt(rank: int) -> type[BaseException] | None:
        side = Sending(cast(Any, None), cast(Any, None), HetKVStats(), lambda: None, ranks.of(rank))
        side._out["r"] = stuck(late=rank == 0)
        try:
            side.preempt(Metadata(preempted={"r"}))
        except WaitTimeoutError as error:
            return type(error)
        return None

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(preempt, range(2))) == [WaitTimeoutError] * 2


def test_repeated_loads_are_let_go_by_ranks_that_are_done() -> None:
    side = SchedulerSide("d", cast(Any, SimpleNamespace(transfer_groups=[])), producer=False, consumer=True)
    load = Load("r", "t", CONTENT, "p", ("127.0.0.1:1",), 16, 64, ([1, 2], [3]))
    side._loading["r"] = load
    repeated = Reported({"r"}, {}).aggregate(Reported({"ended"}, {}))
    side.on_output(
        cast(Any, SimpleNamespace(finished_sending=None, finished_recving={"r"}, kv_connector_worker_meta=repeated))
    )
    [order] = side._next.loads
    assert (order.cached, order.stop, order.blocks, order.awaited) == (64, 64, ([], []), False)
    assert side.pending
    assert not side._loading


def test_only_loads_that_fill_blocks_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[None] = []
    stream = SimpleNamespace(synchronize=lambda: waits.append(None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    receiver: Any = SimpleNamespace(device=SimpleNamespace(torch="cuda:0"), config=SimpleNamespace(lease_s=1.0))
    loading = Loading(receiver, cast(Any, None), HetKVStats(), lambda: None)
    monkeypatch.setattr(loading, "_link", lambda _: Future())
    load = Load("r", "t", CONTENT, "p", (), 0, 16, ([1],))
    loading.begin(Metadata(loads=[load.let_go]))
    assert not waits
    loading.begin(Metadata(loads=[load]))
    assert len(waits) == 1
    loading.close()


@pytest.mark.parametrize("paced", [True, False])
def test_an_engine_that_others_step_with_does_not_sleep(monkeypatch: pytest.MonkeyPatch, paced: bool) -> None:
    sleeps: list[float] = []
    monkeypatch.setattr(scheduler.time, "sleep", sleeps.append)
    config: Any = SimpleNamespace(transfer_groups=[])
    side = SchedulerSide("d", config, producer=False, consumer=True, paced=paced)
    side._pace(Metadata())
    side._pace(Metadata())
    assert len(sleeps) == (2 if paced else 0)
