"""The shards of an instance's ranks, as a node's caller names them: `instance_shards_of`."""

from __future__ import annotations

from collections.abc import Sequence

from hetkv.errors import InputError
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import Shard


def instance_shards_of(pool: KVPool, rank: int, tp: int, pp: int, given: Sequence[Shard]) -> tuple[Shard, ...]:
    """Shards of all ranks of the instance; none where this rank is alone. Raises `InputError`."""
    if given:
        if (tp, pp) != (1, 1):
            raise InputError("give tp and pp, or instance_shards, not both")
        shards = tuple(given)
    elif (tp, pp) == (1, 1):
        if rank:
            raise InputError(f"rank {rank} of an instance of one rank: give tp and pp, or instance_shards")
        return ()
    else:
        shards = Shard.ranks(pool.spec, tp, pp)
    if not 0 <= rank < len(shards):
        raise InputError(f"rank {rank} of an instance of {len(shards)} ranks")
    if shards[rank] != pool.shard:
        raise InputError(
            f"the pool is not that of rank {rank} of {len(shards)}: its shard is {pool.shard}, that of the rank "
            f"{shards[rank]}; make it with shard=Shard.ranks(spec, tp, pp)[rank], or give instance_shards"
        )
    return shards
