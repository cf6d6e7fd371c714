"""What an engine author meets: instances and address books, secrets, `poll`, reprs, block lists, errors."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest

import hetkv
from hetkv import Exchange, Instance, KVPool, KVSpec, NodeCollector, Receiver, Sender, Shard, TransferConfig
from hetkv.control.secret import SECRET_ENV, shared_secret
from hetkv.errors import (
    AbortedError,
    ClosedError,
    ControlTimeoutError,
    HetkvError,
    IncompatibleError,
    InputError,
    PeerLostError,
    UnsupportedError,
    WireError,
)
from hetkv.transport.blocks import block_array
from tests.transport.peers import WAIT_S, settled, until

SPEC = KVSpec.uniform(4, 4, 16)
BLOCKS = 8


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder of its own, and no secret in the environment."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(SECRET_ENV, raising=False)
    return tmp_path


def pools(tp: int = 1, pp: int = 1) -> list[KVPool]:
    return [KVPool.allocate(SPEC, BLOCKS, dtype="float16", shard=shard) for shard in Shard.ranks(SPEC, tp, pp)]


class Side:
    """All ranks of an instance in this process; use `with`."""

    def __init__(self, kind: type[Any], name: str, tp: int = 1, pp: int = 1) -> None:
        self.nodes = [kind(pool, instance=name, tp=tp, pp=pp, rank=rank) for rank, pool in enumerate(pools(tp, pp))]

    def __enter__(self) -> list[Any]:
        return self.nodes

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.close()


@pytest.mark.parametrize(
    ("source", "destination"), [((1, 1), (2, 1)), ((2, 2), (1, 2)), ((4, 1), (2, 2)), ((2, 1), (8, 1))]
)
def test_a_receiver_connects_to_the_ranks_that_matter(source: tuple[int, int], destination: tuple[int, int]) -> None:
    with Side(Sender, "prefill-0", *source) as senders, Side(Receiver, "decode-0", *destination) as receivers:
        book = Instance("prefill-0", tuple(sender.listen() for sender in senders))
        for receiver in receivers:
            peers = receiver.connect(book)
            assert tuple(peer.rank for peer in peers) == peers[0].agreement.ranks
            again = receiver.connect(book)
            assert again == peers
        for sender in senders:
            for place, layer in enumerate(sender.pool.layers):
                sender.pool.view(layer, "k")[:] = layer + 1
                sender.pool.view(layer, "v")[:] = -place
        gets = [receiver.receive("r", [3, 1], 30) for receiver in receivers]
        puts = [sender.send("r", [0, 5], 30) for sender in senders]
        for put in puts:
            put.send_layers()
        for get in gets:
            get.wait(WAIT_S)
        for receiver in receivers:
            for layer in receiver.pool.layers:
                assert (receiver.pool.view(layer, "k")[[3]] == layer + 1).all()
        settled(*receivers)


def test_address_book(tmp_path: Path) -> None:
    book = Instance("prefill-0", ("10.0.0.1:7000", "[::1]:7001"))
    assert Instance.parse(str(book)) == book
    assert str(book) == "prefill-0=10.0.0.1:7000,[::1]:7001"
    for wrong in ("10.0.0.1:7000", "a=", "a=b", "=h:1", "a=h:1,"):
        with pytest.raises(InputError):
            Instance.parse(wrong)
    file = tmp_path / "book"
    with pytest.raises(ControlTimeoutError, match="no rank joined within 0 s"):
        Instance.read(file, 0)
    Instance.join(file, "prefill-0", 1, 2, "h:2")
    with pytest.raises(ControlTimeoutError, match=r"ranks \[0\] of instance 'prefill-0' did not join"):
        Instance.read(file, 0)
    Instance.join(file, "prefill-0", 0, 2, "h:1")
    Instance.join(file, "prefill-0", 1, 2, "h:3")
    assert Instance.read(file) == Instance("prefill-0", ("h:1", "h:3"))
    file.write_text(str(book))
    assert Instance.read(file) == book
    file.write_text("one two\n")
    with pytest.raises(InputError, match="'one two' is no line of an address book"):
        Instance.read(file, 0)
    with pytest.raises(InputError):
        Instance.read(tmp_path, 0)


def test_ranks_write_their_book_when_they_listen(tmp_path: Path) -> None:
    with Side(Sender, "p", 2) as senders, Side(Receiver, "d") as [receiver]:
        for sender in reversed(senders):
            sender.listen(book=tmp_path / "book")
        assert [peer.name for peer in receiver.connect(Instance.read(tmp_path / "book"))] == ["p/0", "p/1"]


def test_what_is_wrong_with_an_instance_is_named_and_nothing_stays_linked() -> None:
    with Side(Sender, "p", 2) as senders, Side(Receiver, "d") as [receiver]:
        addresses = [sender.listen() for sender in senders]
        with pytest.raises(
            PeerLostError, match=f"{addresses[1]} is rank 1 of p, not rank 0 of p: was it started again"
        ):
            receiver.connect(addresses[::-1])
        with pytest.raises(InputError, match="instance 'p' has 2 ranks, got 1 addresses"):
            receiver.connect(addresses[:1])
        with pytest.raises(PeerLostError, match="is rank 0 of p, not rank 0 of q"):
            receiver.connect(Instance("q", tuple(addresses)))
        senders[1].close()
        with pytest.raises(PeerLostError, match="cannot connect"):
            receiver.connect(addresses)
        until(lambda: not receiver.peers)
        with pytest.raises(InputError):
            receiver.connect([])


def test_a_missing_instance_is_named() -> None:
    half = pools(2)[0]
    with Sender(half, instance="p") as sender, Side(Receiver, "d") as [receiver]:
        with pytest.raises(IncompatibleError, match=r"instance_shards: .*give tp and pp, or instance_shards, to"):
            receiver.connect(sender.listen())
    with pytest.raises(InputError, match=r"the pool is not that of rank 1 of 2.*Shard.ranks\(spec, tp, pp\)\[rank\]"):
        Sender(half, instance="p", tp=2, rank=1)
    with pytest.raises(InputError, match="rank 1 of an instance of one rank: give tp and pp"):
        Sender(half, instance="p", rank=1)
    with pytest.raises(InputError, match="not both"):
        Sender(half, instance="p", tp=2, instance_shards=[half.shard])
    with pytest.raises(InputError, match="rank 5 of an instance of 2 ranks"):
        Sender(half, instance="p", tp=2, rank=5)
    for wrong in ({"instance": 3}, {"instance": "p", "rank": "0"}, {"instance": ""}, {"instance": "p", "tp": "2"}):
        with pytest.raises(InputError):
            Sender(half, **wrong)


def test_the_secret_of_this_host(home: Path) -> None:
    with Side(Sender, "p") as [sender], Side(Receiver, "d") as [receiver]:
        receiver.connect(sender.listen())
        file = home / "cache" / "hetkv" / "secret"
        assert file.stat().st_mode & 0o777 == 0o600
        assert shared_secret() == file.read_bytes()
        with pytest.raises(InputError, match=r"cannot listen at '0\.0\.0\.0:0' with the secret of this host alone"):
            sender.listen("0.0.0.0:0")
        with pytest.raises(InputError, match="cannot listen at ':0'"):
            sender.listen(":0")
        with pytest.raises(InputError, match=r"cannot connect to '10\.1\.2\.3:7000'"):
            receiver.connect("10.1.2.3:7000")


def test_the_secret_that_the_environment_names(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = home / "secret"
    file.write_text("x" * 16)
    file.chmod(0o600)
    monkeypatch.setenv(SECRET_ENV, str(file))
    with Side(Sender, "p") as [sender], Receiver(pools()[0], instance="d", secret=b"x" * 16) as receiver:
        host, port = sender.listen("0.0.0.0:0").rsplit(":", 1)
        receiver.connect(f"127.0.0.1:{port}")
        assert host == "0.0.0.0"
    file.chmod(0o640)
    with pytest.raises(InputError, match="can be used by others"):
        Sender(pools()[0], instance="p")
    monkeypatch.setenv(SECRET_ENV, str(home / "none"))
    with pytest.raises(InputError, match="No such file"):
        Sender(pools()[0], instance="p")


def test_poll_returns_each_handle_once() -> None:
    with Side(Sender, "p") as [sender], Side(Receiver, "d") as [receiver]:
        receiver.connect(sender.listen())
        assert receiver.poll() == []
        good, bad = receiver.receive("good", [1], 16), receiver.receive("bad", [2], 16)
        sender.send("good", [1], 16).send_layers()
        bad.abort("not wanted")
        seen: list[Any] = []
        until(lambda: seen.extend(receiver.poll()) or len(seen) == 2)
        assert set(seen) == {good, bad}
        assert all(handle.done() for handle in seen)
        good.wait(0)
        with pytest.raises(AbortedError):
            bad.wait(0)
        assert receiver.poll() == []
        until(lambda: [handle.request_id for handle in sender.poll()] == ["good"])


def test_reprs() -> None:
    with Side(Sender, "p") as [sender], Side(Receiver, "d") as [receiver]:
        peer = receiver.connect(sender.listen())
        assert repr(peer).startswith("Peer('p/0', 127.0.0.1:")
        assert repr(receiver) == "Receiver(d/0 of 1, 1 peers, 0 requests under way)"
        handle = receiver.receive("r", [1], 16)
        assert repr(handle) == "RecvHandle('r', under way)"
        handle.abort("enough")
        with pytest.raises(AbortedError):
            handle.wait(WAIT_S)
        assert repr(handle) == "RecvHandle('r', AbortedError: enough)"
        assert repr(receiver.pool) == "KVPool(layers [0, 4), 8 blocks of 16 tokens, nhd float16, cpu)"
    assert repr(sender) == "Sender(p/0 of 1, closed)"
    with Exchange(pools()[0], instance="x") as exchange:
        assert repr(exchange) == (
            "Exchange(Sender(x/0 of 1, 0 peers, 0 requests under way), "
            "Receiver(x/0 of 1, 0 peers, 0 requests under way))"
        )
        with pytest.raises(InputError, match="has no port"):
            exchange.listen("nowhere")


def test_a_layer_after_the_end() -> None:
    with Side(Sender, "p") as [sender], Side(Receiver, "d") as [receiver]:
        receiver.connect(sender.listen())
        receiver.receive("r", [1], 16)
        put = sender.send("r", [1], 16)
        put.send_layers()
        put.wait(WAIT_S)
        with pytest.raises(InputError, match="layer 2: request 'r' is complete"):
            put.send_layer(2)
        late = sender.send("late", [1], 16)
        for wrong in ((0, 17), (3, 2), (0,), "ab", 5, (0.0, 4)):
            with pytest.raises(InputError, match="layer 0"):
                late.send_layer(0, wrong)
        late.send_layer(np.int64(0), (np.int32(0), torch.tensor(4)))
        late.abort("no")
        with pytest.raises(AbortedError):
            late.wait(WAIT_S)
        late.send_layer(1)  # a prefill learns late that nobody wants it


def test_the_reason_of_an_abort() -> None:
    with Side(Sender, "p") as [sender], Side(Receiver, "d") as [receiver]:
        receiver.connect(sender.listen())
        get, put = receiver.receive("r", [1], 16), sender.send("r", [1], 16)
        put.send_layer(0)
        get.wait_layer(0, WAIT_S)
        get.abort("the client gave the request up: bye")
        for handle in (get, put):
            with pytest.raises(AbortedError) as found:
                handle.wait(WAIT_S)
            assert found.value.reason.endswith("bye")
        get, put = receiver.receive("s", [1], 16), sender.send("s", [1], 16)
        put.send_layer(0)
        get.wait_layer(0, WAIT_S)
        put.abort("preempted")
        for handle in (get, put):
            with pytest.raises(AbortedError) as found:
                handle.wait(WAIT_S)
            assert found.value.reason == "preempted"


def test_errors_of_the_first_minutes() -> None:
    assert issubclass(hetkv.HetkvError, Exception)
    assert not issubclass(UnsupportedError, WireError)
    with Side(Sender, "p") as [sender], Side(Receiver, "d") as [receiver]:
        with pytest.raises(PeerLostError, match="no sender is connected: call connect with its addresses first"):
            receiver.receive("r", [1], 16)
        receiver.connect(sender.listen())
        receiver.receive("chat-7", [1], 16)
        with pytest.raises(InputError, match="request 'chat-7' is under way already"):
            receiver.receive("chat-7", [2], 16)
        for wrong in (3, 2.5, None, ("a",), b"short", [1] * 16):
            with pytest.raises(InputError, match="request id"):
                receiver.receive(wrong, [1], 16)
        for wrong in ({1}, {1: 2}, "12", 5, None, [1.5], [None], ["1"], [1 << 40], [[1], 2], np.zeros((2, 2, 2), int)):
            with pytest.raises(InputError):
                receiver.receive("r", wrong, 16)
        for wrong in ("16", 1.5, None, [1, 2], [None], 0):
            with pytest.raises(InputError):
                receiver.receive("r", [1], wrong)
            with pytest.raises(InputError):
                sender.send("r", [1], wrong)
        for wrong in ("1", 1.5, None, [0, 0], -1, 17):
            with pytest.raises(InputError):
                receiver.receive("r", [1], 16, num_cached_tokens=wrong)
        for wrong in ("1", 0, -1, float("nan"), 1e9):
            with pytest.raises(InputError):
                receiver.receive("r", [1], 16, lease_s=wrong)
    with pytest.raises(ClosedError):
        sender.send("r", [1], 16)


def test_settings_are_of_their_types() -> None:
    for wrong in ({"slot_bytes": "1"}, {"lease_s": "x"}, {"direct": 3}, {"threads": 1.5}, {"window": "there"}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            TransferConfig(**wrong)
    TransferConfig(lease_s=3, slot_bytes=1 << 20)


def test_blocks_of_any_kind() -> None:
    want = [3, 1, 7]
    kinds = [want, tuple(want), iter(want), (b for b in want), np.array(want), np.array(want, np.uint64)]
    kinds += [np.array([3, 0, 1, 0, 7])[::2], torch.tensor(want), torch.tensor(want, dtype=torch.int32), map(int, want)]
    for kind in kinds:
        assert block_array(kind).tolist() == want
    assert block_array(range(2)).tolist() == [0, 1]
    assert block_array(np.array([])).tolist() == []
    for wrong in (np.array([1.5]), np.array([[1]]), np.array([1 << 31]), torch.tensor([-(1 << 40)])):
        with pytest.raises(InputError, match="block id"):
            block_array(wrong)


def test_a_million_blocks_take_no_loop_of_python() -> None:
    """Against the same ids in a list, which is a loop over Python's integers."""
    ids = np.arange(1_000_000)
    block_array(ids)
    began = time.process_time()
    block_array(ids)
    middle = time.process_time()
    block_array(ids.tolist())
    assert middle - began < 0.5 * (time.process_time() - middle)


