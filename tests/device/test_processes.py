"""Windows in device memory that another process stores into, also one that dies."""

from __future__ import annotations

import signal
import time

import pytest

import hetkv.transport.node
from hetkv.bench.child import Child
from hetkv.errors import PeerLostError
from hetkv.kv.pool import KVPool
from hetkv.transport.config import TransferConfig
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender
from tests.device.host import SMALL, SPEC, device, library_path, on_device, pools
from tests.transport.peers import SECRET, WAIT_S, deliver, duplicate, randomise, same_bytes, until


class DeviceSender:
    """In the other process: a sender whose pool is on device 0."""

    def __init__(self) -> None:
        hetkv.transport.node.device_of = lambda pool: device(0)
        pool = randomise(KVPool.allocate(SPEC, 24, layout="nhd", block_size=16), 0)
        config = TransferConfig(slot_bytes=4096, window_bytes=16384)
        self.sender = Sender(pool, secret=SECRET, instance="p0", config=config)

    def listen(self) -> str:
        return self.sender.listen()

    def send(self, request: str) -> None:
        self.tx = self.sender.send(request, [3, 1, 2], 40)
        self.tx.send_layers()

    def wait(self) -> str | None:
        """Until the request is complete; how its payloads went."""
        self.tx.wait(20)
        return self.sender.path(self.sender.peers[0])

    def close(self) -> None:
        self.sender.close()


def start_sender(backend: str = "") -> Child:
    environment = {"HETKV_HOST_BACKEND": backend, "HETKV_HOST_BACKEND_LIBRARY": library_path()}
    child = Child("sender", DeviceSender, (), environment)
    child.answer()
    return child


def test_another_process_stores_through_an_ipc_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    on_device(monkeypatch)
    source, destination = pools()
    expected = duplicate(destination)
    sender = start_sender()
    with Receiver(destination, secret=SECRET, instance="d0", config=SMALL) as receiver:
        receiver.connect(sender.ask("listen"))
        rx = receiver.receive("one", [7, 5], 40)
        sender.ask("send", "one")
        rx.wait(WAIT_S)
        assert sender.ask("wait") == "device"
        deliver([(source, [[3, 1, 2]])], expected, [[7, 5]], [(0, 40)])
        assert same_bytes(destination, expected)
        sender.close()
        assert sender.process.exitcode == 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_sender_lost_in_the_middle_of_a_pack(monkeypatch: pytest.MonkeyPatch, how: signal.Signals) -> None:
    """A killed sender's slots get new memory; a stopped one's stay in quarantine until it is gone."""
    on_device(monkeypatch)
    _, destination = pools()
    sender = start_sender("slow=2000000")
    config = TransferConfig(slot_bytes=4096, window_bytes=16384, heartbeat_s=0.2, peer_timeout_s=1.5)
    with Receiver(destination, secret=SECRET, instance="d0", config=config) as receiver:
        receiver.connect(sender.ask("listen"))
        rx = receiver.receive("one", [7, 5], 40)
        sender.ask("send", "one")
        until(lambda: receiver.stats()["granted_slots"] > 0)
        time.sleep(0.3)
        sender.signal(how)
        with pytest.raises(PeerLostError):
            rx.wait(WAIT_S)
        if how == signal.SIGSTOP:
            assert receiver.stats()["quarantined_slots"] > 0
            sender.kill()
        sender.process.join(10)
        until(lambda: receiver.stats()["quarantined_slots"] == 0)
