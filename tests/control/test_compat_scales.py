"""Scales in memory at the handshake: what is rejected, by which name, and how segments with them are converted."""

from __future__ import annotations

import msgspec
import pytest

from hetkv.control import compat
from hetkv.control.conversion import Conversion, segment_conversion
from hetkv.control.description import Description, encode
from hetkv.errors import IncompatibleError, InputError
from hetkv.kv.dtypes import DType
from hetkv.kv.layout import KVLayout
from hetkv.kv.scale import ScaleLayout
from hetkv.kv.segment import SegmentLayout
from hetkv.kv.spec import Interval, KVSpec, LayerSpec, Segment, Shard
from tests.control.peers import SPEC, describe
from tests.control.test_compat import BF16, E5, E5FNUZ, FN, FNUZ, FP32, INT8, UINT8, part, rejected


def scaled(role: str, dtype: DType, per: str = "", channels: int = 0, **changes: object) -> Description:
    """A description whose layouts have scales in memory (`per`), or none."""
    made = describe(role, SPEC, dtype, **changes)
    if not per:
        return made
    groups = tuple(
        msgspec.structs.replace(group, layout=group.layout.with_scales(per, channels)) for group in made.layers
    )
    return msgspec.structs.replace(made, layers=groups)


def test_scales_in_memory_need_version_1_1():
    """A link's minor version is the lower of the two sides': 1.0 carries static scales only."""
    sides = scaled("sender", FN, "token_head"), scaled("receiver", BF16)
    compat.check(*sides)
    with pytest.raises(IncompatibleError) as caught:
        compat.check(*sides, minor=0)
    assert str(caught.value) == (
        "layers[0].k.scale: this side has in memory, per token and head, the peer has none "
        "(version 1.0, the lower of the two sides', carries static scales only)"
    )
    compat.check(describe("sender", SPEC, FN, ScaleLayout((0.5,))), describe("receiver", SPEC), minor=0)


def test_a_reader_of_1_0_is_not_sent_scales_in_memory():
    compat.check_minor(describe("sender", SPEC, FN, ScaleLayout((0.5,))), 0)
    compat.check_minor(scaled("sender", FN, "token"), 1)
    with pytest.raises(IncompatibleError, match=r"layers\[0\]\.k\.scale: .*in memory, per token.*version 1\.0"):
        compat.check_minor(scaled("sender", FN, "token"), 0)


def test_static_scales_are_described_as_in_version_1_0():
    """A reader of 1.0 knows `values` and the strides; what is not used is not sent."""
    raw = msgspec.msgpack.decode(encode(describe("sender", SPEC, FN, ScaleLayout((0.5,)))))
    assert raw["layers"][0]["layout"]["segments"]["k"]["scale"] == {"values": [0.5]}


@pytest.mark.parametrize(
    ("sender", "receiver", "field", "mine", "theirs"),
    [
        ((INT8, "token_head"), (INT8, ""), "k.scale", "in memory, per token and head", "none"),
        ((FN, "token_head"), (INT8, ""), "k.dtype", "float8_e4m3fn", "int8"),
        ((INT8, ""), (BF16, ""), "k.dtype", "int8", "bfloat16"),
        ((INT8, ""), (FN, "token_head"), "k.dtype", "int8", "float8_e4m3fn"),
        ((UINT8, ""), (INT8, "token_head"), "k.dtype", "uint8", "int8"),
        ((FN, "token_head", 32), (E5, "token_head", 64), None, "", ""),
        ((INT8, "token_head", 16), (FN, "token"), None, "", ""),
        ((BF16, ""), (INT8, "token"), None, "", ""),
    ],
)
def test_scales_that_the_receiver_can_or_cannot_hold(sender, receiver, field, mine, theirs):
    sides = scaled("sender", *sender), scaled("receiver", *receiver)
    if field is None:
        compat.check(*sides)
        return
    error = rejected(*sides)
    assert (error.field, error.mine, error.theirs) == (f"layers[0].{field}", mine, theirs)


def test_groups_must_fit_each_other():
    spec = KVSpec.uniform(1, 2, 96)
    mine, theirs = (KVLayout.preset("nhd", spec.layers[0], 2, 16, FN).with_scales("token_head", n) for n in (32, 48))
    with pytest.raises(IncompatibleError, match=r"3 groups of channels, the peer has .* 2 groups"):
        segment_conversion(mine.segments["k"], theirs.segments["k"], *(Interval(0, 2),) * 3)


def test_shared_scales_need_all_heads_from_one_sender():
    """A pool with one scale a token for 4 heads cannot take 2 heads from each of two ranks, nor from two replicas."""
    halves = [Shard.of(SPEC, 2, rank) for rank in range(2)]
    whole = Shard.whole(SPEC)
    receiver = scaled("receiver", FN, "token")
    sender = scaled("sender", BF16, shard=halves[0], instance_shards=tuple(halves))
    error = rejected(sender, receiver)
    assert (error.field, error.mine, error.theirs) == ("layers[0].k.scale", "none", "in memory, per token")
    replica = scaled("sender", BF16, shard=whole, instance_shards=(whole, whole))
    assert rejected(replica, receiver).field == "layers[0].k.scale"
    compat.check(scaled("sender", BF16), receiver)
    # Replicas whose heads share scales already send the same ones.
    compat.check(scaled("sender", FN, "token", shard=whole, instance_shards=(whole, whole)), receiver)


