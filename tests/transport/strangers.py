"""How much strangers slow honest transfers down: `python -m tests.transport.strangers` prints it as JSON.

An honest sender and a receiver, each a process, transfer without pause. Another process plays strangers, one kind after
the other; turns with them and turns without them alternate, so that both see the same machine. Strangers come at a
stated rate and run on this host, too: they need a core of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

from hetkv.bench.child import Child
from hetkv.bench.environment import environment
from hetkv.control.description import Description
from hetkv.control.establish import connect
from hetkv.errors import HetkvError
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec
from hetkv.reference import wire
from hetkv.reference.messages import Abort, Prelude, Type
from hetkv.transport.config import TransferConfig
from hetkv.transport.handle import request_key
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender
from tests.control.peers import Proxy
from tests.transport.peers import SECRET, until

SPEC = KVSpec.uniform(4, 8, 128)
BLOCKS = 64
VICTIM = 4
"""Blocks of a request that waits while the strangers are there."""
TOKENS = 16 * BLOCKS
BYTES = TOKENS * 4 * 8 * 128 * 2 * 2
HALF_OPEN = 1000
RATES = {"no secret": 100, "wrong secret": 20, "replayed handshake": 50, "foreign frames": 100, "another's request": 5}
"""Attempts a second of each kind; the half-open sockets are opened once and held."""
KINDS = ("half open", *RATES)


class HonestSender:
    """Sends one request after the other while it may."""

    def __init__(self, address: str) -> None:
        torch.set_num_threads(1)
        pool = KVPool.allocate(SPEC, BLOCKS)
        for layer in range(len(SPEC.layers)):
            for name in "kv":
                pool.view(layer, name).fill_(layer + 1.5)
        self.node = Sender(pool, secret=SECRET, instance="honest", config=TransferConfig())
        self.node.connect(address)

    def send(self, request: str, blocks: int = BLOCKS) -> None:
        """All layers of a request."""
        self.node.send(request, list(range(blocks)), blocks * 16).send_layers()

    def close(self) -> None:
        self.node.close()


class Strangers:
    """The process that plays them. It knows the honest one's address, a recorded handshake, and a link's number."""

    def __init__(self, address: str, recorded: bytes, link: int, secret: bytes) -> None:
        self.address, self.recorded, self.link, self.secret = address, recorded, link, secret
        host, _, port = address.rpartition(":")
        self.target = (host, int(port))
        self.held: list[socket.socket] = []
        self.stop_asked = threading.Event()
        self.thread: threading.Thread | None = None
        self.attempts = 0
        self.node: Sender | None = None
        self.victim = ("", 0)

    def start(self, kind: str, victim: tuple[str, int]) -> None:
        """Begin; the sockets of `half open` are there when this returns. `victim`: a request's id and its epoch."""
        self.victim = victim
        if kind == "half open":
            self.held = [socket.create_connection(self.target, 10) for _ in range(HALF_OPEN)]
            self.attempts = HALF_OPEN
            return
        if kind == "another's request" and self.node is None:
            config = TransferConfig(heartbeat_s=1)
            self.node = Sender(KVPool.allocate(SPEC, 4), secret=self.secret, instance="hostile", config=config)
        work = {
            "no secret": lambda: self.call(random.randbytes(300)),
            "wrong secret": self.wrong_secret,
            "replayed handshake": lambda: self.call(self.recorded),
            "foreign frames": self.foreign_frames,
            "another's request": self.anothers_request,
        }[kind]
        self.stop_asked.clear()
        self.thread = threading.Thread(target=self.repeat, args=(work, RATES[kind]))
        self.thread.start()

    def stop(self) -> int:
        """End; how many attempts there were."""
        self.stop_asked.set()
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        for sock in self.held:
            sock.close()
        self.held = []
        attempts, self.attempts = self.attempts, 0
        return attempts

    def repeat(self, work: Callable[[], None], rate: float) -> None:
        begin = time.monotonic()
        while not self.stop_asked.wait(max(0.0, begin + self.attempts / rate - time.monotonic())):
            with contextlib.suppress(OSError, HetkvError):
                work()
            self.attempts += 1

    def call(self, data: bytes) -> None:
        with socket.create_connection(self.target, 5) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            sock.settimeout(2)
            while sock.recv(4096):
                pass

    def wrong_secret(self) -> None:
        def describe() -> Description:
            raise AssertionError("nobody proved the secret")

        connect(self.address, role="sender", secret=b"not the secret of these", describe=describe, timeout=5).close()

    def foreign_frames(self) -> None:
        """A call for a stream of the honest link, and frames for its slots after it."""
        head = b"hetkvdat" + (2).to_bytes(2, "little") + bytes(2) + (64).to_bytes(4, "little")
        head += self.link.to_bytes(8, "little") + bytes(8) + random.randbytes(32)
        self.call(head + b"".join(number.to_bytes(8, "little") + random.randbytes(96) for number in range(20)))

    def anothers_request(self) -> None:
        """From a link of its own, with its own valid MAC: the honest sender's request is to be given up."""
        node, (request, epoch) = self.node, self.victim
        assert node is not None
        if not node.peers:
            node.connect(self.address)
            time.sleep(0.1)  # its first heartbeat has a number
        [peer] = node.peers
        prelude = Prelude(Type.ABORT, node.engine.next_sequence(peer.link), request_key(request), epoch)
        node.engine.inject(peer.link, wire.encode(prelude, Abort(9, "hostile"), peer.connection.data_keys.send))

    def close(self) -> None:
        self.stop()
        if self.node is not None:
            self.node.close()


