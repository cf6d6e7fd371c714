"""The codec lossless on the wire: used over TCP alone, every bit arrives, and what does not decode ends the link."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hetkv.core import core
from hetkv.errors import InputError, MalformedError, ProtocolError
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec
from hetkv.reference.coded_part import decode_part
from hetkv.transport.config import TransferConfig
from hetkv.transport.sender import Sender
from tests.transport.peers import SECRET, WAIT_S, attacked, check_transfer, connected, randomise, same_bytes
from tests.transport.stream_peer import Attack, StreamPeer, check_attack

SPEC = KVSpec.uniform(2, 2, 64)
SLOT = 1 << 18
LOSSLESS = TransferConfig(codec="lossless", slot_bytes=SLOT, window_bytes=4 * SLOT)
VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "coded_parts.json").read_text(encoding="utf-8"))
MOST = 262144

pytestmark = pytest.mark.skipif(not core.has_zstd(), reason="libzstd is not installed here")


@pytest.fixture
def tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HETKV_SOCKET_DIR", "none")


# --- whole transfers


def every_bit_pattern(pool: KVPool) -> None:
    """All 2^16 values in each layer, next to values that an entropy coder makes small."""
    for memory in pool.layers.values():
        for tensor in memory.tensors.values():
            values = tensor.view(torch.int16).flatten()
            small = torch.randn(values.numel(), generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
            values.copy_(small.view(torch.int16))
            values[: 1 << 16] = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)


@pytest.mark.parametrize("encrypt", [False, True])
@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_all_values_arrive_bit_for_bit(tcp: None, dtype: str, streams: int, encrypt: bool) -> None:
    if encrypt and not core.ciphers():
        pytest.skip("this build has no libsodium")
    source, destination = (KVPool.allocate(SPEC, 128, dtype=dtype) for _ in range(2))
    every_bit_pattern(source)
    config = TransferConfig(codec="lossless", streams=streams, encrypt=encrypt)
    with connected([source], [destination], config) as ([sender], [receiver]):
        assert sender.peers[0].codec == receiver.peers[0].codec == "lossless"
        blocks = list(range(128))
        want = receiver.receive("all", blocks, 2048)
        sender.send("all", blocks, 2048).send_layers()
        want.wait(WAIT_S)
        assert same_bytes(source, destination)


@pytest.mark.parametrize("slot", [16384, 1 << 20])
def test_random_blocks_land_where_they_belong(tcp: None, slot: int) -> None:
    """Random bytes: parts that do not become smaller travel as they are, between parts that do."""
    source, destination = randomise(KVPool.allocate(SPEC, 256), 1), randomise(KVPool.allocate(SPEC, 256), 2)
    for index, memory in source.layers.items():
        for tensor in memory.tensors.values():
            if index == 0:
                tensor.view(torch.int16).copy_(torch.randn(tensor.numel() // 2).to(torch.bfloat16).view(torch.int16)
                                               .reshape(tensor.view(torch.int16).shape))  # fmt: skip
    config = TransferConfig(codec="lossless", slot_bytes=slot, window_bytes=4 * slot)
    with connected([source], [destination], config) as ([sender], [receiver]):
        for number in range(3):
            check_transfer(source, destination, sender, receiver, 3001, request=f"{number}", seed=number)


@pytest.mark.parametrize(
    ("codecs", "expected"),
    [(("lossless", "lossless"), "lossless"), (("auto", "lossless"), "lossless"), (("lossless", "auto"), "lossless"),
     (("lossless", "none"), "none"), (("none", "auto"), "none"), (("fp8", "lossless"), "none")],
)  # fmt: skip
def test_both_sides_name_it(tcp: None, codecs: tuple[str, str], expected: str) -> None:
    source, destination = randomise(KVPool.allocate(SPEC, 16), 1), randomise(KVPool.allocate(SPEC, 16), 2)
    configs = [TransferConfig(codec=codec) for codec in codecs]  # type: ignore[arg-type]
    with connected([source], [destination], *configs) as ([sender], [receiver]):
        assert [node.peers[0].codec for node in (sender, receiver)] == [expected] * 2
        check_transfer(source, destination, sender, receiver, 100)


def test_on_shared_memory_it_is_not_chosen() -> None:
    source, destination = randomise(KVPool.allocate(SPEC, 16), 1), randomise(KVPool.allocate(SPEC, 16), 2)
    with connected([source], [destination], LOSSLESS) as ([sender], [receiver]):
        assert (sender.peers[0].kind, sender.path(sender.peers[0])) != ("tcp", "stream")
        assert [node.peers[0].codec for node in (sender, receiver)] == ["none"] * 2
        check_transfer(source, destination, sender, receiver, 100)


@pytest.mark.parametrize(("dtype", "expected"), [("fp32", "none"), ("fp8_e4m3", "none"), ("fp16", "lossless")])
def test_only_values_of_16_bits_are_coded(tcp: None, dtype: str, expected: str) -> None:
    pools = [randomise(KVPool.allocate(SPEC, 16, dtype=dtype), seed) for seed in (1, 2)]
    with connected([pools[0]], [pools[1]], LOSSLESS) as ([sender], [receiver]):
        assert sender.peers[0].codec == receiver.peers[0].codec == expected


def test_without_libzstd(tcp: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pools = [randomise(KVPool.allocate(SPEC, 16), seed) for seed in (1, 2)]
    monkeypatch.setattr(core, "has_zstd", lambda: False)
    with pytest.raises(InputError, match=r"libzstd\.so\.1 is not installed"):
        Sender(pools[0], secret=SECRET, instance="p", config=LOSSLESS)
    with connected([pools[0]], [pools[1]], TransferConfig(codec="auto")) as ([sender], [receiver]):
        assert sender.peers[0].codec == "none"
        check_transfer(pools[0], pools[1], sender, receiver, 100)


# --- coded parts


def aligned(data: bytes) -> Any:
    return np.frombuffer(data, np.uint8).copy()


@pytest.mark.parametrize("name", VECTORS["good"])
def test_golden_parts(name: str) -> None:
    vector = VECTORS["good"][name]
    coded, plain = bytes.fromhex(vector["coded"]), bytes.fromhex(vector["plain"])
    assert core.decode_part(coded, MOST) == decode_part(coded, MOST) == plain


@pytest.mark.parametrize("name", VECTORS["bad"])
def test_malformed_parts(name: str) -> None:
    """Both implementations reject them, with one text."""
    vector = VECTORS["bad"][name]
    for decode in (core.decode_part, decode_part):
        with pytest.raises(MalformedError) as caught:
            decode(bytes.fromhex(vector["coded"]), MOST)
        assert vector["text"] in str(caught.value)


@pytest.mark.parametrize("values", [1, 2])
def test_every_value_of_16_bits(values: int) -> None:
    """Each in a part that becomes smaller, so that it is really coded; both decoders give it back."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    base = {1: 0x3F80, 2: 0x3C00}[values]
    for block in patterns.reshape(64, 1024):
        plain = np.full(16384, base, np.uint16)
        plain[::16] = block
        coded = core.encode_part(plain.view(np.uint8), values)
        assert coded is not None
        assert core.decode_part(coded, MOST) == plain.tobytes()
        assert decode_part(coded, MOST) == plain.tobytes()


