"""The named pairs of docs/compatibility.md: two sides of one model, a request, and the field that rejects it, if any.

One line adds a pair: the test runs it, the document shows it.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from hetkv.kv.spec import KVSpec, LayerSpec


class Side(NamedTuple):
    """One instance. `block`: block size, or one per cache group. `scale`: static, for the tensor or per head."""

    tp: int = 1
    pp: int = 1
    layout: str = "nhd"
    block: int | tuple[int, ...] = 16
    dtype: str = "bfloat16"
    scale: tuple[float, ...] | None = None
    stages: tuple[int, ...] | None = None
    """Layers of each pipeline stage; default as even as can be."""
    slot_bytes: int = 1 << 14


D = Side(layout="hnd", block=64)
"""A decode side that is different a `Side()` in layout and block size."""
GQA = KVSpec.uniform(3, 8, 32)


class Pair(NamedTuple):
    """A transfer from `source` to `destination`, or its rejection."""

    name: str
    source: Side = Side()
    destination: Side = D
    spec: KVSpec = GQA
    theirs: KVSpec | None = None
    """The destination's spec where it is another."""
    tokens: int = 117
    cached: int = 0
    """Tokens that the destination holds already."""
    chunks: tuple[int, ...] = ()
    """Where the chunks of a prefill end, before `tokens`."""
    back: bool = False
    """Another request goes from destination to source at the same time."""
    rejected: str = ""
    """The field that the handshake names; empty: the pair works."""


def uniform(heads: int, layers: int = 3, head_dim: int = 32, v_head_dim: int | None = None) -> KVSpec:
    return KVSpec.uniform(layers, heads, head_dim, v_head_dim)


def layers(*made: LayerSpec) -> KVSpec:
    return KVSpec(made)


MLA = layers(*[LayerSpec.latent(512, 64)] * 2)
STATE = layers(LayerSpec.kv(4, 32), LayerSpec.state(6, 200, group=1), LayerSpec.kv(4, 32))
SLIDING = layers(LayerSpec.kv(4, 32), LayerSpec.kv(4, 32, group=1, sliding_window=40))
GROUPS = layers(LayerSpec.kv(4, 32), LayerSpec.kv(2, 64, group=1), LayerSpec.kv(8, 16, group=2), LayerSpec.kv(4, 32))
SHARED = layers(LayerSpec.kv(4, 32), LayerSpec.kv(4, 32, shares=0), LayerSpec.kv(4, 32), LayerSpec.kv(4, 32, shares=2))
HYBRID = layers(
    LayerSpec.kv(6, 32),
    LayerSpec.kv(6, 32, group=1, sliding_window=40),
    LayerSpec.state(6, 200, group=2),
    LayerSpec.latent(64, 16, group=3),
    LayerSpec.kv(1, 32, group=4),
    LayerSpec.kv(3, 48, 16, group=4),
    LayerSpec.kv(6, 32, shares=0),
)
HYBRID_SIDES = Side(2, 2, "nhd", (16, 8, 1, 4, 32), stages=(3, 4)), Side(3, 1, "rocm", (64, 16, 1, 1, 128))

PARALLELISM = [
    Pair("TP 1 to TP 1"),
    Pair("TP 3 to TP 2", Side(3), D._replace(tp=2)),
    Pair("TP 8 to TP 1", Side(8)),
    Pair("TP 1 to TP 8", Side(), D._replace(tp=8)),
    Pair("TP 2 to TP 1", Side(2)),
    Pair("TP 1 to TP 2", Side(), D._replace(tp=2)),
    Pair("2 KV heads over TP 4, to TP 1", Side(4), D, uniform(2)),
    Pair("TP 1 to TP 4 that replicates 2 KV heads", Side(), D._replace(tp=4), uniform(2)),
    Pair("2 KV heads, TP 8 to TP 3", Side(8), D._replace(tp=3), uniform(2)),
    Pair("7 heads over 2 ranks, to 1", Side(2), D, uniform(7)),
    Pair("7 heads over 2 ranks, to 3", Side(2), D._replace(tp=3), uniform(7)),
    Pair("PP 3 to TP 4", Side(pp=3), D._replace(tp=4)),
    Pair("PP 2 uneven to PP 2 uneven", Side(pp=2, stages=(1, 6)), D._replace(pp=2, stages=(5, 2)), uniform(4, 7)),
    Pair("PP 3 uneven to PP 2 uneven", Side(pp=3, stages=(1, 4, 2)), D._replace(pp=2, stages=(3, 4)), uniform(4, 7)),
    Pair("TP 2 x PP 2 to TP 3 x PP 3", Side(2, 2, stages=(3, 1)), D._replace(tp=3, pp=3), uniform(8, 4)),
    Pair("TP 4 x PP 1 to TP 1 x PP 4", Side(4), D._replace(pp=4), uniform(8, 4)),
]

