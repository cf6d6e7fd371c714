"""Windows in device memory that another process stores into, also one that dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hetkv.errors import (
    PeerLostError,
)
from hetkv.transport.config import TransferConfig
from hetkv.transport.receiver import Receiver
from tests.device.host import SMALL, library_path, on_device, pools
from tests.transport.peers import SECRET, WAIT_S, duplicate, same_bytes, until

WORKER = """
import sys, time
sys.path.insert(0, sys.argv[1])
import hetkv.transport.node
from tests.device.host import device, HostStream
hetkv.transport.node.device_of = lambda pool: device(0)
from hetkv.transport.config import TransferConfig
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec
from hetkv.transport.sender import Sender
from tests.transport.peers import randomise, SECRET
spec = KVSpec.uniform(3, 2, 32)
pool = randomise(KVPool.allocate(spec, 24, layout="nhd", block_size=16), 0)
sender = Sender(pool, secret=SECRET, instance="p0", config=TransferConfig(slot_bytes=4096, window_bytes=16384))
print(sender.listen(), flush=True)
for line in sys.stdin:
    request = line.split()[0]
    tx = sender.send(request, [3, 1, 2], 40)
    tx.send_layers()
    if line.split()[1] == "wait":
        tx.wait(20)
        print(sender.path(sender.peers[0]), flush=True)
    else:
        time.sleep(60)
"""


def start_worker(backend: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(Path(__file__).parents[2])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HETKV_HOST_BACKEND": backend, "HETKV_HOST_BACKEND_LIBRARY": library_path()},
    )


def test_another_process_stores_through_an_ipc_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    on_device(monkeypatch)
    source, destination = pools()
    expected = duplicate(destination)
    from tests.transport.peers import deliver

    worker = start_worker()
    assert worker.stdin is not None
    assert worker.stdout is not None
    with Receiver(destination, secret=SECRET, instance="d0", config=SMALL) as receiver:
        receiver.connect(worker.stdout.readline().strip())
        rx = receiver.receive("one", [7, 5], 40)
        print("one wait", file=worker.stdin, flush=True)
        rx.wait(WAIT_S)
        assert worker.stdout.readline().strip() == "device"
        deliver([(source, [[3, 1, 2]])], expected, [[7, 5]], [(0, 40)])
        assert same_bytes(destination, expected)
        worker.stdin.close()
        assert worker.wait(20) == 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_sender_lost_in_the_middle_of_a_pack(monkeypatch: pytest.MonkeyPatch, how: signal.Signals) -> None:
    """A killed sender's slots get new memory; a stopped one's stay in quarantine until it is gone."""
    on_device(monkeypatch)
    _, destination = pools()
    worker = start_worker("slow=2000000")
    assert worker.stdin is not None
    assert worker.stdout is not None
    config = TransferConfig(slot_bytes=4096, window_bytes=16384, heartbeat_s=0.2, peer_timeout_s=1.5)
    with Receiver(destination, secret=SECRET, instance="d0", config=config) as receiver:
        receiver.connect(worker.stdout.readline().strip())
        rx = receiver.receive("one", [7, 5], 40)
        print("one go", file=worker.stdin, flush=True)
        until(lambda: receiver.stats()["lent_slots"] > 0)
        time.sleep(0.3)
        worker.send_signal(how)
        with pytest.raises(PeerLostError):
            rx.wait(WAIT_S)
        if how == signal.SIGSTOP:
            assert receiver.stats()["quarantined_slots"] > 0
            worker.kill()
        worker.wait(10)
        until(lambda: receiver.stats()["quarantined_slots"] == 0)
        worker.stdin.close()
        worker.stdout.close()
