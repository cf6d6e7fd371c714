"""Layouts of existing memory are read from its strides: every element is found where the tensor has it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hetkv.errors import InputError
from hetkv.kv.dtypes import DType
from hetkv.kv.layout import KVLayout
from hetkv.kv.pool import KVPool
from hetkv.kv.presets import PRESETS
from hetkv.kv.spec import KVSpec, LayerSpec
from hetkv.transport.config import TransferConfig
from tests.transport.peers import connected, until

BLOCKS, SIZE, HEADS, DIM = 7, 4, 3, 16
SPEC = KVSpec.uniform(2, HEADS, DIM)
KNOWN = [name for name in PRESETS if name not in ("latent", "fp8_ds_mla", "state")]


def numbered(*shape: int) -> torch.Tensor:
    """Every element another value."""
    count = int(torch.tensor(shape).prod())
    return torch.arange(count, dtype=torch.float32).reshape(shape)


Pick = Callable[[torch.Tensor, int], torch.Tensor]
# Axes, the tensor, and how to take K (0) or V (1) out of it as [block, token, head, channel] by plain indexing.
ONE_TENSOR: dict[str, tuple[str, torch.Tensor, Pick]] = {
    "segment first": (
        "segment block token head channel",
        numbered(2, BLOCKS, SIZE, HEADS, DIM),
        lambda t, part: t[part],
    ),
    "segment inside": (
        "block segment head token channel",
        numbered(BLOCKS, 2, HEADS, SIZE, DIM),
        lambda t, part: t[:, part].transpose(1, 2),
    ),
    "packed": (
        "block head token channels",
        numbered(BLOCKS, HEADS, SIZE, 2 * DIM),
        lambda t, part: t[..., part * DIM : (part + 1) * DIM].transpose(1, 2),
    ),
    "permuted memory": (
        "segment block token head channel",
        numbered(BLOCKS, HEADS, 2, SIZE, DIM).permute(2, 0, 3, 1, 4),
        lambda t, part: t[part],
    ),
    "a slice of more blocks": (
        "segment block token head channel",
        numbered(2, BLOCKS + 5, SIZE, HEADS, DIM)[:, 2 : 2 + BLOCKS],
        lambda t, part: t[part],
    ),
    "split channels": (
        "segment block head outer token inner",
        numbered(2, BLOCKS, HEADS, DIM // 4, SIZE, 4),
        lambda t, part: t[part].permute(0, 3, 1, 2, 4).reshape(BLOCKS, SIZE, HEADS, DIM),
    ),
}


@pytest.mark.parametrize("name", ONE_TENSOR)
def test_one_tensor(name: str) -> None:
    axes, tensor, pick = ONE_TENSOR[name]
    pool = KVPool.from_tensors(SPEC, {0: tensor, 1: tensor.clone(memory_format=torch.preserve_format)}, axes)
    assert pool.cache_groups == {0: (SIZE, BLOCKS)}
    for part, segment in enumerate("kv"):
        view = pool.view(0, segment).reshape(BLOCKS, SIZE, HEADS, DIM)
        assert torch.equal(view, pick(tensor, part))
        assert pool.view(0, segment).data_ptr() == pick(tensor, part).data_ptr() or "split" in name


def test_separate_k_and_v_with_axes_of_their_own() -> None:
    k, v = numbered(BLOCKS, HEADS, DIM // 8, SIZE, 8), numbered(BLOCKS, HEADS, DIM, SIZE)
    axes = {"k": "block head outer token inner", "v": "block head channel token"}
    pool = KVPool.from_tensors(SPEC, {layer: {"k": k, "v": v} for layer in (0, 1)}, axes)
    assert torch.equal(pool.view(1, "k").flatten(3), k.permute(0, 3, 1, 2, 4).flatten(3))
    assert torch.equal(pool.view(1, "v"), v.permute(0, 3, 1, 2))
    same = KVLayout.preset("rocm", SPEC.layers[0], HEADS, SIZE, DType.FLOAT16)
    half = KVLayout.from_tensor({"k": k.half(), "v": v.half()}, axes)
    assert half.segments == same.segments


def test_latent() -> None:
    spec = KVSpec((LayerSpec.latent(512, 64),))
    tensor = numbered(BLOCKS, SIZE, 576)
    pool = KVPool.from_tensors(spec, {0: tensor}, "block token channels")
    assert torch.equal(pool.view(0, "latent")[:, :, 0], tensor[..., :512])
    assert torch.equal(pool.view(0, "rope")[:, :, 0], tensor[..., 512:])


@pytest.mark.parametrize("name", KNOWN)
def test_presets_hold_every_element_once(name: str) -> None:
    """K and V together cover the allocation, and no two elements share a byte."""
    pool = KVPool.allocate(SPEC, BLOCKS, layout=name, block_size=SIZE, dtype="float16")
    for segment in "kv":
        pool.view(0, segment).fill_(1.0)
    memory = {tensor.data_ptr(): tensor for tensor in pool.layers[0].tensors.values()}
    assert sum(tensor.numel() for tensor in memory.values()) == 2 * BLOCKS * SIZE * HEADS * DIM * 2
    assert all(
        torch.equal(tensor.view(torch.float16), torch.ones(tensor.numel() // 2).half()) for tensor in memory.values()
    )


def test_a_pool_over_an_engines_tensors_is_moved() -> None:
    """Strides of a permuted engine tensor on one side, a packed one on the other, through a real transfer."""
    source = {layer: torch.randn(BLOCKS, HEADS, 2, SIZE, DIM).permute(2, 0, 3, 1, 4) for layer in (0, 1)}
    target = {layer: torch.zeros(BLOCKS, HEADS, SIZE, 2 * DIM) for layer in (0, 1)}
    pools = (
        KVPool.from_tensors(SPEC, source, "segment block token head channel"),
        KVPool.from_tensors(SPEC, target, "block head token channels"),
    )
    with connected([pools[0]], [pools[1]], TransferConfig()) as ([sender], [receiver]):
        tx = sender.send("x", [5, 0, 3], 10)
        tx.send_layers()
        receiver.receive("x", [1, 6, 2], 10).wait(10)
        tx.wait(10)
        until(lambda: sender.stats()["open_requests"] == 0)
    for layer in (0, 1):
        sent = source[layer][:, [5, 0, 3]].reshape(2, 12, HEADS, DIM)[:, :10]
        got = target[layer][[1, 6, 2]].transpose(1, 2).reshape(12, HEADS, 2, DIM)[:10]
        assert torch.equal(got.permute(2, 0, 1, 3), sent)


@pytest.mark.parametrize(
    ("axes", "shape", "said"),
    [
        ("segment block token head", (2, 7, 4, 3, 16), "do not name the 5 axes"),
        ("segment block token head chanel", (2, 7, 4, 3, 16), "'chanel' is no axis; known are segment"),
        ("segment token head channel", (2, 4, 3, 16), "need block"),
        ("segment block token head outer", (2, 7, 4, 3, 16), "need block"),
        ("segment block token head channel", (3, 7, 4, 3, 16), "segment axis"),
        ("block token head channels", (7, 4, 3, 48), r"channels axis|layout has"),
        ("segment block token head channel", (2, 7, 4, 5, 16), "layout has 5 heads"),
        ("segment block token head channel", (2, 7, 4, 3, 8), "of 8 channels"),
    ],
)
def test_memory_that_does_not_fit(axes: str, shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        KVPool.from_tensors(SPEC, {0: numbered(*shape), 1: numbered(*shape)}, axes)


def test_a_missing_layer_and_one_too_many() -> None:
    tensor = numbered(2, BLOCKS, SIZE, HEADS, DIM)
    with pytest.raises(InputError, match=r"layers \[0\]"):
        KVPool.from_tensors(SPEC, {0: tensor}, "segment block token head channel")
    with pytest.raises(InputError, match="layer 5"):
        KVPool.from_tensors(SPEC, {5: tensor}, "segment block token head channel")
