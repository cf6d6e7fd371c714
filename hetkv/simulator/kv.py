"""KV blocks of one instance: held by requests, kept for reuse of a prefix, or free."""

from __future__ import annotations

from hetkv.errors import InputError


class KVBlocks:
    """Counts blocks; never their contents. `total = free + held by requests + shared prefix blocks`.

    A prefix is a chain of hashes, each for `hash_tokens` tokens (`hash_tokens / block_size` blocks). A hash with no
    holder stays until its room is needed; the least recently used goes first.
    """

    __slots__ = ("_holders", "_idle", "_per_hash", "block_size", "free", "hash_tokens", "total")

    def __init__(self, total: int, block_size: int, hash_tokens: int = 0) -> None:
        if hash_tokens % block_size:
            raise InputError(f"block_size {block_size} does not divide the trace's {hash_tokens}-token hash blocks")
        self.total = total
        self.free = total
        self.block_size = block_size
        self.hash_tokens = hash_tokens
        self._per_hash = hash_tokens // block_size
        self._holders: dict[int, int] = {}
        self._idle: dict[int, None] = {}

    @property
    def available(self) -> int:
        """Blocks that `take` can hand out now."""
        return self.free + len(self._idle) * self._per_hash

    @property
    def shared(self) -> int:
        """Blocks in the prefix cache, held or idle."""
        return (len(self._holders) + len(self._idle)) * self._per_hash

    def take(self, blocks: int) -> bool:
        """Hand out `blocks`, dropping idle prefixes if it must; False and no change where there are not enough."""
        if blocks > self.free:
            if blocks > self.available:
                return False
            idle = self._idle
            while blocks > self.free:
                del idle[next(iter(idle))]
                self.free += self._per_hash
        self.free -= blocks
        return True

    def give(self, blocks: int) -> None:
        """Take back `blocks` that were handed out."""
        self.free += blocks

    def match(self, hashes: tuple[int, ...], tokens: int) -> int:
        """How many leading hashes are here, at least one of the `tokens` left to compute."""
        limit = min(len(hashes), (tokens - 1) // self.hash_tokens)
        holders, idle = self._holders, self._idle
        for i in range(limit):
            if hashes[i] not in holders and hashes[i] not in idle:
                return i
        return limit

    def hold(self, hashes: tuple[int, ...]) -> None:
        """Keep these hashes, all present, until `drop`."""
        for key in hashes:
            self._idle.pop(key, None)
            self._holders[key] = self._holders.get(key, 0) + 1

    def drop(self, hashes: tuple[int, ...]) -> None:
        """End a `hold`. The end of a chain is given up before its beginning."""
        for key in reversed(hashes):
            left = self._holders[key] - 1
            if left:
                self._holders[key] = left
            else:
                del self._holders[key]
                self._idle[key] = None

    def share(self, hashes: tuple[int, ...], held: int, tokens: int) -> int:
        """Turn a request's own full blocks into shared ones, held by it; returns how many more hashes it holds now.

        `hashes[:held]` are held already. The rest, up to its `tokens`, is shared as far as no other request shared
        the same content before: a duplicate stays the request's own, and ends the chain here.
        """
        limit = min(len(hashes), tokens // self.hash_tokens)
        added = 0
        for key in hashes[held:limit]:
            if key in self._holders or key in self._idle:
                break
            self._holders[key] = 1
            added += 1
        return added

    def reset(self) -> None:
        """Everything is lost: all blocks are free and the prefix cache is empty."""
        self.free = self.total
        self._holders.clear()
        self._idle.clear()