def test_groups_of_blocks() -> None:
    spec = KVSpec([*SPEC.layers[:2], *(hetkv.LayerSpec.kv(4, 16, group=1) for _ in range(2))])
    pool, other = (KVPool.allocate(spec, BLOCKS, dtype="float16") for _ in range(2))
    with Sender(pool, instance="p") as sender, Receiver(other, instance="d") as receiver:
        receiver.connect(sender.listen())
        for number, ids in enumerate(([[1], [2]], np.array([[1], [2]]), (torch.tensor([1]), torch.tensor([2])))):
            get = receiver.receive(f"r{number}", ids, np.array([16, 9]), num_cached_tokens=np.int64(2))
            sender.send(f"r{number}", ids, [16, 9]).send_layers()
            get.wait(WAIT_S)


def test_prometheus_collects_nodes() -> None:
    registry = CollectorRegistry()
    with Side(Sender, "p") as [sender], Side(Receiver, "d") as [receiver]:
        registry.register(NodeCollector([sender, receiver]))
        receiver.connect(sender.listen())
        get = receiver.receive("r", [1], 16)
        sender.send("r", [1], 16).send_layers()
        get.wait(WAIT_S)
        text = generate_latest(registry).decode()
    assert f'hetkv_payload_bytes_total{{instance="d",rank="0",role="receiver"}} {4 * 2 * 16 * 4 * 16 * 2:.1f}' in text
    assert 'hetkv_open_requests{instance="d",rank="0",role="receiver"}' in text


