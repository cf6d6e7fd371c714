"""Payloads of requests, between a producer's and a consumer's worker: real pools, no engine."""

from __future__ import annotations

import logging
import time

import pytest

from hetkv.control import handshake
from hetkv.integrations.vllm.loading import Loading
from hetkv.integrations.vllm.metadata import Load, Metadata, Send
from hetkv.integrations.vllm.metrics import HetKVStats
from hetkv.integrations.vllm.sending import Sending
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender
from tests.vllm.test_preemption import CONTENT, SECRET, WAIT_S, caches_of

TOKENS = 32
BLOCKS = ([0, 1],)


def test_a_payload_is_forgotten() -> None:
    """The request itself has no limit, as the scheduler ends it; what it carried goes a while after."""
    (ours,), (theirs,) = caches_of(1), caches_of(1)
    with Sender(ours.pool, secret=SECRET, instance="p") as sender:
        with Receiver(theirs.pool, secret=SECRET, instance="d") as receiver:
            receiver.connect(sender.listen())
            producer = Sending(sender, ours, HetKVStats(), lambda: None, lambda held: held)
            send = Send("r", "t", CONTENT, TOKENS, TOKENS, BLOCKS, payload=b"first token")
            producer.begin_step(Metadata(held=[send]))
            asked = receiver.receive("t", [0, 1], TOKENS, content=CONTENT, payload=True)
            assert asked.payload(WAIT_S) == b"first token"
            asked.wait(WAIT_S)
            [kept] = sender._payloads._kept.values()
            assert kept.until <= time.monotonic() + 2 * sender.config.hold_s


@pytest.mark.parametrize("minor", [5, 6])
def test_a_producer_of_an_older_version(
    minor: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Before 2.6 there are none. The KV is loaded all the same, and one line of the log says it."""
    monkeypatch.setattr(handshake, "MINOR", minor)
    caplog.set_level(logging.WARNING, "hetkv")
    (ours,), (theirs,) = caches_of(1), caches_of(1)
    with Sender(ours.pool, secret=SECRET, instance="p") as sender:
        with Receiver(theirs.pool, secret=SECRET, instance="d") as receiver:
            producer = Sending(sender, ours, HetKVStats(), lambda: None, lambda held: held)
            consumer = Loading(receiver, theirs, HetKVStats(), lambda: None)
            addresses = (sender.listen(),)
            names = {"a", "b"}
            done: set[str] = set()
            held = [Send(name, name, CONTENT, TOKENS, TOKENS, BLOCKS, payload=name.encode()) for name in sorted(names)]
            producer.begin_step(Metadata(held=held))
            for name in sorted(names):
                load = Load(name, name, CONTENT, "p", addresses, 0, TOKENS, BLOCKS, wants_payload=True)
                consumer.begin(Metadata(loads=[load]))
                deadline = time.monotonic() + WAIT_S
                while name not in done:
                    assert time.monotonic() < deadline
                    finished, failed = consumer.poll()
                    assert not failed
                    done |= finished
                    time.sleep(0.001)
            consumer.close()
    said = [record.getMessage() for record in caplog.records if "payload" in record.getMessage()]
    if minor < 6:
        assert consumer.payloads == {}
        assert said == ["p speaks version 2.5, which has no payloads: requests go on without"]
    else:
        assert consumer.payloads == {name: name.encode() for name in names}
        assert said == []