class Lines(logging.Handler):
    """Counts what is logged at WARNING and above."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextlib.contextmanager
def logged() -> Iterator[Lines]:
    lines, logger = Lines(), logging.getLogger("hetkv")
    logger.addHandler(lines)
    try:
        yield lines
    finally:
        logger.removeHandler(lines)


def transfer(receiver: Receiver, sender: Child, seconds: float, number: list[int]) -> float:
    """Bytes a second of honest requests, two at a time; each is compared with what was sent."""
    begin, done = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        number[0] += 1
        request = f"honest-{number[0]}"
        handle = receiver.receive(request, list(range(BLOCKS)), TOKENS, src_instance="honest")
        sender.ask("send", request)
        handle.wait(20)
        done += 1
    return done * BYTES / (time.perf_counter() - begin)


def right(pool: KVPool) -> bool:
    return all(bool((pool.view(layer, name) == layer + 1.5).all()) for layer in range(4) for name in "kv")


def recorded_handshake(receiver_address: str) -> bytes:
    """All that an honest sender sent on its control connection."""
    with Proxy(receiver_address) as proxy:
        node = Sender(KVPool.allocate(SPEC, 4), secret=SECRET, instance="recorded", config=TransferConfig())
        node.connect(proxy.address)
        node.close()
    return bytes(proxy.sent["up"])


def measure(seconds: float, rounds: int) -> dict[str, Any]:
    """`rounds` turns of `seconds` with each kind of stranger, and as many without."""
    torch.set_num_threads(1)
    pool, number, kinds = KVPool.allocate(SPEC, BLOCKS + VICTIM, layout="hnd"), [0], {}
    with logged() as lines, Receiver(pool, secret=SECRET, instance="d0", config=TransferConfig()) as receiver:
        address = receiver.listen()
        recorded = recorded_handshake(address)
        sender = Child("sender", HonestSender, (address,))
        strangers: Child | None = None
        try:
            sender.answer()
            until(lambda: bool(receiver.peers), seconds=20)
            [honest] = receiver.peers
            strangers = Child("strangers", Strangers, (address, recorded, honest.connection.link_id, SECRET))
            strangers.answer()
            transfer(receiver, sender, seconds, number)  # warm
            for kind in KINDS:
                lines.texts.clear()
                counts: Counter[str] = Counter()
                ratios, rates = [], []
                for _ in range(rounds):
                    alone = transfer(receiver, sender, seconds / 2, number)
                    number[0] += 1
                    name = f"victim-{number[0]}"
                    waiting = receiver.receive(
                        name, list(range(BLOCKS, BLOCKS + VICTIM)), VICTIM * 16, src_instance="honest"
                    )
                    strangers.ask("start", kind, (name, receiver.engine.epoch(waiting.handle)))
                    among = transfer(receiver, sender, seconds, number)
                    counts["attempts"] += strangers.ask("stop")
                    sender.ask("send", name, VICTIM)
                    waiting.wait(20)
                    alone = (alone + transfer(receiver, sender, seconds / 2, number)) / 2
                    ratios.append(among / alone)
                    rates.append(alone)
                kinds[kind] = {
                    "ratio": round(statistics.median(ratios), 3),
                    "ratios": [round(ratio, 3) for ratio in ratios],
                    "gb_s_alone": round(statistics.median(rates) / 1e9, 3),
                    "a_second": RATES.get(kind, 0),
                    **counts,
                    "lines_logged": len(lines.texts),
                    "logged": sorted(set(lines.texts))[:4],
                    "right": right(pool),
                    "honest_link_lost": honest.lost is not None,
                }
        finally:
            for child in (sender, strangers):
                if child is not None:
                    child.close()
    return {"seconds": seconds, "rounds": rounds, "request_bytes": BYTES, "kinds": kinds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each turn")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    print(json.dumps({**environment(), "load": load, **measure(options.seconds, options.rounds)}, indent=1))


if __name__ == "__main__":
    main()
