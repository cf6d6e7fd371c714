"""Compatibility of two ranks: what is rejected, by which name, and how segments are converted."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetkv.control import compat
from hetkv.control.conversion import Conversion, segment_conversion, wire_dtype
from hetkv.control.description import Description, decode, encode, for_minor
from hetkv.errors import IncompatibleError, InputError, MessageError
from hetkv.kv.dtypes import DType
from hetkv.kv.layout import KVLayout
from hetkv.kv.scale import ScaleLayout
from hetkv.kv.spec import Interval, KVSpec, LayerSpec, Shard
from tests.control.peers import SPEC, describe

FN, FNUZ, E5, E5FNUZ = (DType.parse(n) for n in ("fp8_e4m3fn", "fp8_e4m3fnuz", "fp8_e5m2", "fp8_e5m2fnuz"))
BF16, FP16, FP32, INT8, UINT8 = DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32, DType.INT8, DType.UINT8


def part(dtype: DType, scales: Sequence[float] = (), heads: int = 4):
    layout = KVLayout.preset(
        "nhd", LayerSpec.kv(heads, 64), heads, 16, dtype, ScaleLayout(tuple(scales)) if scales else None
    )
    return layout.segments["k"]


def convert(src, dst) -> Conversion:
    return segment_conversion(src, dst, Interval(0, 4), Interval(0, 4), Interval(0, 4))


def rejected(mine: Description, theirs: Description) -> IncompatibleError:
    """The rejection as one side sees it; the other must see the same with the values exchanged."""
    with pytest.raises(IncompatibleError) as ours:
        compat.check(mine, theirs)
    with pytest.raises(IncompatibleError) as other:
        compat.check(theirs, mine)
    assert ours.value.field == other.value.field
    assert (ours.value.mine, ours.value.theirs) == (other.value.theirs, other.value.mine)
    return ours.value


def test_equal_sides_fit():
    compat.check(describe("sender", SPEC), describe("receiver", SPEC))


def test_a_hybrid_model_fits():
    spec = KVSpec(
        (
            LayerSpec.kv(4, 64),
            LayerSpec.latent(512, 64, group=1),
            LayerSpec.state(3, 4096, group=2),
            LayerSpec.kv(4, 64, shares=0),
        )
    )
    compat.check(describe("sender", spec, BF16), describe("receiver", spec, FN, ScaleLayout((0.5,))))


@pytest.mark.parametrize(
    ("other", "field", "mine", "theirs"),
    [
        (KVSpec.uniform(5, 4, 64), "len(spec.layers)", "4", "5"),
        (KVSpec.uniform(4, 4, 80), "spec.layers[0].segments[0].channels", "64", "80"),
        (KVSpec.uniform(4, 8, 64), "spec.layers[0].segments[0].heads", "4", "8"),
        (KVSpec.uniform(4, 4, 64, 32), "spec.layers[0].segments[1].channels", "64", "32"),
        (
            KVSpec((*SPEC.layers[:3], LayerSpec.kv(4, 64, sliding_window=9))),
            "spec.layers[3].sliding_window",
            "None",
            "9",
        ),
        (KVSpec((*SPEC.layers[:2], LayerSpec.state(4, 64), SPEC.layers[3])), "spec.layers[2].kind", "kv", "state"),
        (KVSpec((*SPEC.layers[:3], LayerSpec.kv(4, 64, group=1))), "spec.layers[3].group", "0", "1"),
    ],
)
def test_the_first_difference_of_the_specs_is_named(other, field, mine, theirs):
    error = rejected(describe("sender", SPEC), describe("receiver", other))
    assert (error.field, error.mine, error.theirs) == (field, mine, theirs)
    assert str(error) == f"{field}: this side has {mine}, the peer has {theirs}"


def test_state_of_different_size_is_rejected():
    sides = [describe(r, KVSpec((LayerSpec.state(2, n),))) for r, n in (("sender", 4096), ("receiver", 8192))]
    assert rejected(*sides).field == "spec.layers[0].segments[0].channels"


def test_fingerprints_that_both_sides_have_are_compared():
    """Weights of the same geometry are still other weights. What one side does not say cannot differ."""

    def side(role: str, **fingerprint: str) -> Description:
        return msgspec.structs.replace(describe(role, SPEC), fingerprint=fingerprint)

    compat.check(side("sender", weights="a", rope="10000"), side("receiver", weights="a", vocabulary="v"))
    compat.check(side("sender", weights="a"), side("receiver"))
    error = rejected(side("sender", rope="10000", weights="a"), side("receiver", rope="10000", weights="b"))
    assert (error.field, error.mine, error.theirs) == ("fingerprint.weights", "a", "b")


def test_fingerprints_are_short_text():
    for wrong in ({"": "x"}, {"x": ""}, {"x" * 65: "x"}, {"x": "y" * 513}, {str(i): "x" for i in range(33)}):
        with pytest.raises(InputError, match="fingerprint"):
            msgspec.structs.replace(describe("sender", SPEC), fingerprint=wrong)


def test_fingerprints_travel_from_minor_2_on():
    mine = msgspec.structs.replace(describe("sender", SPEC), fingerprint={"weights": "a"})
    assert decode(encode(for_minor(mine, 2)), "peer") == mine
    assert decode(encode(for_minor(mine, 1)), "peer").fingerprint == {}


def test_same_role_is_rejected():
    assert rejected(describe("sender", SPEC), describe("sender", SPEC)).field == "role"


def test_nothing_in_common_is_rejected():
    sides = [describe(r, SPEC, shard=Shard.of(SPEC, 1, 0, 2, p)) for p, r in enumerate(("sender", "receiver"))]
    error = rejected(*sides)
    assert error.field == "shard"
    assert (error.mine, error.theirs) == ("layers [0, 2), heads [0, 4)", "layers [2, 4), heads [0, 4)")


def test_a_slot_must_hold_one_token():
    """4 heads x (64 + 64) channels x 2 bytes = 1024."""
    compat.check(describe("sender", SPEC), describe("receiver", SPEC, slot_bytes=1024))
    error = rejected(describe("sender", SPEC), describe("receiver", SPEC, slot_bytes=1023))
    assert (error.field, error.mine, error.theirs) == (
        "slot_bytes",
        "frames of at least 1024 bytes",
        "slots of 1023 bytes",
    )
    compat.check(describe("sender", SPEC, FN), describe("receiver", SPEC, slot_bytes=512))


def test_heartbeats_must_fit():
    error = rejected(describe("sender", SPEC, heartbeat_interval_ms=2000), describe("receiver", SPEC))
    assert (error.field, error.mine, error.theirs) == ("heartbeat_ms", "interval 2000", "timeout 3000")


@pytest.mark.parametrize(
    ("src", "dst", "field", "mine", "theirs"),
    [
        (INT8, BF16, "dtype", "int8", "bfloat16"),
        (FP16, UINT8, "dtype", "float16", "uint8"),
        (INT8, FN, "dtype", "int8", "float8_e4m3fn"),
    ],
)
def test_dtypes_that_do_not_convert(src, dst, field, mine, theirs):
    error = rejected(describe("sender", SPEC, src), describe("receiver", SPEC, dst))
    assert (error.field, error.mine, error.theirs) == (f"layers[0].k.{field}", mine, theirs)


def test_int8_needs_equal_scales():
    one, two = ScaleLayout((1.0,)), ScaleLayout((2.0,))
    compat.check(describe("sender", SPEC, INT8, two), describe("receiver", SPEC, INT8, two))
    error = rejected(describe("sender", SPEC, INT8, one), describe("receiver", SPEC, INT8, two))
    assert error.field == "layers[0].k.scale"


def test_a_ratio_that_float32_cannot_hold_is_rejected():
    error = rejected(
        describe("sender", SPEC, FN, ScaleLayout((1e30,))), describe("receiver", SPEC, FN, ScaleLayout((1e-30,)))
    )
    assert error.field == "layers[0].k.scale"


@pytest.mark.parametrize("dtype", list(DType))
def test_equal_dtype_and_scale_move_bits(dtype):
    assert convert(part(dtype, [0.25]), part(dtype, [0.25])) == Conversion(dtype, None, None)


@pytest.mark.parametrize(
    ("src", "dst", "wire"),
    [
        (FP32, BF16, BF16), (BF16, FP32, BF16), (BF16, FP16, BF16), (FP16, BF16, FP16), (FN, E5, FN), (E5, FN, E5),
        (BF16, FNUZ, FN), (FNUZ, BF16, FN), (FNUZ, FN, FN), (FN, FNUZ, FN), (E5FNUZ, FN, E5), (BF16, E5FNUZ, E5),
        (INT8, INT8, INT8), (UINT8, UINT8, UINT8), (INT8, BF16, None), (UINT8, FN, None), (FN, INT8, None),
    ],
)  # fmt: skip
def test_wire_dtype(src, dst, wire):
    assert wire_dtype(src, dst) is wire


@pytest.mark.parametrize(
    ("src", "s", "dst", "d", "expected"),
    [
        (BF16, None, FN, None, Conversion(FN, None, None)),
        (BF16, None, FN, 0.5, Conversion(FN, (2.0,), None)),
        (FN, 0.5, BF16, None, Conversion(FN, None, (0.5,))),
        (FN, 3.0, FN, 2.0, Conversion(FN, None, (1.5,))),
        (FN, 1.0, FNUZ, 2.0, Conversion(FN, None, (0.5,))),
        (FN, 1.0, FNUZ, 1.0, Conversion(FN, None, None)),
        (FNUZ, 2.0, FN, 1.0, Conversion(FN, (2.0,), None)),
        (FNUZ, 3.0, FN, 1.0, Conversion(FN, (3.0,), None)),
        (FNUZ, 2.0, BF16, None, Conversion(FN, (2.0,), None)),
        (BF16, None, FNUZ, 2.0, Conversion(FN, None, (0.5,))),
        (FNUZ, 2.0, FNUZ, 8.0, Conversion(FN, (0.5,), (0.5,))),
        (E5FNUZ, 2.0, BF16, None, Conversion(E5, None, (2.0,))),
        (E5, 1.0, FN, 4.0, Conversion(E5, None, (0.25,))),
    ],
)
def test_static_scales(src, s, dst, d, expected):
    one = Interval(0, 1)
    sides = [part(t, [] if v is None else [v], heads=1) for t, v in ((src, s), (dst, d))]
    assert segment_conversion(*sides, one, one, one) == expected


def test_scales_per_head_of_a_global_interval():
    """Source holds global heads 2..6, destination 4..8; the route is 4..6."""
    src, dst = part(FN, [1.0, 2.0, 3.0, 4.0]), part(FN, [1.0, 8.0, 1.0, 1.0])
    got = segment_conversion(src, dst, Interval(4, 6), Interval(2, 6), Interval(4, 8))
    assert got == Conversion(FN, None, (3.0, 0.5))


def apply(values: torch.Tensor, target: DType, multiplier: float) -> torch.Tensor:
    """`RemapJob`'s contract in PyTorch: float32 product, saturate, round; NaN stays NaN. Bits where nothing changes."""
    if values.dtype is target.torch and multiplier == 1.0:
        return values
    limit = torch.finfo(target.torch).max
    product = values.float() * torch.tensor(multiplier, dtype=torch.float32)
    return product.clamp(-limit, limit).to(target.torch)


