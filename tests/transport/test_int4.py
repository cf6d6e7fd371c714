"""The codec int4: codes cross two in a byte, errors are bounded, and what does not decode ends the link."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hetkv.core import core
from hetkv.errors import MalformedError, ProtocolError
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec
from hetkv.reference.coded_part import decode_part
from hetkv.transport.config import TransferConfig
from tests.transport.peers import WAIT_S, attacked, connected
from tests.transport.stream_peer import Attack, StreamPeer, check_attack
from tests.transport.test_encryption import relayed

SPEC = KVSpec.uniform(2, 2, 64)
SLOT, MOST, GROUP = 1 << 18, 262144, 32
INT4 = TransferConfig(codec="int4", slot_bytes=SLOT, window_bytes=4 * SLOT)
VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "int4_parts.json").read_text(encoding="utf-8"))
CODED = 4
"""The kind of its frames on a stream."""


@pytest.fixture
def tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HETKV_SOCKET_DIR", "none")


# --- parts


@pytest.mark.parametrize("name", VECTORS["good"])
def test_golden_parts(name: str) -> None:
    """Two decoders, and the coder, which has one way to code a part."""
    vector = VECTORS["good"][name]
    coded, plain = bytes.fromhex(vector["coded"]), bytes.fromhex(vector["plain"])
    assert core.decode_part(coded, MOST) == decode_part(coded, MOST) == plain
    assert core.encode_part(np.frombuffer(plain, np.uint8).copy(), 3) == coded


@pytest.mark.parametrize("name", VECTORS["bad"])
def test_malformed_parts(name: str) -> None:
    vector = VECTORS["bad"][name]
    for decode in (core.decode_part, decode_part):
        with pytest.raises(MalformedError) as caught:
            decode(bytes.fromhex(vector["coded"]), MOST)
        assert vector["text"] in str(caught.value)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 300)), max_size=8), st.integers(0, 2**32), st.integers(0, 31))
def test_any_bytes_come_back(runs: list[tuple[bool, int]], seed: int, pairs: int) -> None:
    """Runs of codes and of other bytes, of lengths that are no multiples of a block."""
    rng = np.random.default_rng(seed)
    made = [rng.integers(-8, 8, 2 * n, np.int8) if codes else rng.integers(-128, 128, 2 * n, np.int8)
            for codes, n in [*runs, (False, pairs)]]  # fmt: skip
    plain = np.concatenate(made).view(np.uint8)
    coded = core.encode_part(plain, 3)
    if coded is not None:
        assert len(coded) < len(plain)
        assert core.decode_part(coded, MOST) == decode_part(coded, MOST) == plain.tobytes()
    packed = [bool((np.abs(block.view(np.int8) + 0.5) < 8).all())
              for block in plain[: len(plain) // 64 * 64].reshape(-1, 64)]  # fmt: skip
    size = 8 + -(-len(packed) // 8) + len(plain) - 32 * sum(packed)
    assert (coded is not None) == (size < len(plain))


def test_a_byte_that_is_no_code_keeps_its_block() -> None:
    for value in range(256):
        plain = np.zeros(1024, np.uint8)
        plain[100] = value
        coded = core.encode_part(plain, 3)
        assert coded is not None
        assert len(coded) == 8 + 2 + 1024 - 32 * (16 if value < 8 or value >= 248 else 15)
        assert core.decode_part(coded, MOST) == plain.tobytes()


def test_bits_that_are_flipped_never_give_other_lengths() -> None:
    plain = np.random.default_rng(1).integers(-8, 8, 4096, np.int8).view(np.uint8)
    coded = core.encode_part(plain, 3)
    assert coded is not None
    for bit in range(8 * 24):
        wrong = bytearray(coded)
        wrong[bit // 8] ^= 1 << bit % 8
        try:
            decoded = core.decode_part(bytes(wrong), MOST)
        except MalformedError:
            with pytest.raises(MalformedError):
                decode_part(bytes(wrong), MOST)
        else:
            assert len(decoded) == 4096
            assert decode_part(bytes(wrong), MOST) == decoded


# --- whole transfers


def values_of(pool: KVPool) -> torch.Tensor:
    """`[rows, groups, GROUP]`."""
    return torch.cat([pool.view(layer, name).double().reshape(-1, 2, GROUP) for layer in pool.layers for name in "kv"])


@pytest.mark.parametrize("settings", [{}, {"streams": 4}, {"encrypt": True}, {"verify": "pool"}])
def test_errors_are_bounded_by_their_group(tcp: None, settings: dict[str, Any]) -> None:
    """Half a step of a fourteenth of twice the group's largest magnitude, and bfloat16's own rounding."""
    if settings.get("encrypt") and not core.ciphers():
        pytest.skip("this build has no libsodium")
    source, destination = (KVPool.allocate(SPEC, 64) for _ in range(2))
    generator = torch.Generator().manual_seed(4)
    for layer in source.layers:
        for name in "kv":
            view = source.view(layer, name)
            sizes = torch.exp2(torch.randint(-20, 20, (*view.shape[:3], 1), generator=generator).float())
            view.copy_(torch.randn(view.shape, generator=generator) * sizes)
    config = TransferConfig(codec="int4", slot_bytes=SLOT, window_bytes=4 * SLOT, **settings)
    with connected([source], [destination], config) as ([sender], [receiver]):
        assert [node.peers[0].codec for node in (sender, receiver)] == ["int4"] * 2
        want = receiver.receive("r", list(range(64)), 1024)
        sender.send("r", list(range(64)), 1024).send_layers()
        want.wait(WAIT_S)
    there, here = values_of(destination), values_of(source)
    largest = here.abs().amax(dim=2, keepdim=True)
    error = (there - here).abs() / largest
    assert float(error.max()) <= 1 / 14 + 2**-8
    assert float(error.max()) > 1 / 16  # it is not something finer that has travelled


def test_a_third_of_the_bytes_cross(tcp: None) -> None:
    """Codes, a scale for each 32 of them, and a bit for each 64."""
    sent = {}
    for codec in ("none", "int4"):
        with relayed(codec=codec) as (relay, sender, receiver, (source, _)):
            for layer in source.layers:
                for name in "kv":
                    view = source.view(layer, name)
                    view.copy_(torch.randn(view.shape, generator=torch.Generator().manual_seed(layer)))
            want = receiver.receive("r", list(range(64)), 1024)
            sender.send("r", list(range(64)), 1024).send_layers()
            want.wait(WAIT_S)
            sent[codec] = len(relay.up[1])
    assert sent["none"] / sent["int4"] == pytest.approx(2 / (1 / 2 + 4 / 32), rel=0.02)


def test_libzstd_is_not_needed(tcp: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "has_zstd", lambda: False)
    source, destination = (KVPool.allocate(SPEC, 4) for _ in range(2))
    with connected([source], [destination], INT4) as ([sender], [_]):
        assert sender.peers[0].codec == "int4"


# --- a peer with the key


class Peer(StreamPeer):
    """One that agrees on the codec."""

    spec, config = SPEC, INT4


GOOD = bytes.fromhex(VECTORS["good"]["codes"]["coded"])
FLOATS = (256).to_bytes(4, "little") + b"\x01\0\0\0" + bytes(150)
ATTACKS: dict[str, Attack] = {
    "outside of the slot": ({"body": GOOD, "offset": SLOT - 254}, ProtocolError, "payload came for slot 0"),
    "odd offset": ({"body": GOOD, "offset": 1}, MalformedError, "odd offset"),
    "bfloat16": ({"body": FLOATS}, MalformedError, "values of kind 1, which were not agreed on"),
} | {f"vector {name}": ({"body": bytes.fromhex(bad["coded"])}, MalformedError, bad["text"])
     for name, bad in VECTORS["bad"].items()}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_what_is_wrong_ends_the_link(tcp: None, name: str) -> None:
    check_attack(Peer, CODED, ATTACKS[name])


@pytest.mark.skipif(not core.has_zstd(), reason="libzstd is not installed here")
def test_codes_on_a_link_of_another_codec(tcp: None) -> None:
    class Other(StreamPeer):
        spec, config = SPEC, TransferConfig(codec="lossless", slot_bytes=SLOT, window_bytes=4 * SLOT)

    with attacked(Other, SPEC, Other.config) as (peer, want):
        peer.frame(CODED, GOOD)
        with pytest.raises(MalformedError, match="values of kind 3, which were not agreed on"):
            want.wait(WAIT_S)
