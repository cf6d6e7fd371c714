"""What an operator sees: log lines of the life of a link, and counters as Prometheus collects them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import numpy as np
import pytest

from hetkv import KVPool, KVSpec, Receiver, Sender
from hetkv.metrics import COUNTERS, GAUGES, NodeCollector

SECRET = b"a secret of these tests"
SPEC = KVSpec.uniform(num_layers=2, num_kv_heads=2, head_dim=16)
Pair = tuple[Sender, Receiver]


@pytest.fixture
def pair() -> Iterator[Pair]:
    pools = [
        KVPool.from_tensors(SPEC, np.zeros((2, 2, 8, 4, 2, 16), np.float16), "layer segment block token head channel")
        for _ in range(2)
    ]
    with Sender(pools[0], secret=SECRET, instance="prefill-3") as sender:
        with Receiver(pools[1], secret=SECRET, instance="decode-5") as receiver:
            receiver.connect(sender.listen())
            yield sender, receiver


def move(sender: Sender, receiver: Receiver) -> None:
    got = receiver.receive("r", [1, 2], 8)
    sent = sender.send("r", [3, 4], 8)
    sent.send_layers()
    sent.wait(30)
    got.wait(30)


def test_links_are_logged_and_payloads_are_not(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    for name in (
        "hetkv",
        "hetkv.transport",
    ):  # `hetkv serve` in this process sets the second
        caplog.set_level(logging.DEBUG, logger=name)
    sender, receiver = pair
    move(sender, receiver)
    receiver.connect(sender.listen())
    deadline = time.monotonic() + 10
    while not any("sender: linked to decode-5/0 at" in line for line in caplog.messages):
        assert time.monotonic() < deadline, caplog.messages
        time.sleep(0.01)
    assert any("receiver: linked to prefill-3/0 at" in line for line in caplog.messages)
    receiver.close()
    while not any("sender: lost decode-5/0" in line for line in caplog.messages):
        assert time.monotonic() < deadline, caplog.messages
        time.sleep(0.01)
    lost = next(record for record in caplog.records if "sender: lost decode-5/0" in record.getMessage())
    assert lost.levelno == logging.INFO, lost.getMessage()  # it said goodbye


def test_a_library_is_quiet_by_default(pair: Pair, capfd: pytest.CaptureFixture[str]) -> None:
    move(*pair)
    pair[1].close()
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""


def test_every_counter_is_documented(pair: Pair) -> None:
    for node in pair:
        assert set(node.stats()) == {*COUNTERS, *GAUGES}


def test_prometheus_collects_both_nodes(pair: Pair) -> None:
    prometheus = pytest.importorskip("prometheus_client")
    registry = prometheus.CollectorRegistry()
    registry.register(NodeCollector(*pair))
    move(*pair)
    deadline = time.monotonic() + 10
    while any(node.stats()["open_requests"] for node in pair):  # the engine lets go after the handles are done
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for role, instance in (("sender", "prefill-3"), ("receiver", "decode-5")):
        labels = {"role": role, "instance": instance, "rank": "0"}
        assert registry.get_sample_value("hetkv_frames_total", labels) == 2
        assert registry.get_sample_value("hetkv_payload_bytes_total", labels) == 2 * 2 * 8 * 2 * 16 * 2
        assert registry.get_sample_value("hetkv_open_requests", labels) == 0
    assert b"hetkv_saturated_total" in prometheus.generate_latest(registry)
