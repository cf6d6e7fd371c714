"""Keys of slots in device memory (docs/wire-format.md, section 2): the golden vectors, and malformed ones on a link."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hetkv import errors
from hetkv.core import core
from hetkv.errors import (
    MalformedError,
    PeerLostError,
    ProtocolError,
    UnsupportedError,
)
from hetkv.reference import window_key, wire
from hetkv.reference.messages import Grant, Prelude, SlotGrant, Type
from hetkv.reference.window_key import WindowKey
from hetkv.transport.config import TransferConfig
from tests.device.host import on_device, pools
from tests.transport.peers import WAIT_S, connected, until

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "keys.json").read_text(encoding="utf-8"))
KEY = WindowKey(
    process=bytes(range(16)), backend="cuda", device=1, handle=b"/dev/shm/hetkv-none".ljust(64, b"\0"), length=16384
)


@pytest.mark.parametrize("name", VECTORS["good"])
def test_golden(name: str) -> None:
    """Both codecs, there and back."""
    vector = VECTORS["good"][name]
    data = bytes.fromhex(vector["hex"])
    key = WindowKey(
        **{
            field: bytes.fromhex(value) if field in ("process", "handle", "ucx") else value
            for field, value in vector["fields"].items()
        }
    )
    fields = msgspec.structs.asdict(key)
    assert window_key.decode(data) == key
    assert window_key.encode(key) == data
    assert core.window_key_decode(data) == (0, "", fields)
    assert core.window_key_encode(fields) == data


@pytest.mark.parametrize("name", VECTORS["bad"])
def test_malformed(name: str) -> None:
    """Both codecs, with the same error and the same words."""
    vector = VECTORS["bad"][name]
    data, error = bytes.fromhex(vector["hex"]), getattr(errors, vector["error"])
    with pytest.raises(error, match=vector["text"]) as caught:
        window_key.decode(data)
    assert core.window_key_decode(data) == (errors.to_code(error()), str(caught.value), None)


def changed(**fields: Any) -> bytes:
    return window_key.encode(msgspec.structs.replace(KEY, **fields))


BAD_KEYS = {
    "cut short": (changed()[:-1], MalformedError, "cut short"),
    "later version": (changed()[:8] + b"\2" + changed()[9:], UnsupportedError, "has version 2, this side reads 1"),
    "slot beyond the allocation": (changed(length=8192), ProtocolError, "more device memory than its handle"),
    "offset that overflows": (changed(offset=2**64 - 1), ProtocolError, "more device memory than its handle"),
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
        until(lambda: sender.path(sender.peers[0]) == "device")
        [peer] = receiver.peers
        grant = Grant((SlotGrant(9, 0, 4096, 16384, key),))
        prelude = Prelude(Type.GRANT, receiver.engine.next_sequence(peer.link))
        receiver.engine.inject(peer.link, wire.encode(prelude, grant, peer.connection.data_keys.send))
        with pytest.raises(error, match=words):
            tx.wait(WAIT_S)
        with pytest.raises(PeerLostError):
            rx.wait(WAIT_S)


def test_a_grant_of_this_process_names_only_its_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of the process is no secret, so an address with it must be one of a window."""
    on_device(monkeypatch)
    source, destination = pools()
    config = TransferConfig(slot_bytes=4096, window_bytes=4 * 4096, heartbeat_s=60, peer_timeout_s=600)
    with connected([source], [destination], config) as ([sender], [receiver]):
        tx = sender.send("r", [3, 1, 2], 40)
        receiver.receive("r", [7, 5], 40)
        until(lambda: sender.path(sender.peers[0]) == "device")
        key = changed(process=core.process_number())
        [peer] = receiver.peers
        grant = Grant((SlotGrant(9, 0, destination.base(0, "k"), 4096, key),))
        prelude = Prelude(Type.GRANT, receiver.engine.next_sequence(peer.link))
        receiver.engine.inject(peer.link, wire.encode(prelude, grant, peer.connection.data_keys.send))
        with pytest.raises(ProtocolError, match="no window of this process"):
            tx.wait(WAIT_S)