KINDS = [
    Pair("MQA", Side(2), D, uniform(1)),
    Pair("value head dim different key head dim", Side(2), D, uniform(4, v_head_dim=80)),
    Pair("several cache groups", Side(block=(16, 8, 4)), D._replace(block=(64, 3, 128)), GROUPS),
    Pair("several cache groups, TP 3 to TP 2", Side(3), D._replace(tp=2), GROUPS),
    Pair("a block size for each layer", Side(block=(16, 1, 5)), D._replace(block=(3, 128, 7)), GROUPS),
    Pair("sliding-window layers: 39 of 117 tokens are sent", Side(), D, SLIDING),
    Pair("sliding-window layers, everything before the window cached", Side(), D, SLIDING, cached=90),
    Pair("cross-layer shared KV", Side(2), D, SHARED),
    Pair("MLA, latent 512 + 64", Side(layout="latent"), Side(layout="latent", block=64), MLA),
    Pair("MLA, TP 4 to TP 2: replicas share the layers", Side(4), D._replace(tp=2), MLA),
    Pair("MLA, PP 2 to TP 2", Side(pp=2), D._replace(tp=2), MLA),
    Pair("Mamba or linear-attention state", Side(), D, STATE),
    Pair("Mamba or linear-attention state, TP 3 to TP 2", Side(3), D._replace(tp=2), STATE),
    Pair("hybrid of all kinds", *HYBRID_SIDES, HYBRID),
    Pair("hybrid of all kinds, half of it cached, fp8 to bf16", *HYBRID_SIDES, HYBRID, cached=55),
]
KINDS[-1] = KINDS[-1]._replace(source=HYBRID_SIDES[0]._replace(dtype="float8_e4m3fn"))

FN, FNUZ, E5M2 = Side(dtype="float8_e4m3fn"), Side(dtype="float8_e4m3fnuz"), Side(dtype="float8_e5m2")
HEADS = (0.5, 0.25, 2.0, 1.0, 0.125, 4.0, 0.5, 1.0)
SCALES = [
    Pair("fp8 to bf16, scale of the tensor", FN._replace(scale=(0.37,)), D),
    Pair("bf16 to fp8, scale of the tensor", Side(), FN._replace(scale=(0.37,), block=64)),
    Pair("fp8 to fp8, equal scales", FN._replace(scale=(0.37,)), FN._replace(scale=(0.37,), block=64)),
    Pair("fp8 to fp8, unequal scales", FN._replace(scale=(0.37,)), FN._replace(scale=(0.5,), block=64)),
    Pair("fp8 to fp8, unequal scales per head", FN._replace(scale=HEADS), FN._replace(scale=HEADS[::-1], block=64)),
    Pair(
        "fp8 per head to fp8 of the tensor, TP 3 to TP 2",
        FN._replace(tp=3, scale=HEADS),
        FN._replace(tp=2, scale=(3.0,)),
    ),
    Pair("e4m3fn to e4m3fnuz of twice the scale", FN._replace(scale=(0.25,)), FNUZ._replace(scale=(0.5,))),
    Pair("e4m3fnuz to e4m3fn of half the scale", FNUZ._replace(scale=(0.5,)), FN._replace(scale=(0.25,))),
    Pair("e4m3fn to e4m3fnuz of equal scale", FN._replace(scale=(0.25,)), FNUZ._replace(scale=(0.25,))),
    Pair("e4m3fnuz to e5m2", FNUZ._replace(scale=(0.5,)), E5M2._replace(scale=(2.0,))),
    Pair("int8 to int8, equal scales", Side(dtype="int8", scale=(0.1,)), D._replace(dtype="int8", scale=(0.1,))),
]

REQUESTS = [
    Pair("nothing cached", tokens=117),
    Pair("40 tokens cached: inside a block of both", cached=40),
    Pair("48 tokens cached: the end of a block of the source, inside one of the destination", cached=48),
    Pair("64 tokens cached: the end of a block of both", cached=64),
    Pair("48 tokens cached: inside a block of the source, the end of one of the destination", Side(block=64),
         cached=48),
    Pair("everything cached", cached=117),
    Pair("1 token of 117 missing", cached=116),
    Pair("chunked prefill, chunks that end inside blocks", chunks=(30, 77, 80)),
    Pair("chunked prefill, a token at a time", tokens=9, chunks=tuple(range(1, 9))),
    Pair("chunked prefill after 40 cached tokens, TP 3 to TP 2", Side(3), D._replace(tp=2), cached=40, chunks=(50, 99)),
    Pair("decode to prefill at the same time (multi-turn)", cached=40, back=True),
    Pair("decode to prefill at the same time, TP 3 to TP 2, fp8 to bf16", FN._replace(tp=3), D._replace(tp=2),
         back=True),
]  # fmt: skip