def test_other_replicas_do_not_share_a_scale():
    """Heads [0, 2) come from a rank of 2 heads and one of 4: each has a scale of its own for them."""
    whole = Shard.whole(SPEC)
    half = Shard.of(SPEC, 2, 0)
    receiver = scaled("receiver", FN, "token", shard=half, instance_shards=(half,))
    other = scaled("sender", FN, "token", shard=whole, instance_shards=(whole, half))
    assert rejected(other, receiver).field == "layers[0].k.scale"
    compat.check(scaled("sender", FN, "token", shard=whole, instance_shards=(whole, whole)), receiver)


@pytest.mark.parametrize("dtype", [BF16, FN])
@pytest.mark.parametrize("value", [1e-300, 1e300])
def test_static_scales_that_float32_does_not_hold_are_rejected(dtype, value):
    """They would be written, or multiplied with, as 0 or infinity."""
    error = rejected(describe("sender", SPEC, dtype, ScaleLayout((value,))), scaled("receiver", FN, "token_head"))
    assert error.field == "layers[0].k.scale"
    assert error.why == "a static scale is not a normal float32"


def test_a_segment_without_channels_has_no_scales():
    with pytest.raises(InputError, match="0 channels"):
        KVLayout("odd", 16, {"k": SegmentLayout(FN, 1, 0, 0, 16, 1, 0, 1, 1, scale=ScaleLayout(token_stride=4))})


def test_a_slot_must_hold_one_token_with_its_scales():
    """2 x (4 heads x 64 channels + 4 scales of 4 bytes) = 544."""
    sender = scaled("sender", INT8, "token_head")
    compat.check(sender, scaled("receiver", INT8, "token_head", slot_bytes=544))
    error = rejected(sender, scaled("receiver", INT8, "token_head", slot_bytes=543))
    assert error.mine == "frames of at least 544 bytes"


def test_a_frame_holds_four_segments_and_scales():
    segments = tuple(Segment(name, 4, 64) for name in "abc")
    spec = KVSpec((LayerSpec("kv", segments),))
    sides = []
    for role in ("sender", "receiver"):
        made = describe(role, spec, FN)
        group = msgspec.structs.replace(made.layers[0], layout=made.layers[0].layout.with_scales())
        sides.append(msgspec.structs.replace(made, layers=(group,)))
    assert rejected(*sides).field == "layers[0].scale"
    assert "not 6" in str(rejected(*sides))


ONE = Interval(0, 1)


@pytest.mark.parametrize(
    ("src", "dst", "expected"),
    [
        ((FN, "m"), (FN, "m"), Conversion(FN, None, None, 1, "keep", "keep")),
        ((FNUZ, "m"), (FNUZ, "m"), Conversion(FNUZ, None, None, 1, "keep", "keep")),
        ((FN, "m"), (FNUZ, "m"), Conversion(FN, None, (0.5,), 1, "keep", "keep", 2.0)),
        ((FNUZ, "m"), (FN, "m"), Conversion(FN, None, None, 1, "keep", "keep")),
        ((E5FNUZ, "m"), (E5, "m"), Conversion(E5, None, None, 1, "keep", "keep")),
        ((FN, "m"), (E5, "m"), Conversion(FN, None, None, 1, "keep", "quantise")),
        ((INT8, "m"), (FN, "m"), Conversion(INT8, None, None, 1, "keep", "quantise")),
        ((FN, "m"), (BF16, None), Conversion(FN, None, None, 1, "keep", "apply")),
        ((FN, "m"), (FN, 0.5), Conversion(FN, None, (2.0,), 1, "keep", "apply")),
        ((INT8, "m"), (FP32, None), Conversion(INT8, None, None, 1, "keep", "apply")),
        ((BF16, None), (INT8, "m"), Conversion(INT8, None, None, 1, "quantise", "keep")),
        ((BF16, 3.0), (FN, "m"), Conversion(FN, (3.0,), None, 1, "quantise", "keep")),
        ((BF16, None), (FNUZ, "m"), Conversion(FN, None, (0.5,), 1, "quantise", "keep", 2.0)),
        ((FN, 0.3), (FN, "m"), Conversion(FN, None, None, 0, "", "fill", fill=(0.3,))),
        ((FN, 0.3), (FNUZ, "m"), Conversion(FN, None, (0.5,), 0, "", "fill", fill=(0.6,))),
        ((FNUZ, 2.0), (FNUZ, "m"), Conversion(FNUZ, None, None, 0, "", "fill", fill=(2.0,))),
        ((FN, 0.5), (E5, "m"), Conversion(FN, None, (0.5,), 0, "", "quantise")),
        ((INT8, 0.5), (INT8, "m"), Conversion(INT8, None, None, 0, "", "fill", fill=(0.5,))),
    ],
)
def test_scales_in_memory(src, dst, expected):
    sides = []
    for dtype, scale in (src, dst):
        layout = KVLayout.preset("nhd", LayerSpec.kv(1, 64), 1, 16, dtype)
        made = layout.with_scales().segments["k"] if scale == "m" else part(dtype, [scale] if scale else [], heads=1)
        sides.append(made)
    assert segment_conversion(*sides, ONE, ONE, ONE) == expected