def test_spans_where_a_tracer_is_imported() -> None:
    trace = pytest.importorskip("opentelemetry.sdk.trace")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from opentelemetry.trace import set_tracer_provider

    pytest.importorskip("nvtx")
    exporter = InMemorySpanExporter()
    provider = trace.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    set_tracer_provider(provider)
    with Side(Sender, "p") as [sender], Side(Receiver, "d") as [receiver]:
        receiver.connect(sender.listen())
        get = receiver.receive("r", [1], 16)
        get.abort("enough")
        with pytest.raises(HetkvError):
            get.wait(WAIT_S)
    [span] = exporter.get_finished_spans()
    assert (span.name, span.attributes["hetkv.request"]) == ("RecvHandle", "r")
    assert span.status.description == "enough"


def test_a_forked_child_gets_an_error(home: Path) -> None:
    with Side(Sender, "p"):
        child = os.fork()
        if child == 0:
            try:
                Sender(pools()[0], instance="q")
            except HetkvError as error:
                os._exit(0 if "spawn" in str(error) else 2)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0


def test_a_receiver_that_closes_when_it_is_done_does_not_fail_the_sender() -> None:
    """The acknowledgement travels otherwise than the end of the connection, and must count before it."""
    pool, other = pools()[0], pools()[0]
    with Sender(pool, instance="p") as sender:
        address = sender.listen()
        for number in range(40):
            with Receiver(other, instance="d") as receiver:
                receiver.connect(address)
                get = receiver.receive(f"r{number}", [1, 2], 32)
                put = sender.send(f"r{number}", [1, 2], 32)
                put.send_layers()
                get.wait(WAIT_S)
            put.wait(WAIT_S)


def test_a_frame_that_outlasts_the_heartbeat_keeps_its_peer() -> None:
    """A pack of 64 MiB with conversion takes longer than the peer's patience without it."""
    spec = KVSpec.uniform(1, 64, 128)
    ours = KVPool.allocate(spec, 256, dtype="float32")
    theirs = KVPool.allocate(spec, 256, dtype="float8_e4m3fn")
    config = TransferConfig(slot_bytes=64 << 20, window_bytes=64 << 20, heartbeat_s=0.01, peer_timeout_s=0.03)
    with Sender(ours, instance="p", config=config) as sender, Receiver(theirs, instance="d", config=config) as receiver:
        receiver.connect(sender.listen())
        get = receiver.receive("r", range(256), 4096)
        sender.send("r", range(256), 4096).send_layers()
        get.wait(WAIT_S)
        assert len(receiver.peers) == 1
