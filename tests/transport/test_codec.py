"""Lossy codecs on the wire: used where both sides name one and payloads go over TCP, and equal to the oracle then."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from hetkv.control.conversion import Conversion
from hetkv.control.description import Description, decode, encode, for_minor
from hetkv.errors import InputError
from hetkv.kv.dtypes import DType
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec, LayerSpec, Shard
from hetkv.transport.config import TransferConfig
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender
from tests.transport.deployments import travel
from tests.transport.peers import WAIT_S

SECRET = b"a secret of tests"
TOKENS = 70
BLOCKS = {16: [5, 0, 3, 1, 4], 64: [2, 0]}
SPEC = KVSpec(
    (
        LayerSpec.kv(4, 128),
        LayerSpec.kv(4, 256, 64),
        LayerSpec.latent(512, 64, group=1),
        LayerSpec.state(4, 40, group=2),
        LayerSpec.kv(4, 16, group=3),
    )
)
"""The last one's heads are too short for the codecs."""
HOW = {
    "fp8": lambda channels: Conversion(DType.FLOAT8_E4M3FN, None, None, max(channels // 128, 1), "quantise", "apply"),
    "int4": lambda channels: Conversion(DType.INT8, None, None, channels // 32, "quantise", "apply", largest=7.0),
}
"""How a segment of so many channels travels."""


def make(dtype: str, layout: str, size: int, shard: Shard) -> KVPool:
    return KVPool.allocate(
        SPEC, [8, 8, 1, 8], dtype=dtype, layout=layout, block_size=[size, size, 1, size], shard=shard
    )


def blocks(size: int) -> list[list[int]]:
    return [BLOCKS[size], BLOCKS[size], [0], BLOCKS[size]]


def fill(pool: KVPool) -> None:
    """Equal values for equal global heads, of very different sizes; a few are no numbers."""
    for layer in pool.layers:
        for name in pool.layers[layer].layout.segments:
            view, heads = pool.view(layer, name), pool.shard.heads[layer]
            generator = torch.Generator().manual_seed(layer)
            whole = torch.randn(*view.shape[:2], 4, view.shape[3], generator=generator)
            whole *= torch.exp2(torch.randint(-20, 10, (*view.shape[:2], 4, 1), generator=generator).float())
            whole[0, -1, :, 5], whole[0, 0, :, 6] = float("nan"), float("inf")
            if view.dtype == torch.uint8:
                whole = torch.randint(0, 255, whole.shape, generator=generator)
            view.copy_(whole[:, :, slice(*heads)])


def sequence(pool: KVPool, size: int, layer: int, name: str) -> torch.Tensor:
    """`[heads, tokens, channels]` of the request, as integers."""
    view = pool.view(layer, name)
    count = 1 if SPEC.layers[layer].kind == "state" else TOKENS
    table = torch.tensor(blocks(size)[SPEC.group_of(layer)])
    values = view[table].reshape(-1, *view.shape[2:])[:count].transpose(0, 1).contiguous()
    return values.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[values.element_size()])


def transfer(
    stack: ExitStack, source: list[KVPool], target: KVPool, sizes: tuple[int, int], codecs: tuple[str, str]
) -> list[str]:
    """Move the request from all ranks of the source; returns the codecs of the receiver's links."""
    shards = [pool.shard for pool in source]
    configs = [TransferConfig(codec=codec, slot_bytes=1 << 17) for codec in codecs]
    senders = [
        stack.enter_context(
            Sender(pool, secret=SECRET, instance="p", rank=rank, instance_shards=shards, config=configs[0])
        )
        for rank, pool in enumerate(source)
    ]
    receiver = stack.enter_context(Receiver(target, secret=SECRET, instance="d", config=configs[1]))
    receiver.connect([sender.listen() for sender in senders])
    handle = receiver.receive("r", blocks(sizes[1]), TOKENS)
    for sender in senders:
        sender.send("r", blocks(sizes[0]), TOKENS).send_layers()
    handle.wait(WAIT_S)
    return [peer.codec for peer in receiver.peers]


def oracle(pools: list[KVPool], target: KVPool, layer: int, name: str, codec: str) -> torch.Tensor:
    """What the target must hold by the oracle's conversions, `[heads, tokens, channels]` as integers."""
    made = []
    for pool in pools if SPEC.layers[layer].kind != "latent" else pools[:1]:
        here, there = (side.layers[layer].layout.segments[name] for side in (pool, target))
        codes = sequence(pool, 16, layer, name)
        made.append(travel(codes, None, here, there, HOW[codec](here.channels))[0])
    return torch.cat(made)


@pytest.mark.parametrize(
    ("codec", "tp", "src", "dst"),
    [
        ("fp8", 1, "bf16", "bf16"), ("fp8", 2, "fp16", "fp32"), ("fp8", 2, "fp32", "bf16"),
        ("int4", 2, "bf16", "bf16"), ("int4", 1, "fp16", "fp32"), ("int4", 1, "fp32", "bf16"),
    ],
)  # fmt: skip
def test_values_are_what_the_oracle_says(
    codec: str, src: str, dst: str, tp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HETKV_SOCKET_DIR", "none")
    source = [make(src, "nhd", 16, shard) for shard in Shard.ranks(SPEC, tp=tp)]
    target = make(dst, "hnd", 64, Shard.whole(SPEC))
    for pool in source:
        fill(pool)
    with ExitStack() as stack:
        assert transfer(stack, source, target, (16, 64), (codec, codec)) == [codec] * tp
    for layer, name in [(0, "k"), (0, "v"), (1, "k"), (1, "v"), (2, "latent"), (2, "rope")]:
        assert torch.equal(sequence(target, 64, layer, name), oracle(source, target, layer, name, codec)), (layer, name)
    state = torch.cat([sequence(pool, 16, 3, "state") for pool in source])
    assert torch.equal(sequence(target, 64, 3, "state"), state)
    if src == dst:  # heads too short for the codec move bit for bit
        assert torch.equal(sequence(target, 64, 4, "k"), torch.cat([sequence(pool, 16, 4, "k") for pool in source]))


@pytest.mark.parametrize(
    ("codecs", "sockets"),
    [
        (("fp8", "none"), "none"), (("none", "fp8"), "none"), (("fp8", "fp8"), ""), (("int4", "none"), "none"),
        (("none", "int4"), "none"), (("int4", "fp8"), "none"), (("int4", "auto"), "none"), (("int4", "int4"), ""),
    ],
)  # fmt: skip
def test_without_the_codec_every_bit_arrives(
    codecs: tuple[str, str], sockets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One side alone names it, also where the other names another one; or slots are shared memory."""
    monkeypatch.setenv("HETKV_SOCKET_DIR", sockets)
    source, target = make("bf16", "nhd", 16, Shard.whole(SPEC)), make("bf16", "hnd", 64, Shard.whole(SPEC))
    fill(source)
    with ExitStack() as stack:
        assert transfer(stack, [source], target, (16, 64), codecs) == ["none"]
    for layer, at in target.layers.items():
        for name in at.layout.segments:
            assert torch.equal(sequence(target, 64, layer, name), sequence(source, 16, layer, name)), (layer, name)


def test_half_of_the_bytes_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HETKV_SOCKET_DIR", "none")
    spec = KVSpec.uniform(2, 8, 128)
    sent = {}
    for codec in ("none", "fp8"):
        pools = [KVPool.allocate(spec, 4), KVPool.allocate(spec, 4)]
        config = TransferConfig(codec=codec)
        with Sender(pools[0], secret=SECRET, instance="p", config=config) as sender:
            with Receiver(pools[1], secret=SECRET, instance="d", config=config) as receiver:
                receiver.connect(sender.listen())
                handle = receiver.receive("r", [0, 1, 2, 3], 64)
                sender.send("r", [0, 1, 2, 3], 64).send_layers()
                handle.wait(WAIT_S)
                sent[codec] = receiver.stats()["payload_bytes"]
    assert sent["none"] == 2 * 64 * 8 * 128 * 2 * 2
    assert sent["none"] / sent["fp8"] == pytest.approx(2 / (1 + 4 / 128))


def test_codecs_travel_from_minor_5_on() -> None:
    with Sender(
        KVPool.allocate(SPEC, [1] * 4), secret=SECRET, instance="p", config=TransferConfig(codec="fp8")
    ) as node:
        mine = node.description
    assert mine.codecs == ("fp8",)
    heard = decode(encode(for_minor(mine, 5)), "peer")
    assert isinstance(heard, Description)
    assert heard.codecs == ("fp8",)
    assert b"codecs" not in encode(for_minor(mine, 4))


def test_an_unknown_codec_is_rejected_by_name() -> None:
    with pytest.raises(InputError, match="codec is 'zip'"):
        TransferConfig(codec="zip")  # type: ignore[arg-type]
