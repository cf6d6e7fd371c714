"""The codecs fp8 and int4 where pools are on devices, over a host backend, the emulated kernels, and GPUs.

With `DEVICE_SCALES` set, which nodes do not have yet.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch

from hetkv.control import handshake
from hetkv.core import core
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import Shard
from hetkv.transport.config import TransferConfig
from hetkv.transport.device import PoolDevice
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender
from tests.device.host import on_device
from tests.device.test_gpu import GPUS, to
from tests.remap.gpu_cases import emulated_backend
from tests.transport.peers import WAIT_S
from tests.transport.test_codec import SECRET, SPEC, TOKENS, blocks, fill, make, oracle, sequence

SIDES = [(True, True), (True, False), (False, True)]
"""Which side's pool is on a device: the sender's, the receiver's."""
gpu = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="PyTorch sees no GPU")]


@pytest.fixture(params=["host", "emulated", pytest.param("cuda", marks=gpu)])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("hetkv.transport.device.DEVICE_SCALES", True)
    monkeypatch.setenv("HETKV_SOCKET_DIR", "none")
    return str(request.param)


def place(kind: str, monkeypatch: pytest.MonkeyPatch, source: bool, destination: bool) -> None:
    """Pools are on a device where that side has one: of the host's backend, or of that of the emulated kernels."""
    on_device(monkeypatch, source, destination)
    if kind != "emulated":
        return
    library = emulated_backend()
    monkeypatch.setattr(
        "tests.device.host.device", lambda index: PoolDevice(core.open_test_device(library, index), None)
    )


def moved(
    kind: str, monkeypatch: pytest.MonkeyPatch, sides: tuple[bool, bool], source: KVPool, target: KVPool, **how: Any
) -> tuple[KVPool, str, dict[str, Any]]:
    """The target after a request, the link's codec, and the sender's counters."""
    if kind != "cuda":
        place(kind, monkeypatch, *sides)
        here, there = source, target
    else:
        here, there = (to(pool, "cuda:0") if on else pool for pool, on in zip((source, target), sides, strict=True))
    if kind == "emulated":
        how["window"] = "host"  # it has no handles of its memory
    config = TransferConfig(slot_bytes=1 << 17, **how)
    with ExitStack() as stack:
        sender = stack.enter_context(Sender(here, secret=SECRET, instance="p", config=config))
        receiver = stack.enter_context(Receiver(there, secret=SECRET, instance="d", config=config))
        receiver.connect(sender.listen())
        handle = receiver.receive("r", blocks(64), TOKENS)
        sender.send("r", blocks(16), TOKENS).send_layers()
        handle.wait(WAIT_S)
        codec, stats = receiver.peers[0].codec, sender.stats()
    return there if kind != "cuda" else to(there, "cpu"), codec, stats


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize(("src", "dst"), [("bf16", "bf16"), ("fp32", "fp16"), ("fp16", "fp32")])
@pytest.mark.parametrize("codec", ["fp8", "int4"])
@pytest.mark.parametrize("layout", ["hnd", "rocm"])
def test_values_are_those_that_cpus_give(
    kind: str, monkeypatch: pytest.MonkeyPatch, sides: tuple[bool, bool], src: str, dst: str, codec: str, layout: str
) -> None:
    """Between devices, and from a device to a CPU and back: every bit, also of what is no number."""
    if kind == "host" and (layout == "rocm" or (src, dst) == ("fp16", "fp32")):
        pytest.skip("its one kernel reads any map and dtype alike")
    source, target = make(src, "nhd", 16, Shard.whole(SPEC)), make(dst, layout, 64, Shard.whole(SPEC))
    fill(source)
    there, used, stats = moved(kind, monkeypatch, sides, source, target, codec=codec)
    assert used == codec
    for layer, name in [(0, "k"), (0, "v"), (1, "k"), (1, "v"), (2, "latent"), (2, "rope")]:
        want = oracle([source], target, layer, name, codec)
        assert torch.equal(sequence(there, 64, layer, name).flatten(2), want), (layer, name)  # packs too
    assert torch.equal(sequence(there, 64, 3, "state"), sequence(source, 16, 3, "state"))
    plain = sum(
        (1 if SPEC.layers[index].kind == "state" else TOKENS) * part.heads * part.channels * part.dtype.itemsize
        for index, layer in source.layers.items()
        for part in layer.layout.segments.values()
    )
    assert stats["payload_bytes"] < 0.65 * plain


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("codec", ["fp8", "int4"])
@pytest.mark.parametrize("settings", [{"verify": "pool"}, {"streams": 3}])
def test_with_other_settings(
    kind: str, monkeypatch: pytest.MonkeyPatch, sides: tuple[bool, bool], codec: str, settings: dict[str, Any]
) -> None:
    source, target = make("bf16", "nhd", 16, Shard.whole(SPEC)), make("bf16", "hnd", 64, Shard.whole(SPEC))
    fill(source)
    there, used, _ = moved(kind, monkeypatch, sides, source, target, codec=codec, **settings)
    assert used == codec
    for layer, name in [(0, "k"), (1, "v"), (2, "latent")]:
        assert torch.equal(sequence(there, 64, layer, name), oracle([source], target, layer, name, codec))


@pytest.mark.parametrize("codec", ["fp8", "int4"])
def test_a_peer_before_devices_had_scales(kind: str, monkeypatch: pytest.MonkeyPatch, codec: str) -> None:
    """The link stands, and every bit arrives."""
    monkeypatch.setattr(handshake, "MINOR", 6)
    source, target = make("bf16", "nhd", 16, Shard.whole(SPEC)), make("bf16", "hnd", 64, Shard.whole(SPEC))
    fill(source)
    there, used, _ = moved(kind, monkeypatch, (True, False), source, target, codec=codec)
    assert used == "none"
    for layer, at in there.layers.items():
        for name in at.layout.segments:
            assert torch.equal(sequence(there, 64, layer, name), sequence(source, 16, layer, name)), (layer, name)
