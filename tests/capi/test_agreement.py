"""The C library's rules are Python's: the same routes and conversions, or the same rejection, of random pairs."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from hetkv.control.agreement import Agreement
from hetkv.control.description import Description, encode
from hetkv.control.handshake import MINOR
from hetkv.errors import IncompatibleError
from hetkv.kv.dtypes import DType
from hetkv.kv.scale import ScaleLayout
from hetkv.kv.spec import KVSpec, LayerSpec, Shard
from tests.capi.library import agree
from tests.control.peers import describe

DTYPES = [dtype for dtype in DType if dtype is not DType.UINT8]


def random_spec(rng: random.Random) -> KVSpec:
    kind = rng.choice(["kv", "kv", "mixed", "latent"])
    count = rng.randint(1, 7)
    if kind == "latent":
        return KVSpec([LayerSpec.latent(64, 16)] * count)
    heads = rng.choice([1, 2, 3, 4, 6, 8])
    layers = [LayerSpec.kv(heads, 16, rng.choice([None, 32])) for _ in range(count)]
    if kind == "mixed":
        layers[0] = LayerSpec.kv(heads, 16, group=1, sliding_window=rng.randint(1, 9))
        layers.append(LayerSpec.state(heads, 24, group=2))
        layers.append(LayerSpec.kv(heads, 16, shares=0, group=1))
    return KVSpec(layers)


def random_side(rng: random.Random, role: str, spec: KVSpec) -> Description:
    tp, pp = rng.randint(1, 4), rng.randint(1, min(3, len(spec.layers)))
    shards = Shard.ranks(spec, tp, pp)
    rank = rng.randrange(len(shards))
    scale = rng.choice([None, None, ScaleLayout(values=(0.25,)), ScaleLayout(values=(3.0,))])
    changes: dict[str, Any] = {"shard": shards[rank], "rank": rank}
    if len(shards) > 1 and rng.random() < 0.95:
        changes["instance_shards"] = shards
    elif len(shards) > 1:
        changes["rank"] = 0
    if rng.random() < 0.1:
        changes["heartbeat_timeout_ms"] = rng.choice([100, 5000])
    if rng.random() < 0.2:
        changes["fingerprint"] = {"weights": rng.choice("ab"), "rope": "1"}
    if role == "receiver" and rng.random() < 0.1:
        changes["slot_bytes"] = rng.choice([64, 4096])
    return describe(role, spec, rng.choice(DTYPES), scale, **changes)


def expected(mine: Description, theirs: Description) -> dict[str, Any]:
    try:
        found = Agreement.of(mine, theirs, MINOR)
    except IncompatibleError as error:
        return {"field": error.field}
    layers = [
        [at.layer, *at.route.heads,
         *[[how.wire.value, list(how.pack or ()), list(how.unpack or ())] for how in at.conversions.values()]]
        for at in found.layers
    ]  # fmt: skip
    return {"layers": layers, "ranks": list(found.ranks)}


@pytest.mark.parametrize("seed", range(8))
def test_random_pairs(seed: int) -> None:
    rng = random.Random(seed)
    agreed = 0
    for _ in range(60):
        spec = random_spec(rng)
        sender, receiver = random_side(rng, "sender", spec), random_side(rng, "receiver", spec)
        for mine, theirs in ((sender, receiver), (receiver, sender)):
            found, want = agree(encode(mine), encode(theirs)), expected(mine, theirs)
            if "field" in want:
                assert found.get("field") == want["field"], (found, want)
            else:
                assert found == want
                agreed += 1
    assert agreed > 20


@pytest.mark.parametrize(("field", "change"), [
    ("len(spec.layers)", lambda spec: KVSpec(spec.layers[:-1])),
    ("spec.layers[1].sliding_window",
     lambda spec: KVSpec([spec.layers[0], LayerSpec.kv(4, 16, sliding_window=4), *spec.layers[2:]])),
    ("spec.layers[0].segments[0].channels", lambda spec: KVSpec.uniform(3, 4, 32)),
    ("spec.layers[0].segments[0].heads", lambda spec: KVSpec.uniform(3, 2, 16)),
])  # fmt: skip
def test_different_models_have_the_same_name(field: str, change: Any) -> None:
    spec = KVSpec.uniform(3, 4, 16)
    mine, theirs = describe("sender", spec), describe("receiver", change(spec))
    assert expected(mine, theirs)["field"] == field
    assert agree(encode(mine), encode(theirs))["field"] == field


def test_scales_in_memory_are_rejected_by_name() -> None:
    spec = KVSpec.uniform(2, 2, 16)
    scaled = describe("sender", spec, DType.FLOAT8_E4M3FN, ScaleLayout.dense(2, 1, 16))
    found = agree(encode(describe("receiver", spec)), encode(scaled))
    assert found["field"] == "layers[0].k.scale"
    assert "static scales only" in found["why"]


@pytest.mark.parametrize("wrong", [
    b"", b"\xc1", b"\x91" * 1000, b"\xdf\xff\xff\xff\xff", msgspec.msgpack.encode({"type": "description"}),
    msgspec.msgpack.encode({"type": "other"}), msgspec.msgpack.encode([1]),
])  # fmt: skip
def test_hostile_bytes_are_malformed(wrong: bytes) -> None:
    mine = encode(describe("sender"))
    assert "malformed" in agree(wrong, mine)
    assert "malformed" in agree(mine, wrong)


def test_changed_descriptions_are_malformed_or_understood() -> None:
    """No change of a byte, and no cut, makes the decoder fail otherwise than by saying so."""
    rng, good = random.Random(1), encode(describe("sender"))
    other = encode(describe("receiver"))
    for _ in range(2000):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        found = agree(bytes(data[: rng.choice([len(data), rng.randrange(len(data))])]), other)
        assert {"malformed", "field", "layers"} & set(found)
