"""Keys of slots in device memory (docs/wire-format.md, section 2): the golden vectors, and malformed ones on a link."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from device_host import on_device, pools
from transfer_peers import WAIT_S, connected, until

from hetkv import wire
from hetkv.config import TransferConfig
from hetkv.core import core
from hetkv.errors import (
    MalformedError,
    PeerLostError,
    ProtocolError,
    TransportError,
    UnsupportedError,
)
from hetkv.wire_types import Grant, Prelude, SlotGrant, Type


def window_key(**changes: Any) -> bytes:
    """The key of a slot in device memory (docs/wire-format.md, section 2), as changed."""
    fields = {
        "magic": b"hetkvwin", "version": 1, "ucx": 0, "process": bytes(range(16)), "backend": b"cuda", "device": 1,
        "reserved": 0, "handle": b"/dev/shm/hetkv-none", "offset": 0, "length": 16384,
    }  # fmt: skip
    return struct.pack("<8sII16s16sII64sQQ", *{**fields, **changes}.values())


BAD_KEYS = {
    "cut short": (window_key()[:-1], MalformedError, "cut short"),
    "longer than it says": (window_key() + bytes(8), MalformedError, "another length"),
    "later version": (window_key(version=2), UnsupportedError, "has version 2, this side reads 1"),
    "reserved bytes": (window_key(reserved=1), MalformedError, "must be zero"),
    "name without an end": (window_key(backend=b"c" * 16), MalformedError, "must be zero"),
    "slot beyond the allocation": (window_key(length=8192), ProtocolError, "more device memory than its handle"),
    "offset that overflows": (window_key(offset=2**64 - 1), ProtocolError, "more device memory than its handle"),
    "handle that does not open": (window_key(), TransportError, "cannot store into and UCX cannot reach"),
    "another vendor's": (window_key(backend=b"hip"), TransportError, "cannot store into and UCX cannot reach"),
}


@pytest.mark.parametrize("name", BAD_KEYS)
def test_bad_keys_end_the_link(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    key, error, words = BAD_KEYS[name]
    on_device(monkeypatch)
    source, destination = pools()
    config = TransferConfig(slot_bytes=4096, window_bytes=4 * 4096, heartbeat_s=60, peer_timeout_s=600)
    with connected([source], [destination], config) as ([sender], [receiver]):
        tx = sender.send("r", [3, 1, 2], 40)
        rx = receiver.receive("r", [7, 5], 40)
        until(lambda: sender.reach(sender.peers[0]) == "peer")
        [peer] = receiver.peers
        grant = Grant((SlotGrant(9, 0, 4096, 16384, key),))
        prelude = Prelude(Type.GRANT, receiver.engine.next_sequence(peer.link))
        receiver.engine.inject(peer.link, wire.encode(prelude, grant, peer.connection.data_keys.send))
        with pytest.raises(error, match=words):
            tx.wait(WAIT_S)
        with pytest.raises(PeerLostError):
            rx.wait(WAIT_S)


def test_a_grant_of_this_process_names_only_its_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of the process is no secret, so an address beside it must be one of a window."""
    on_device(monkeypatch)
    source, destination = pools()
    config = TransferConfig(slot_bytes=4096, window_bytes=4 * 4096, heartbeat_s=60, peer_timeout_s=600)
    with connected([source], [destination], config) as ([sender], [receiver]):
        tx = sender.send("r", [3, 1, 2], 40)
        receiver.receive("r", [7, 5], 40)
        until(lambda: sender.reach(sender.peers[0]) == "peer")
        key = window_key(process=core.process_number())
        [peer] = receiver.peers
        grant = Grant((SlotGrant(9, 0, destination.base(0, "k"), 4096, key),))
        prelude = Prelude(Type.GRANT, receiver.engine.next_sequence(peer.link))
        receiver.engine.inject(peer.link, wire.encode(prelude, grant, peer.connection.data_keys.send))
        with pytest.raises(ProtocolError, match="no window of this process"):
            tx.wait(WAIT_S)
