"""Faults of whole processes and connections with payloads under way over TCP: nobody else dies, and no foreign byte is
written. A hundred rounds each where they are slow."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hetkv.kv.pool import KVPool
from hetkv.transport.config import TransferConfig
from hetkv.transport.sender import Sender
from tests.transport.fault_worker import SECRET, SPEC, TIMEOUT_S
from tests.transport.peers import WAIT_S, until

WORKER = Path(__file__).parent / "fault_worker.py"
ROUNDS = pytest.mark.parametrize("rounds", [3, pytest.param(100, marks=pytest.mark.slow)])
SMALL_S = 0.25
"""Longest that a small request may take beside a stopped peer; it was the peer's timeout of 3 s."""


class Process:
    """`fault_worker.py` in a process of its own."""

    def __init__(self, role: str) -> None:
        root = str(WORKER.parents[2])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", str(WORKER), role],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.hello = self.read()

    def read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line, f"the process has died: {self._process.wait(10)}"
        return line

    def say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def tell(self, line: str) -> str:
        self.say(line)
        return self.read()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def process(role: str) -> Iterator[Process]:
    made = Process(role)
    try:
        yield made
    finally:
        made.end()


def start(receiver: Process, sender: Process, name: str) -> None:
    """Requests under way, of which some frames have come."""
    assert receiver.tell(f"connect {sender.hello}") == "ok"
    assert sender.tell(f"send {name}") == "ok"
    assert receiver.tell(f"receive {name}") == "flowing"


def finish(receiver: Process, sender: Process, name: str) -> None:
    """The receiver is whole: requests complete, and nothing but their blocks has changed."""
    start(receiver, sender, name)
    assert receiver.tell("wait") == "complete"
    assert receiver.tell("check") == "unchanged"


@ROUNDS
def test_a_receiver_that_pauses_for_longer_than_the_timeout(rounds: int) -> None:
    with process("receiver") as receiver, process("sender") as sender:
        for number in range(rounds):
            start(receiver, sender, f"pause-{number}")
            receiver.signal(signal.SIGSTOP)
            time.sleep(2 * TIMEOUT_S)
            receiver.signal(signal.SIGCONT)
            assert receiver.tell("wait") in ("PeerLostError", "PeerLostError complete", "complete")
            assert receiver.tell("check") == "unchanged"
        finish(receiver, sender, "after")


@ROUNDS
@pytest.mark.parametrize("pause", [True, False])
def test_a_sender_that_is_killed_while_its_receiver_pauses(rounds: int, pause: bool) -> None:
    with process("receiver") as receiver:
        for number in range(rounds):
            with process("sender") as sender:
                start(receiver, sender, f"kill-{number}")
                if pause:
                    receiver.signal(signal.SIGSTOP)
                    time.sleep(0.1)
                sender.end()
                receiver.signal(signal.SIGCONT)
                assert receiver.tell("wait") in ("PeerLostError", "PeerLostError complete", "complete")
                assert receiver.tell("check") == "unchanged"
        with process("sender") as sender:
            finish(receiver, sender, "after")


@ROUNDS
def test_a_control_connection_that_breaks_alone(rounds: int) -> None:
    """A firewall's reset; the sender's payloads are still on their way when the receiver takes it for dead."""
    with process("receiver") as receiver, process("sender") as sender:
        for number in range(rounds):
            start(receiver, sender, f"broken-{number}")
            assert receiver.tell("break") == "ok"
            assert receiver.tell("wait") in ("PeerLostError", "PeerLostError complete", "complete")
            assert receiver.tell("check") == "unchanged"
        finish(receiver, sender, "after")


@ROUNDS
def test_a_stopped_receiver_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch, rounds: int) -> None:
    monkeypatch.setattr("hetkv.control.local.LocalSockets._listen", lambda self, address: False)
    pool = KVPool.allocate(SPEC, 1024)
    # Here the stopped one is not given up while the others' requests are timed.
    config = TransferConfig(slot_bytes=1 << 18, window_bytes=8 << 18, heartbeat_s=0.1, peer_timeout_s=60)
    with Sender(pool, secret=SECRET, instance="p", config=config) as sender, process("receiver") as good:
        address = sender.listen()
        assert good.tell(f"connect {address}") == "ok"

        def small(name: str) -> float:
            begin = time.perf_counter()
            handle = sender.send(name, [1000], 16)
            handle.send_layers()
            assert good.tell(f"small {name}") == "ok"
            handle.wait(WAIT_S)
            return time.perf_counter() - begin

        count = 5 * rounds
        before = [small(f"before-{number}") for number in range(count)]
        with process("receiver2") as stopped:
            assert stopped.tell(f"connect {address}") == "ok"
            until(lambda: len(sender.peers) == 2)
            for number in range(4):
                sender.send(f"big-{number}", list(range(number * 240, number * 240 + 240)), 240 * 16).send_layers()
            assert stopped.tell("receive big") == "flowing"
            stopped.signal(signal.SIGSTOP)
            time.sleep(0.2)
            after = [small(f"after-{number}") for number in range(count)]
            assert len(sender.peers) == 2
        ratio = statistics.median(after) / statistics.median(before)
        print(f"beside a stopped peer: {ratio:.2f} x, longest {max(after) * 1e3:.1f} ms")
        assert statistics.median(after) < SMALL_S