REJECTED = [
    Pair("different head dims", theirs=uniform(8, 3, 64), rejected="spec.layers[0].segments[0].channels"),
    Pair("different value head dims", theirs=uniform(8, 3, 32, 64), rejected="spec.layers[0].segments[1].channels"),
    Pair("different numbers of KV heads", theirs=uniform(4), rejected="spec.layers[0].segments[0].heads"),
    Pair("different numbers of layers", theirs=uniform(8, 4), rejected="len(spec.layers)"),
    Pair("different sliding windows", Side(), D, SLIDING,
         layers(SLIDING.layers[0], LayerSpec.kv(4, 32, group=1, sliding_window=64)),
         rejected="spec.layers[1].sliding_window"),
    Pair("opaque state of different size", Side(), D, STATE, layers(STATE.layers[0], LayerSpec.state(6, 208, group=1),
         STATE.layers[2]), rejected="spec.layers[1].segments[0].channels"),
    Pair("different layer kinds: MLA to GQA", Side(), D, MLA, uniform(1, 2, 512), rejected="spec.layers[0].kind"),
    Pair("different cache groups", Side(), D, GROUPS, layers(*GROUPS.layers[:3], LayerSpec.kv(4, 32, group=1)),
         rejected="spec.layers[3].group"),
    Pair("int8 to bf16", Side(dtype="int8"), D, rejected="layers[0].k.dtype"),
    Pair("bf16 to int8", Side(), D._replace(dtype="int8"), rejected="layers[0].k.dtype"),
    Pair("int8 to int8 of another static scale", Side(dtype="int8", scale=(0.1,)),
         D._replace(dtype="int8", scale=(0.2,)), rejected="layers[0].k.scale"),
    Pair("scales whose ratio is no float32", FN._replace(scale=(1e30,)), FN._replace(scale=(1e-30,)),
         rejected="layers[0].k.scale"),
    Pair("a slot that holds no token", Side(), D._replace(slot_bytes=512), rejected="slot_bytes"),
]  # fmt: skip

TABLES = {
    "Parallelism": (PARALLELISM, "TP splits KV heads, PP splits layers; a rank may hold a replica. 8 KV heads of 32, 3 "
                    "layers, unless the name says otherwise."),
    "Layer kinds": (KINDS, "All kinds may be mixed in one model; layers of one cache group share a block size."),
    "Scales": (SCALES, "Static scales: an element is its code times the scale."),
    "Prefixes, chunks, direction": (REQUESTS, "117 tokens unless the name says otherwise."),
    "Rejected": (REJECTED, "The handshake rejects these: no link is made, and nothing is written. The text is what the "
                "connecting side raises as `IncompatibleError`."),
}  # fmt: skip

LAYOUTS = ("nhd", "hnd", "nhd_interleaved", "hnd_interleaved", "packed_nhd", "packed_hnd", "rocm")
DTYPES = (
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "int8",
)
SMALL = uniform(2, 1)


def layout_pair(ours: str, theirs: str) -> Pair:
    return Pair(f"{ours} to {theirs}", Side(layout=ours), Side(layout=theirs, block=24), SMALL, tokens=75)


def dtype_pair(ours: str, theirs: str) -> Pair:
    rejected = "layers[0].k.dtype" if ours != theirs and "int8" in (ours, theirs) else ""
    sides = Side(dtype=ours), Side(layout="rocm", block=64, dtype=theirs)
    return Pair(f"{ours} to {theirs}", *sides, SMALL, tokens=75, rejected=rejected)


LAYOUT_PAIRS = [layout_pair(*names) for names in itertools.product(LAYOUTS, repeat=2)]
DTYPE_PAIRS = [dtype_pair(*names) for names in itertools.product(DTYPES, repeat=2)]
MATRICES = (
    ("Layouts", "Blocks of 16 tokens to blocks of 24, 75 tokens, bf16: all pairs arrive identical, moved as bits.",
     LAYOUTS, LAYOUT_PAIRS),
    ("Dtypes", "Who converts, without scales: nhd, blocks of 16, to rocm, blocks of 64. The wire carries the narrower "
     "of the two, the sender's on a tie, in its OCP form; *bits*: nothing is converted. All pairs that are not "
     "rejected arrive identical.", DTYPES, DTYPE_PAIRS),
)  # fmt: skip
ALL = [pair for pairs, _ in TABLES.values() for pair in pairs] + LAYOUT_PAIRS + DTYPE_PAIRS
