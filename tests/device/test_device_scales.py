"""Scales in the blocks of pools on devices: what arrives is, byte for byte, what arrives between CPUs."""

from __future__ import annotations

import pytest
import torch
from msgspec.structs import replace

from hetkv.errors import UnsupportedError
from hetkv.kv.dtypes import DType
from hetkv.kv.pool import KVPool
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender
from tests.device.host import on_device
from tests.device.test_codecs import SIDES, gpu, place
from tests.device.test_gpu import to
from tests.transport.peers import SECRET, until
from tests.transport.test_scales import CONFIG, KV, Cache, cache, fill, kv_layout, transfer
from tests.transport.test_scales import place as place_pool

FN, E5, INT8, BF16 = DType.FLOAT8_E4M3FN, DType.FLOAT8_E5M2, DType.INT8, DType.BFLOAT16


@pytest.fixture(params=["host", "emulated", pytest.param("cuda", marks=gpu)])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("hetkv.transport.device.DEVICE_SCALES", True)
    if request.param == "emulated":  # it has no handles of its memory
        monkeypatch.setattr("tests.transport.test_scales.CONFIG", replace(CONFIG, window="host"))
    return str(request.param)


def pair(src: tuple[DType, str], dst: tuple[DType, str]) -> tuple[Cache, Cache]:
    source, destination = (
        cache(place_pool(KV, kv_layout(*src)), 1),
        cache(place_pool(KV, kv_layout(*dst, 32, "hnd")), 2),
    )
    fill(source)
    for tensor in destination.pool.layers[0].tensors.values():
        tensor.view(torch.uint8).fill_(0x5A)
    return source, destination


def tensors(pool: KVPool) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu().view(torch.uint8) for name, tensor in pool.layers[0].tensors.items()}


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("kinds", [
    ((FN, "token_head"), (FN, "token_head")), ((INT8, "token"), (INT8, "token")),
    ((BF16, "none"), (INT8, "token_head")), ((BF16, "none"), (FN, "group")), ((BF16, "none"), (INT8, "token")),
    ((INT8, "group"), (BF16, "none")), ((E5, "token"), (BF16, "none")),
])  # fmt: skip
def test_what_arrives_is_what_cpus_give(
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    sides: tuple[bool, bool],
    kinds: tuple[tuple[DType, str], tuple[DType, str]],
) -> None:
    """Scales that are copied, found by the sender, for each head or for all, and applied by the receiver."""
    source, want = pair(*kinds)
    saturated = transfer(source, want)
    source, got = pair(*kinds)
    if kind != "cuda":
        place(kind, monkeypatch, *sides)
    else:
        source, got = (
            Cache(to(at.pool, "cuda:0"), at.blocks) if on else at for at, on in zip((source, got), sides, strict=True)
        )
    assert transfer(source, got) == saturated
    expected = tensors(want.pool)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors(got.pool).items())


@pytest.mark.parametrize("kinds", [((FN, "static"), (FN, "token_head")), ((E5, "token_head"), (FN, "group"))])
def test_scales_that_a_device_would_find_are_rejected_by_name(
    monkeypatch: pytest.MonkeyPatch, kinds: tuple[tuple[DType, str], tuple[DType, str]]
) -> None:
    """Before any request: a payload would be read twice, and its sum certify the first reading alone."""
    monkeypatch.setattr("hetkv.transport.device.DEVICE_SCALES", True)
    on_device(monkeypatch, source=False)
    source, destination = pair(*kinds)
    with (
        Sender(source.pool, secret=SECRET, instance="p", config=CONFIG) as sender,
        Receiver(destination.pool, secret=SECRET, instance="d", config=CONFIG) as receiver,
    ):
        with pytest.raises(UnsupportedError, match="layer 0 has scales in its blocks that would be found anew"):
            receiver.connect(sender.listen())
        until(lambda: not sender.peers and not receiver.peers)
