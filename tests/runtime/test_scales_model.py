"""What fp8, int8 and int4 on the wire do to the model: KL of the next token against bf16, on the demo checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec
import pytest
import torch

from hetkv.kv.allocate import allocate
from hetkv.kv.dtypes import DType
from hetkv.kv.layer import LayerMemory
from hetkv.kv.layout import KVLayout
from hetkv.kv.pool import KVPool
from hetkv.kv.scale import ScaleLayout
from hetkv.kv.spec import Shard
from hetkv.runtime import Decoder, TextTokenizer
from hetkv.runtime.demo import MODEL, PROMPT
from hetkv.runtime.generation import prefill
from hetkv.runtime.paged import Pages
from hetkv.transport.config import TransferConfig
from tests.transport.peers import WAIT_S, connected

BLOCK, FOLLOWED = 16, 12
LIMIT = 0.02
"""Most nats that the distribution of the next token may move, on average over the tokens that follow the prompt."""


def static(layout: KVLayout, full: KVPool, layer: int, per_head: bool) -> KVLayout:
    """Scales from the largest magnitudes that the layer's cache holds: calibration on the prompt itself."""
    parts = {}
    for name, part in layout.segments.items():
        largest = torch.finfo(part.dtype.torch).max
        amax = full.view(layer, name).float().abs().amax(dim=(0, 1, 3))
        scales = (amax if per_head else amax.max()[None]) / largest
        parts[name] = msgspec.structs.replace(part, scale=ScaleLayout(tuple(scales.tolist())))
    return msgspec.structs.replace(layout, segments=parts)


KINDS: dict[str, Callable[[KVLayout, KVPool, int], KVLayout]] = {
    "tensor": lambda layout, full, layer: static(layout, full, layer, False),
    "head": lambda layout, full, layer: static(layout, full, layer, True),
    "token_head": lambda layout, full, layer: layout.with_scales("token_head"),
    "group": lambda layout, full, layer: layout.with_scales("token_head", 16),
}


def move(source: KVPool, destination: KVPool, blocks: list[int], tokens: int) -> int:
    """The wire's payload bytes of one request in the same blocks of both pools."""
    with connected([source], [destination]) as ([sender], [receiver]):
        receiving = receiver.receive("r", blocks, tokens)
        sender.send("r", blocks, tokens).send_layers()
        receiving.wait(WAIT_S)
        return int(sender.stats()["payload_bytes"])


@pytest.fixture(scope="module")
def model() -> Decoder:
    return Decoder.load(MODEL, torch.float32)


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return TextTokenizer.load(MODEL).encode(PROMPT)


def follow(model: Decoder, pages: Pages, tokens: list[int], start: int) -> torch.Tensor:
    """Log probabilities `[FOLLOWED, vocab]` after each token from `start` on, with the text itself as input."""
    steps = [model.decode_step(tokens[at], at, pages) for at in range(start, start + FOLLOWED)]
    return torch.stack(steps).float().log_softmax(dim=1)


@pytest.fixture(scope="module")
def prefilled(model: Decoder, prompt: list[int]) -> tuple[KVPool, torch.Tensor]:
    """A bf16 pool with the prompt but its last tokens, and what the model predicts after each of those."""
    blocks = list(range(-(-len(prompt) // BLOCK)))
    full = KVPool.allocate(model.kv_spec, len(blocks), block_size=BLOCK)
    start = len(prompt) - FOLLOWED
    prefill(model, prompt[:start], Pages(full, [blocks]))
    return full, follow(model, Pages(full, [blocks]), prompt, start)


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (DType.FLOAT8_E4M3FN, "tensor"),
        (DType.FLOAT8_E4M3FN, "head"),
        (DType.FLOAT8_E4M3FN, "token_head"),
        (DType.FLOAT8_E4M3FN, "group"),
        (DType.INT8, "token_head"),
    ],
    ids=lambda value: getattr(value, "value", value),
)
def test_next_token_kl(
    model: Decoder,
    prompt: list[int],
    prefilled: tuple[KVPool, torch.Tensor],
    dtype: DType,
    kind: str,
    record_property: Callable[[str, object], None],
) -> None:
    """bf16 to the narrow pool and back: the wire carries the narrow dtype both times, values are rounded once."""
    full, want = prefilled
    start = len(prompt) - FOLLOWED
    blocks = list(range(-(-len(prompt) // BLOCK)))
    back = KVPool.allocate(model.kv_spec, len(blocks), block_size=BLOCK)
    layers = {}
    for index, layer in enumerate(model.kv_spec.layers):
        layout = KVLayout.preset("hnd", layer, layer.segments[0].heads, BLOCK, dtype)
        made = KINDS[kind](layout, full, index)
        layers[index] = LayerMemory(made, len(blocks), allocate(made, len(blocks), "cpu"))
    narrow = KVPool(model.kv_spec, Shard.whole(model.kv_spec), layers)
    for source, destination in ((full, narrow), (narrow, back)):
        values = start * sum(s.heads * s.channels for layer in model.kv_spec.layers for s in layer.segments)
        assert values <= move(source, destination, blocks, start) <= 1.3 * values
    got = follow(model, Pages(back, [blocks]), prompt, start)
    assert not torch.equal(want, got)
    kl = (want.exp() * (want - got)).sum(dim=1)
    record_property("kl", kl.mean().item())
    print(f"{dtype.value} {kind}: KL {kl.mean():.6f} on average, {kl.max():.6f} at most")
    assert 0 <= kl.mean() < LIMIT


@pytest.mark.parametrize("codec", ["fp8", "int4"])
def test_next_token_kl_of_codecs(
    model: Decoder,
    prompt: list[int],
    prefilled: tuple[KVPool, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    codec: Literal["fp8", "int4"],
    record_property: Callable[[str, object], None],
) -> None:
    """bf16 to bf16 over TCP, rounded on the way alone."""
    monkeypatch.setenv("HETKV_SOCKET_DIR", "none")
    full, want = prefilled
    start, blocks = len(prompt) - FOLLOWED, list(range(-(-len(prompt) // BLOCK)))
    back = KVPool.allocate(model.kv_spec, len(blocks), block_size=BLOCK)
    with connected([full], [back], TransferConfig(codec=codec)) as ([sender], [receiver]):
        assert sender.peers[0].codec == codec
        receiving = receiver.receive("r", blocks, start)
        sender.send("r", blocks, start).send_layers()
        receiving.wait(WAIT_S)
    got = follow(model, Pages(back, [blocks]), prompt, start)
    kl = (want.exp() * (want - got)).sum(dim=1)
    record_property("kl", kl.mean().item())
    print(f"codec {codec}: KL {kl.mean():.6f} on average, {kl.max():.6f} at most")
    assert 0 < kl.mean() < LIMIT
