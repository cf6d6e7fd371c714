"""What the other process of test_processes.py does: `Worker`."""

from __future__ import annotations

import sys
import time

from hetkv.errors import HetkvError
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec
from hetkv.transport.config import TransferConfig
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender

SPEC = KVSpec.uniform(2, 2, 64)
SECRET = b"a secret of tests"
CONFIG = TransferConfig(slot_bytes=16384, window_bytes=4 * 16384)
BLOCKS = list(range(8))
TOKENS = 8 * 16


class Worker:
    """A sender or a receiver that is linked to `address`."""

    def __init__(self, role: str, address: str) -> None:
        kind = Sender if role == "sender" else Receiver
        self.node = kind(KVPool.allocate(SPEC, 16), secret=SECRET, instance=f"{role}-process", config=CONFIG)
        self.node.connect(address)
        self.requests = {}

    def send(self, request: str) -> None:
        """Send layer 0 of two."""
        self.requests[request] = self.node.send(request, BLOCKS, TOKENS)
        self.requests[request].send_layer(0)

    def send_rest(self, request: str) -> None:
        self.requests[request].send_layer(1)

    def receive(self, request: str) -> None:
        self.requests[request] = self.node.receive(request, BLOCKS, TOKENS)

    def wait(self, request: str) -> str:
        """How the request ended."""
        try:
            self.requests[request].wait(20)
        except HetkvError as error:
            return type(error).__name__
        return "complete"

    def cpu(self, seconds: float) -> float:
        """Share of a core that this process uses at rest."""
        start = time.process_time()
        time.sleep(seconds)
        return (time.process_time() - start) / seconds

    def exit(self) -> None:
        """End the process without `close`."""
        sys.exit(0)

    def close(self) -> None:
        self.node.close()
