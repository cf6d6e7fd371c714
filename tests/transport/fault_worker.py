"""The other processes of test_real_faults.py: `fault_worker.py ROLE`, over TCP alone. Prints what happens.

A sender prints where it listens and obeys `send NAME`: four requests of all its layers. A receiver obeys
`connect ADDRESS`, `receive NAME`, which asks for them and prints `flowing` once frames have come, `wait`, which prints
how they ended, `small NAME` for one block of one request, `break`, which ends the control connection alone, and
`check`, which prints whether a byte outside of the tickets' blocks has changed.
"""

from __future__ import annotations

import sys
import time

import torch

from hetkv.control.local import LocalSockets
from hetkv.errors import HetkvError
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec
from hetkv.transport.config import TransferConfig
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender

SECRET = b"a secret of tests"
SPEC = KVSpec.uniform(2, 4, 128)
BLOCKS, USED, REQUESTS = 1024, 960, 4
PART = USED // REQUESTS
TIMEOUT_S = 0.5
CONFIG = TransferConfig(
    slot_bytes=1 << 18, window_bytes=8 << 18, max_slots_per_link=8, staging_slots=8, heartbeat_s=0.1,
    peer_timeout_s=TIMEOUT_S, lease_s=30,
)  # fmt: skip


def blocks(number: int) -> list[int]:
    return list(range(number * PART, (number + 1) * PART))


def kept(pool: KVPool) -> list[torch.Tensor]:
    """Copies of what no ticket names."""
    return [pool.view(layer, name)[USED:].clone() for layer in range(2) for name in "kv"]


def main() -> None:
    LocalSockets._listen = lambda self, address: False  # type: ignore[method-assign]
    pool = KVPool.allocate(SPEC, BLOCKS)
    for tensor in {id(t): t for memory in pool.layers.values() for t in memory.tensors.values()}.values():
        tensor.view(torch.uint8).random_(0, 127)
    before, pending = kept(pool), []
    if sys.argv[1] == "sender":
        node: Sender | Receiver = Sender(pool, secret=SECRET, instance="p", config=CONFIG)
        print(node.listen(), flush=True)
    else:
        node = Receiver(pool, secret=SECRET, instance=sys.argv[1], config=CONFIG)
        print("ready", flush=True)
    for line in sys.stdin:
        verb, *rest = line.split()
        answer = "ok"
        try:
            if verb == "send":
                for number in range(REQUESTS):
                    node.send(f"{rest[0]}-{number}", blocks(number), PART * 16).send_layers()
            elif verb == "connect":
                while node.peers:
                    time.sleep(0.001)
                assert node.connect(rest[0]).kind == "tcp"
            elif verb == "receive":
                frames = node.stats()["frames"]
                pending = [node.receive(f"{rest[0]}-{number}", blocks(number), PART * 16) for number in range(REQUESTS)]
                while node.stats()["frames"] < frames + 8:
                    time.sleep(0.0005)
                answer = "flowing"
            elif verb == "small":
                node.receive(rest[0], [0], 16).wait(20)
            elif verb == "break":
                node.peers[0].connection._channel.wake()
            elif verb == "wait":
                ends = set()
                for one in pending:
                    try:
                        one.wait(20)
                        ends.add("complete")
                    except HetkvError as error:
                        ends.add(type(error).__name__)
                answer = " ".join(sorted(ends))
            elif verb == "check":
                same = all(torch.equal(a, b) for a, b in zip(before, kept(pool), strict=True))
                answer = "unchanged" if same else "CHANGED"
        except HetkvError as error:
            answer = f"{type(error).__name__}: {error}"
        print(answer, flush=True)


if __name__ == "__main__":
    main()