def through(conversion: Conversion, values: torch.Tensor, dst: DType) -> torch.Tensor:
    pack, unpack = (1.0 if m is None else m[0] for m in (conversion.pack, conversion.unpack))
    return apply(apply(values, conversion.wire, pack), dst, unpack)


def codes(dtype: DType) -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(dtype.torch)


def one_head(src: DType, s: float, dst: DType, d: float) -> Conversion:
    one = Interval(0, 1)
    return segment_conversion(part(src, [s], 1), part(dst, [d], 1), one, one, one)


def test_fn_to_fnuz_at_twice_the_scale_copies_every_code():
    got = through(one_head(FN, 0.3, FNUZ, 0.6), codes(FN), FNUZ).view(torch.uint8).tolist()
    assert got == [{0x80: 0x00, 0x7F: 0x80, 0xFF: 0x80}.get(code, code) for code in range(256)]


def test_fnuz_to_fn_at_half_the_scale_copies_every_code():
    got = through(one_head(FNUZ, 0.6, FN, 0.3), codes(FNUZ), FN).view(torch.uint8)
    special = {0x7F: 0x7E, 0xFF: 0xFE}
    assert [int(c) for i, c in enumerate(got) if i != 0x80] == [special.get(c, c) for c in range(256) if c != 0x80]
    assert torch.isnan(got.view(FN.torch).float()[0x80])


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([FN, FNUZ, E5, E5FNUZ]),
    st.sampled_from([FN, FNUZ, E5, E5FNUZ]),
    st.integers(-6, 6),
    st.integers(-6, 6),
)
def test_every_code_keeps_its_value_within_one_step(src, dst, s_log, d_log):
    """Over all 256 codes, where the value is in the receiver's normal range: at most one rounding to 2 or 3 bits."""
    s, d = 1.3 * 2.0**s_log, 0.7 * 2.0**d_log
    values = codes(src)
    element = values.double() * s
    got = through(one_head(src, s, dst, d), values, dst).double() * d
    info, wire = torch.finfo(dst.torch), torch.finfo(one_head(src, s, dst, d).wire.torch)
    size = element.abs()
    inside = torch.isfinite(element) & (size < info.max * d) & (size > 2 * info.smallest_normal * d)
    inside &= values.double().abs() >= 2 * torch.finfo(src.torch).smallest_normal
    inside &= values.double().abs() <= torch.finfo(src.torch).max / 2
    assert info.bits == wire.bits == 8
    step = 0.125 if E5 in (src, dst) or E5FNUZ in (src, dst) else 0.0625
    assert bool(((got - element).abs()[inside] <= (1.0001 * step) * size[inside]).all())


