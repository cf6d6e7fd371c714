"""Blocks of one instance's pool: `BlockManager`. Free, of one sequence, or a prefix that sequences share.

It is `hetkv.simulator.kv.KVBlocks` with block ids: the same calls hand out the same numbers of blocks, which a test
checks. All ranks and all cache groups of an instance use the same ids, so one list names a sequence's blocks.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from hetkv.errors import InputError


class BlockManager:
    """Hands out blocks `0` to `count - 1` of `block_size` tokens.

    A prefix is a chain of hashes (see `prefix_hashes`), each for `unit` tokens; `unit` 0 shares nothing. A hash that no
    sequence holds stays until its room is needed; the least recently used goes first.
    """

    def __init__(self, count: int, block_size: int, unit: int = 0) -> None:
        if unit % block_size:
            raise InputError(f"blocks of {block_size} tokens do not divide prefixes of {unit}")
        self.total, self.block_size, self.unit = count, block_size, unit
        self._per_unit = unit // block_size
        self._free = list(range(count))[::-1]
        self._holders: dict[int, int] = {}
        self._idle: dict[int, None] = {}
        self._blocks: dict[int, list[int]] = {}  # of a hash, held or idle
        self._news: tuple[list[int], list[int]] = [], []

    @property
    def free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def available(self) -> int:
        """Blocks that `take` can hand out now."""
        return len(self._free) + len(self._idle) * self._per_unit

    @property
    def hashes(self) -> list[int]:
        """All that are cached, held or idle."""
        return list(self._blocks)

    def blocks_of(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self.block_size)

    def take(self, count: int) -> list[int] | None:
        """`count` blocks, of idle prefixes if it must; None and no change where there are not enough."""
        if count > self.available:
            return None
        while count > len(self._free):
            oldest = next(iter(self._idle))
            del self._idle[oldest]
            self._free += reversed(self._blocks.pop(oldest))
            self._news[1].append(oldest)
        return [self._free.pop() for _ in range(count)]

    def give(self, blocks: Sequence[int]) -> None:
        """Take back blocks that were handed out."""
        self._free += reversed(blocks)

    def match(self, hashes: Sequence[int], tokens: int) -> int:
        """How many leading hashes are here, at least one of the `tokens` left to compute."""
        if not self.unit:
            return 0
        limit = min(len(hashes), (tokens - 1) // self.unit)
        return next((i for i in range(limit) if hashes[i] not in self._blocks), limit)

    def hold(self, hashes: Sequence[int]) -> list[int]:
        """Keep these hashes, all present, until `drop`; their blocks in the order of tokens."""
        for key in hashes:
            self._idle.pop(key, None)
            self._holders[key] = self._holders.get(key, 0) + 1
        return [block for key in hashes for block in self._blocks[key]]

    def drop(self, hashes: Sequence[int]) -> None:
        """End a `hold`. The end of a chain is given up before its beginning."""
        for key in reversed(hashes):
            self._holders[key] -= 1
            if not self._holders[key]:
                del self._holders[key]
                self._idle[key] = None

    def share(self, hashes: Sequence[int], held: int, tokens: int, blocks: Sequence[int]) -> int:
        """Turn full blocks of a sequence into shared ones, held by it; how many hashes it holds now.

        `hashes[:held]` are held already. The rest, up to its first `tokens`, is shared as far as no other sequence
        shared the same content before: a duplicate stays the sequence's own, and ends the chain here.
        """
        limit = min(len(hashes), tokens // self.unit) if self.unit else 0
        for place in range(held, limit):
            key = hashes[place]
            if key in self._blocks:
                return place
            self._blocks[key] = list(blocks[place * self._per_unit : (place + 1) * self._per_unit])
            self._holders[key] = 1
            self._news[0].append(key)
        return max(held, limit)

    def news(self) -> tuple[list[int], list[int]]:
        """Hashes that came and went since the last call."""
        came, self._news = self._news, ([], [])
        return came


def prefix_hashes(tokens: Sequence[int], unit: int) -> tuple[int, ...]:
    """One 64-bit hash for each full `unit` of tokens, which stands for all tokens up to its end."""
    found, before = [], b""
    for start in range(0, len(tokens) - unit + 1, unit) if unit else ():
        text = array("q", tokens[start : start + unit]).tobytes()
        before = blake2b(before + text, digest_size=8).digest()
        found.append(int.from_bytes(before, "little"))
    return tuple(found)
