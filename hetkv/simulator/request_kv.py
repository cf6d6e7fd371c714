"""The KV blocks of each request on one instance: its own, and those of a prefix that it shares."""

from __future__ import annotations

from hetkv.simulator.kv import KVBlocks
from hetkv.simulator.request import Request


class RequestKV:
    """Takes blocks out of `kv` for requests. A sequence needs `state_blocks` in addition to those of its tokens."""

    __slots__ = ("kv", "state_blocks")

    def __init__(self, kv: KVBlocks, state_blocks: int) -> None:
        self.kv = kv
        self.state_blocks = state_blocks

    def cached_prefix(self, request: Request) -> tuple[int, ...]:
        """The leading hashes of the request's prompt that are in the prefix cache."""
        if self.kv.hash_tokens and request.hashes:
            return request.hashes[: self.kv.match(request.hashes, request.target)]
        return ()

    def needed(self, tokens: int, held: tuple[int, ...]) -> int:
        """Blocks of its own that a request with `tokens` in the cache needs, in addition to the prefix `held`."""
        return (
            self.state_blocks - (-tokens // self.kv.block_size) - len(held) * self.kv.hash_tokens // self.kv.block_size
        )

    def grow(self, request: Request, tokens: int) -> bool:
        """Take blocks for `tokens` more; False and no change where there are not enough."""
        more = self.needed(request.computed + tokens, request.held) - request.blocks
        if self.kv.take(more):
            request.blocks += more
            return True
        return False

    def sync(self, request: Request) -> None:
        """A decode batch takes blocks as a whole; work out how many of them are this request's."""
        request.blocks = self.needed(request.prompt + request.generated - 1, request.held)

    def share(self, request: Request) -> None:
        """Enter the request's full prompt blocks in the prefix cache."""
        if self.kv.hash_tokens and request.hashes:
            held = len(request.held)
            held += self.kv.share(request.hashes, held, min(request.prompt, request.computed))
            request.blocks -= (held - len(request.held)) * self.kv.hash_tokens // self.kv.block_size
            request.held = request.hashes[:held]

    def free(self, request: Request) -> None:
        """Give back all blocks of the request."""
        self.kv.give(request.blocks)
        self.kv.drop(request.held)
        request.blocks, request.held = 0, ()
