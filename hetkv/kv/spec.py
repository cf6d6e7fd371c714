"""The model's KV geometry (`KVSpec`) and the part of it that one rank holds (`Shard`). Both sides share one spec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from operator import index
from typing import Any, Literal, NamedTuple, SupportsIndex

import msgspec

from hetkv.errors import InputError

LayerKind = Literal["kv", "latent", "state"]


class Segment(NamedTuple):
    """One tensor-like part of a layer's cache: `[tokens, heads, channels]`. The wire sends segments in spec order."""

    name: str
    heads: int
    channels: int


class LayerSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One layer's cache, whole (all heads), as the model defines it; no memory layout."""

    kind: LayerKind
    segments: tuple[Segment, ...]
    group: int = 0
    """Cache group: layers of one group share a block table."""
    sliding_window: int | None = msgspec.field(default=None, name="window")
    """In tokens, the querying one among them: the last `sliding_window - 1` tokens of a prompt are ever read again, and
    of a group whose layers all have a sliding window only those are sent. Peers know it as `window`."""
    shares: int | None = None
    """Global index of the layer whose cache this layer reads (cross-layer KV sharing); it has no memory of its own."""

    def __post_init__(self) -> None:
        _freeze(self, "segments", "segments", Segment)
        for segment in self.segments:
            if segment.heads < 1 or segment.channels < 1:
                raise InputError(f"segment {segment.name!r} has {segment.heads} heads of {segment.channels} channels")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise InputError(f"sliding window of {self.sliding_window} tokens")

    @classmethod
    def kv(
        cls,
        heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        *,
        group: int = 0,
        sliding_window: int | None = None,
        shares: int | None = None,
    ) -> LayerSpec:
        """MHA, GQA or MQA: keys `heads x head_dim` and values `heads x v_head_dim` (default `head_dim`) a token."""
        segments = (Segment("k", heads, head_dim), Segment("v", heads, v_head_dim or head_dim))
        return cls("kv", segments, group, sliding_window, shares)

    @classmethod
    def latent(cls, latent_dim: int, rope_dim: int, *, group: int = 0) -> LayerSpec:
        """MLA: one head that every rank holds, `latent_dim` compressed and `rope_dim` rotary channels."""
        return cls("latent", (Segment("latent", 1, latent_dim), Segment("rope", 1, rope_dim)), group)

    @classmethod
    def state(cls, heads: int, bytes_per_head: int | Mapping[str, int], *, group: int = 0) -> LayerSpec:
        """Mamba, linear attention and the like: opaque bytes, one record a request, split over ranks by head.

        One head count splits all of it. A state of several parts, such as Mamba's convolution over [x, B, C] and its
        SSM state, is cut wrongly by one byte count: give a mapping from part to its bytes a head. A part that ranks do
        not split (B and C of one group) looks like one that they do split, so such a model needs the same tensor
        parallelism on both sides.
        """
        parts = bytes_per_head if isinstance(bytes_per_head, Mapping) else {"state": bytes_per_head}
        return cls("state", tuple(Segment(name, heads, size) for name, size in parts.items()), group)


class KVSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """KV geometry of a model: its layers in order. Equal on both sides, or the handshake rejects."""

    layers: tuple[LayerSpec, ...]

    def __post_init__(self) -> None:
        _freeze(self, "layers", "layers", LayerSpec)
        for place, layer in enumerate(self.layers):
            if layer.shares is not None and not (0 <= layer.shares < len(self.layers) and layer.shares != place):
                raise InputError(f"layer {place} shares the cache of layer {layer.shares}, which does not exist")
            if layer.group < 0:
                raise InputError(f"layer {place} is in cache group {layer.group}")

    @classmethod
    def uniform(cls, num_layers: int, num_kv_heads: int, head_dim: int, v_head_dim: int | None = None) -> KVSpec:
        """A model with equal layers in one cache group (Llama, Mistral, Qwen). Raises `InputError`."""
        if not isinstance(num_layers, SupportsIndex) or index(num_layers) < 1:
            raise InputError(f"num_layers {num_layers!r}: a whole number from 1")
        return cls((LayerSpec.kv(num_kv_heads, head_dim, v_head_dim),) * num_layers)

    @cached_property
    def num_groups(self) -> int:
        """Cache groups; a request has one list of block ids for each."""
        return max((layer.group for layer in self.layers), default=-1) + 1

    @cached_property
    def state_groups(self) -> frozenset[int]:
        """Cache groups whose layers hold one record a request."""
        return frozenset(layer.group for layer in self.layers if layer.kind == "state")

    @cached_property
    def sliding_windows(self) -> tuple[int | None, ...]:
        """By cache group the widest sliding window; `None` where a layer of it has none."""
        found: list[int | None] = []
        for group in range(self.num_groups):
            windows = [layer.sliding_window for layer in self.layers if layer.group == group]
            bounded = [window for window in windows if window is not None]
            found.append(max(bounded) if bounded and len(bounded) == len(windows) else None)
        return tuple(found)

    def group_of(self, layer: int) -> int:
        """Cache group of a global layer index."""
        return self.layers[layer].group

    def owned(self, layers: Interval) -> list[int]:
        """The layers of an interval that have a cache of their own."""
        return [layer for layer in range(*layers) if self.layers[layer].shares is None]

    def per_group(self, name: str, value: int | Sequence[int]) -> list[int]:
        """A number that may be given once or for each cache group, for each. Raises `InputError` below 1."""
        plain: Any = value.tolist() if hasattr(value, "tolist") else value  # NumPy's and PyTorch's
        try:
            once = isinstance(plain, SupportsIndex)
            values = [index(plain)] * self.num_groups if once else [index(at) for at in plain]
        except TypeError:
            raise InputError(f"{name} is an integer, or one for each cache group, not {value!r}") from None
        if len(values) != self.num_groups or min(values, default=0) < 1:
            raise InputError(f"{name} {value}: from 1, and one or as many as cache groups ({self.num_groups})")
        return values