def test_sizes_and_what_cannot_be_coded() -> None:
    assert core.encode_part(aligned(os.urandom(65536)), 1) is None
    assert core.encode_part(aligned(b""), 1) is None
    for size in (2, 8, 16, 18, 62, 64, 1000, 65534, 262144):
        coded = core.encode_part(np.zeros(size, np.uint8), 2)
        assert coded is None or (len(coded) < size and core.decode_part(coded, MOST) == bytes(size))


def test_bits_that_are_flipped_never_give_other_lengths() -> None:
    """A flipped part is rejected, or decodes to as many bytes, of which the frame's checksum then tells."""
    plain = torch.randn(2048, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16).view(torch.int16).numpy()
    coded = core.encode_part(plain.view(np.uint8), 1)
    assert coded is not None
    for bit in itertools.chain(range(64), range(64, 8 * len(coded), 37)):
        wrong = bytearray(coded)
        wrong[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(MalformedError):
            assert len(core.decode_part(bytes(wrong), MOST)) == 4096


# --- a peer with the key


class Peer(StreamPeer):
    """One that agrees on the codec."""

    spec, config = SPEC, LOSSLESS


class PlainPeer(Peer):
    """One that has not agreed on it."""

    config = TransferConfig(slot_bytes=SLOT, window_bytes=4 * SLOT)


CODED = 4
"""The kind of its frames."""
GOOD = bytes.fromhex(VECTORS["good"]["bfloat16"]["coded"])
PLAIN_BYTES = len(VECTORS["good"]["bfloat16"]["plain"]) // 2
ATTACKS: dict[str, Attack] = {
    "outside of the slot": ({"body": GOOD, "offset": SLOT - PLAIN_BYTES + 2}, ProtocolError, "payload came for slot 0"),
    "another slot": ({"body": GOOD, "slot": 9}, ProtocolError, "payload came for slot 9"),
    "odd offset": ({"body": GOOD, "offset": 1}, MalformedError, "odd offset"),
    "too long": ({"body": b"", "length": 262145}, MalformedError, "frame of kind 4 with 262145 bytes"),
    "no bytes": ({"body": b""}, MalformedError, "has 0 bytes"),
    "damaged": ({"body": GOOD[:-4] + b"\xff" * 4}, MalformedError, "does not decode"),
} | {f"vector {name}": ({"body": bytes.fromhex(bad["coded"])}, MalformedError, bad["text"])
     for name, bad in VECTORS["bad"].items()}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_what_is_wrong_ends_the_link(tcp: None, name: str) -> None:
    check_attack(Peer, CODED, ATTACKS[name])


def test_twice_the_same_part(tcp: None) -> None:
    with attacked(Peer, SPEC, LOSSLESS) as (peer, want):
        peer.sock.sendall(peer.framed(CODED, GOOD) + peer.framed(CODED, GOOD))
        with pytest.raises(MalformedError, match="came twice"):
            want.wait(WAIT_S)


def test_coded_parts_that_were_not_agreed_on(tcp: None) -> None:
    with attacked(PlainPeer, SPEC, LOSSLESS) as (peer, want):
        peer.frame(CODED, GOOD)
        with pytest.raises(MalformedError, match="frame of kind 4"):
            want.wait(WAIT_S)


# --- the choice by measured rates


@pytest.fixture(scope="module")
def choice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that runs the choice against a link and a coder of given rates."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    program = tmp_path_factory.mktemp("coding") / "coding"
    root = Path(__file__).parents[2]
    sources = [root / "tests" / "cpp" / "coding.cpp", root / "csrc" / "transport" / "coding.cpp"]
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{root / 'csrc'}"]
    subprocess.run(["g++", *flags, *map(str, sources), "-o", str(program)], check=True)
    return program


def chosen(program: Path, *phases: tuple[float, float, float, float]) -> list[tuple[float, float]]:
    """Of each phase the share of bytes that was coded, and what got through against no coding."""
    arguments = [f"{value:g}" for phase in phases for value in phase]
    lines = subprocess.run([str(program), *arguments], check=True, capture_output=True, text=True).stdout.splitlines()
    return [(float(share), float(gain)) for share, gain in map(str.split, lines)]


GBIT = 0.125e9


@pytest.mark.parametrize(
    ("link", "coder", "ratio", "receiver", "coded"),
    [
        (0.1 * GBIT, 0.5e9, 1.49, 0, True),
        (GBIT, 0.5e9, 1.49, 0, True),
        (GBIT, 0.5e9, 1.18, 0, True),
        (GBIT, 0.5e9, 1.02, 0, False),  # nothing to gain
        (GBIT, 0.1e9, 1.49, 0, False),  # the coder is slower than the link
        (10 * GBIT, 0.5e9, 1.49, 0, False),
        (100 * GBIT, 0.5e9, 1.49, 0, False),
        (10 * GBIT, 0.5e9, 1.49, 0.2e9, False),  # the receiver is what bounds, and decoding makes it slower
    ],
)
def test_it_is_never_slower_than_without(
    choice: Path, link: float, coder: float, ratio: float, receiver: float, coded: bool
) -> None:
    [(share, gain)] = chosen(choice, (link, coder, ratio, receiver))
    assert share > 0.95 if coded else share < 0.15
    assert gain > 0.97 * ratio if coded else gain > 0.97


def test_the_choice_follows_the_link(choice: Path) -> None:
    slow, fast = (GBIT, 0.5e9, 1.49, 0.0), (25 * GBIT, 0.5e9, 1.49, 0.0)
    for (share, gain), coded in zip(chosen(choice, slow, fast, slow, fast), (True, False) * 2, strict=True):
        assert share > 0.9 if coded else share < 0.06
        assert gain > 0.9 * 1.49 if coded else gain > 0.97
