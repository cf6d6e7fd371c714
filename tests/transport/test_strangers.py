"""Whoever reaches a port without the secret writes nothing, while transfers of others go on."""

from __future__ import annotations

import random
import socket
import struct
import threading

import pytest

from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec
from hetkv.transport.config import TransferConfig
from tests.transport import strangers
from tests.transport.peers import check_transfer, connected, randomise

SPEC = KVSpec.uniform(2, 2, 64)
CONFIG = TransferConfig(slot_bytes=16384, window_bytes=4 * 16384, streams=2)


def attack(address: str, link: int, seed: int) -> None:
    """Calls for a link that exists and frames with payloads for its slots, random bytes, or both."""
    host, _, port = address.rpartition(":")
    dice = random.Random(seed)
    frames = b"".join(
        struct.pack("<IB3xQIIQQ", 64, 2, number, dice.randrange(4), dice.randrange(3), 0, dice.getrandbits(64))
        + b"\xee" * 64
        for number in range(64)
    )
    call = b"hetkvdat" + struct.pack("<HHIQH6x", 2, 0, 64, link, dice.randrange(2)) + dice.randbytes(32)
    for data in (frames, call + frames, b"hetkvdat" + dice.randbytes(500), dice.randbytes(4000)):
        try:
            with socket.create_connection((host, int(port)), 5) as sock:
                sock.sendall(data)
                sock.settimeout(0.05)
                while sock.recv(4096):
                    pass
        except OSError:
            continue


@pytest.mark.parametrize("rounds", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_a_stranger_writes_nothing(monkeypatch: pytest.MonkeyPatch, rounds: int) -> None:
    """Every byte of the receiver's pool is what the transfers say, and no link is lost."""
    monkeypatch.setenv("HETKV_SOCKET_DIR", "none")
    source, destination = randomise(KVPool.allocate(SPEC, 256), 1), randomise(KVPool.allocate(SPEC, 256), 2)
    with connected([source], [destination], CONFIG) as ([sender], [receiver]):
        address, link = receiver.peers[0].address, receiver.peers[0].connection.link_id
        for number in range(rounds):
            thread = threading.Thread(target=attack, args=(address, link, number))
            thread.start()
            check_transfer(source, destination, sender, receiver, 3001, request=f"{number}", seed=number)
            thread.join()
        assert sender.path(sender.peers[0]) == "stream"
        assert receiver.peers[0].lost is sender.peers[0].lost is None


def test_strangers_of_each_kind_are_rejected_and_logged_once() -> None:
    """Among them honest requests arrive; `python -m tests.transport.strangers` says at what speed."""
    found = strangers.measure(0.5, 1)["kinds"]
    assert set(found) == set(strangers.KINDS)
    for kind, seen in found.items():
        assert seen["attempts"] >= (strangers.HALF_OPEN if kind == "half open" else 1), kind
        assert seen["right"], kind
        assert not seen["honest_link_lost"], kind
        # A kind of error is logged once a minute and host: what an earlier kind of stranger met is not logged again.
        assert seen["lines_logged"] <= 1, (kind, seen["logged"])
    assert found["half open"]["lines_logged"] == found["wrong secret"]["lines_logged"] == 1
