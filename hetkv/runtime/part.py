"""Which part of a model one rank computes: `Part`. Query heads follow the KV shard, so that the two are one rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hetkv.errors import InputError
from hetkv.kv.spec import Interval, Shard, head_interval
from hetkv.models import ModelConfig


class Part(NamedTuple):
    """Tensor-parallel rank `tp_rank` of pipeline stage `pp_rank`. Intervals are global; splits may be uneven."""

    tp: int
    tp_rank: int
    pp: int
    pp_rank: int
    shard: Shard
    """Layers of the stage, and the KV heads that the rank computes and keeps."""
    heads: Interval
    """Query heads: those that read the rank's KV heads. Ranks that replicate a KV head share its query heads."""
    kv_heads: Interval
    replicas: int
    """Ranks of the stage that hold the same KV heads, this one included."""
    vocab: Interval
    """Rows of the embedding (first stage) and of the head (last stage)."""

    @property
    def first(self) -> bool:
        """The rank's stage begins with the embedding."""
        return self.pp_rank == 0

    @property
    def last(self) -> bool:
        """The rank's stage ends with the logits."""
        return self.pp_rank == self.pp - 1

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        tp: int = 1,
        tp_rank: int = 0,
        pp: int = 1,
        pp_rank: int = 0,
        stages: Sequence[int] | None = None,
    ) -> Part:
        """The part of a rank; `stages` as in `Shard.of`. `InputError` where a rank or a stage would have nothing."""
        if tp < 1 or pp < 1:
            raise InputError(f"TP {tp}, PP {pp}: both must be at least 1")
        experts = config.experts
        inner = [config.intermediate_size] + ([] if experts is None else [experts.inner, experts.shared_inner])
        for name, count in (
            ("query heads", config.num_heads),
            ("inner channels", min(size for size in inner if size)),
            ("tokens of vocabulary", config.vocab_size),
        ):
            if tp > count:
                raise InputError(f"TP {tp}: the model has {count} {name}, each rank needs at least one")
        if pp > config.num_layers:
            raise InputError(f"PP {pp}: the model has {config.num_layers} layers, each stage needs at least one")
        if stages is not None and (len(stages) != pp or sum(stages) != config.num_layers or min(stages) < 1):
            split = "+".join(map(str, stages))
            raise InputError(f"stages {split} do not split {config.num_layers} layers over PP {pp}")
        spec = config.kv_spec()
        kv_heads = spec.layers[0].segments[0].heads
        return cls(
            tp,
            tp_rank,
            pp,
            pp_rank,
            Shard.of(spec, tp, tp_rank, pp, pp_rank, stages),
            query_heads(config.num_heads, kv_heads, tp, tp_rank),
            head_interval(kv_heads, tp, tp_rank),
            len(_replicas(kv_heads, tp, tp_rank)),
            even(config.vocab_size, tp, tp_rank),
        )


def even(count: int, tp: int, rank: int) -> Interval:
    """`count` things over `tp` ranks, as even as can be."""
    return Interval(rank * count // tp, (rank + 1) * count // tp)


def query_heads(heads: int, kv_heads: int, tp: int, rank: int) -> Interval:
    """Query heads of a rank: all that read its KV heads, shared evenly with the ranks that hold the same ones."""
    mine = head_interval(kv_heads, tp, rank)
    replicas = _replicas(kv_heads, tp, rank)
    group = heads // kv_heads
    start, stop = even(mine.size * group, len(replicas), replicas.index(rank))
    return Interval(mine.start * group + start, mine.start * group + stop)


def _replicas(kv_heads: int, tp: int, rank: int) -> list[int]:
    """Ranks that hold the same KV heads."""
    mine = head_interval(kv_heads, tp, rank)
    return [other for other in range(tp) if head_interval(kv_heads, tp, other) == mine]