def test_layers_that_are_alike_are_sent_once():
    spec = KVSpec((*(LayerSpec.kv(4, 64),) * 80, LayerSpec.kv(4, 128), LayerSpec.kv(4, 64)))
    sent = describe("sender", spec)
    assert [len(group.layers) for group in sent.layers] == [81, 1]
    assert len(encode(sent)) < 8000
    assert decode(encode(sent), "peer") == sent
    assert sent.layout(80).segments["k"].channels == 128


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"lease_ms": 0}, "lease_ms is 0"),
        ({"slot_bytes": -1}, "slot_bytes is -1"),
        ({"instance": ""}, "instance and host"),
        ({"worker_address": bytes(65537)}, "worker_address has 65537 bytes"),
        ({"rank": 1}, "rank 1"),
        ({"layers": ()}, r"layers are \[\], the shard has \[0, 1, 2, 3\]"),
    ],
)
def test_a_description_that_contradicts_itself_names_the_field(changes, text):
    with pytest.raises(InputError, match=text):
        describe("sender", SPEC, **changes)


def test_a_layout_that_does_not_hold_the_shard_is_named():
    good = describe("sender", SPEC)
    match = r"layers\[0\], segment 'k': the layout has 4 heads of 64 channels, the shard 2 of 64"
    with pytest.raises(InputError, match=match):
        msgspec.structs.replace(good, shard=Shard.of(SPEC, 2, 0))
    with pytest.raises(InputError, match=r"layers\[0\].k.scale has 3 values for 4 heads"):
        describe("sender", SPEC, FN, ScaleLayout((1.0, 2.0, 3.0)))


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_a_damaged_description_is_rejected_or_means_something_else(data):
    """Whatever a peer sends: a description that holds together, or `MessageError`, and no other error."""
    good = bytearray(encode(describe("sender", KVSpec((LayerSpec.kv(2, 64), LayerSpec.latent(64, 16))))))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(good) - 1))
        good[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        message = decode(bytes(good), "peer")
    except MessageError:
        return
    if isinstance(message, Description):
        assert decode(encode(message), "peer") == message
        with contextlib.suppress(IncompatibleError):
            compat.check(describe("receiver", message.spec), message)


def test_an_unknown_field_is_named():
    raw = msgspec.msgpack.decode(encode(describe("sender", SPEC)))
    raw["colour"] = 1
    with pytest.raises(MessageError, match="unknown field `colour`"):
        decode(msgspec.msgpack.encode(raw), "peer")
    del raw["colour"]
    raw["layers"][0]["layout"]["segments"]["k"]["dtype"] = "float4"
    with pytest.raises(MessageError, match="float4"):
        decode(msgspec.msgpack.encode(raw), "peer")