class Interval(NamedTuple):
    """Half-open `[start, stop)`."""

    start: int
    stop: int

    def __and__(self, other: Interval) -> Interval:
        start = max(self.start, other.start)
        return Interval(start, max(start, min(self.stop, other.stop)))

    @property
    def size(self) -> int:
        return self.stop - self.start


class Shard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one rank holds: a range of global layers, and for each layer of the spec a range of global heads."""

    layers: Interval
    heads: tuple[Interval, ...]
    """Per global layer, also for layers outside `layers`, so that the rule that split them can be read off."""

    @classmethod
    def whole(cls, spec: KVSpec) -> Shard:
        """One rank that holds everything."""
        return cls.of(spec)

    @classmethod
    def of(
        cls,
        spec: KVSpec,
        tp: int = 1,
        tp_rank: int = 0,
        pp: int = 1,
        pp_rank: int = 0,
        stages: Sequence[int] | None = None,
    ) -> Shard:
        """Shard of rank (`tp_rank`, `pp_rank`). `stages`: layers of each pipeline stage; default as even as possible.

        `h` heads over `tp` ranks: rank `r` holds `[r*h//tp, (r+1)*h//tp)`, and where `tp > h` the one head `r*h//tp`,
        so ranks replicate heads. This is the rule of the engines wherever they accept the pair.
        """
        if not (0 <= tp_rank < tp and 0 <= pp_rank < pp):
            raise InputError(f"rank tp {tp_rank} of {tp}, pp {pp_rank} of {pp} does not exist")
        num_layers = len(spec.layers)
        sizes = (
            list(stages)
            if stages is not None
            else [(r + 1) * num_layers // pp - r * num_layers // pp for r in range(pp)]
        )
        if len(sizes) != pp or sum(sizes) != num_layers or min(sizes) < 0:
            raise InputError(f"pipeline stages {sizes} do not split {num_layers} layers over pp {pp}")
        start = sum(sizes[:pp_rank])
        return cls(
            Interval(start, start + sizes[pp_rank]),
            tuple(head_interval(layer.segments[0].heads, tp, tp_rank) for layer in spec.layers),
        )

    @classmethod
    def ranks(cls, spec: KVSpec, tp: int = 1, pp: int = 1, stages: Sequence[int] | None = None) -> tuple[Shard, ...]:
        """Shards of all ranks of an instance, rank `pp_rank * tp + tp_rank`, as engines number them."""
        if not isinstance(tp, SupportsIndex) or not isinstance(pp, SupportsIndex) or tp < 1 or pp < 1:
            raise InputError(f"tp and pp are integers from 1, not {tp!r} and {pp!r}")
        return tuple(cls.of(spec, tp, t, pp, p, stages) for p in range(pp) for t in range(tp))


def _freeze(struct: msgspec.Struct, field: str, what: str, kind: type) -> None:
    """Accept a list in place of a tuple; reject what is not a sequence of `kind`."""
    value = getattr(struct, field)
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, kind) for item in value):
        raise InputError(f"{what} are a sequence of {kind.__name__}, not {value!r}")
    msgspec.structs.force_setattr(struct, field, tuple(value))


def head_interval(heads: int, tp: int, rank: int) -> Interval:
    """Global heads of one tensor-parallel rank; at least one (see `Shard.of`)."""
    start = rank * heads // tp
    return Interval(start, max((rank + 1) * heads // tp, start + 1))
