"""The other processes of test_real_faults.py: `serve(role, pipe)`, over TCP alone. Each line has an answer.

A request is `NAME:FIRST:COUNT:INSTANCE`, its blocks, the same on both sides, and who sends it. A sender says where it
listens and obeys `send REQUEST...`. A receiver obeys `connect ADDRESS...`, `receive REQUEST...`, which answers
`flowing` once frames have come, `wait`, which says how they ended, `small NAME` for one block of one request, `break`,
which ends the control connections alone, and `check`, which says whether a byte outside of all requests' blocks has
changed.
"""

from __future__ import annotations

import faulthandler
import time
from multiprocessing.connection import Connection

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
BLOCKS, USED = 1024, 960
TIMEOUT_S = 2.0
CONFIG = TransferConfig(
    slot_bytes=1 << 18, window_bytes=32 << 18, max_slots_per_link=8, staging_slots=8, heartbeat_s=0.1,
    peer_timeout_s=TIMEOUT_S, lease_s=30,
)  # fmt: skip
LARGE = TransferConfig(slot_bytes=4 << 20, window_bytes=64 << 20, max_slots_per_link=16)


def parse(text: str) -> tuple[tuple[str, list[int], int], str]:
    """What `send` and `receive` take, and the sender's instance."""
    name, first, count, instance = text.split(":")
    return (name, list(range(int(first), int(first) + int(count))), int(count) * 16), instance


def kept(pool: KVPool) -> list[torch.Tensor]:
    """Copies of what no ticket names."""
    return [pool.view(layer, name)[USED:].clone() for layer in range(2) for name in "kv"]


def serve(role: str, pipe: Connection) -> None:
    """Body of a process; ends with the pipe."""
    faulthandler.enable()
    torch.set_num_threads(1)
    LocalSockets._listen = lambda self, address: False  # type: ignore[method-assign]
    pool = KVPool.allocate(SPEC, BLOCKS)
    for tensor in {id(t): t for memory in pool.layers.values() for t in memory.tensors.values()}.values():
        tensor.view(torch.uint8).fill_(1) if role.startswith("sender") else tensor.view(torch.uint8).random_(2, 127)
    before, pending = kept(pool), []
    if role.startswith("sender"):
        node: Sender | Receiver = Sender(pool, secret=SECRET, instance=role, config=CONFIG)
        pipe.send(node.listen())
    else:
        node = Receiver(pool, secret=SECRET, instance=role, config=LARGE if role == "large" else CONFIG)
        pipe.send("ready")
    while True:
        try:
            verb, *rest = pipe.recv().split()
        except EOFError:
            return
        answer = "ok"
        try:
            if verb == "send":
                for request in rest:
                    node.send(*parse(request)[0]).send_layers()
            elif verb == "connect":
                while node.peers:
                    time.sleep(0.001)
                for address in rest:
                    assert node.connect(address).kind == "tcp"
            elif verb == "receive":
                frames = node.stats()["frames"]
                pending = [node.receive(*what, src_instance=who) for what, who in map(parse, rest)]
                while node.stats()["frames"] < frames + 8:
                    time.sleep(0.0005)
                answer = "flowing"
            elif verb == "small":
                node.receive(rest[0], [0], 16).wait(20)
            elif verb == "break":
                for peer in node.peers:
                    peer.connection._channel.wake()
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
        pipe.send(answer)
