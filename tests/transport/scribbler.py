"""A sender that breaks the rules: once it has sent, it writes to all slots that it has ever been granted.

`python -m tests.transport.scribbler ADDRESS` prints `writes` when it has begun, and goes on until its input is closed.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading

from hetkv.kv.pool import KVPool
from hetkv.transport.sender import Sender
from tests.transport.worker import BLOCKS, SECRET, SPEC, TOKENS

REQUESTS = 20


def windows() -> list[tuple[int, int]]:
    """Address and bytes of each slot's memory that is mapped here."""
    found = []
    with open("/proc/self/maps") as lines:
        for line in lines:
            if "memfd:hetkv-window" in line and " rw-s " in line:
                first, last = (int(part, 16) for part in line.split()[0].split("-"))
                found.append((first, last - first))
    return found


def main(address: str) -> None:
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    with Sender(KVPool.allocate(SPEC, 16), secret=SECRET, instance="scribbler") as sender:
        sender.connect(address)
        for number in range(REQUESTS):
            request = sender.send(f"scribbler-{number}", BLOCKS, TOKENS)
            request.send_layers()
            request.wait(20)
        slots = windows()
        print("writes" if slots else "has no slots", flush=True)
        while not over.is_set():
            for first, size in slots:
                ctypes.memmove(first, os.urandom(size), size)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
