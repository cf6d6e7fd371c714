"""The KV pages of each request on one instance: its own, and those of a prefix that it shares."""

from __future__ import annotations

from hetkv.simulator.kv import KVBlocks
from hetkv.simulator.pages import Pages
from hetkv.simulator.request import Request


class RequestKV:
    """Takes pages out of `kv` for requests, as many as `pages` says."""

    __slots__ = ("kv", "pages")

    def __init__(self, kv: KVBlocks, pages: Pages) -> None:
        self.kv = kv
        self.pages = pages

    def cached_prefix(self, request: Request) -> tuple[int, ...]:
        """The leading hashes of the request's prompt that are in the prefix cache."""
        if self.kv.hash_tokens and request.hashes:
            return request.hashes[: self.kv.match(request.hashes, request.target)]
        return ()

    def needed(self, tokens: int, held: tuple[int, ...]) -> int:
        """Pages of its own that a request with `tokens` in the cache needs, in addition to the prefix `held`."""
        pages = self.pages.kept(tokens)
        return pages - self._of_prefix(held) if held else pages

    def computing(self, computed: int, tokens: int, held: tuple[int, ...]) -> int:
        """The same while a step computes `tokens` of its prompt after `computed` ones."""
        pages = self.pages.computing(computed, tokens)
        return pages - self._of_prefix(held) if held else pages

    def _of_prefix(self, held: tuple[int, ...]) -> int:
        return len(held) * self.kv.hash_tokens // self.kv.block_size

    def grow(self, request: Request, tokens: int) -> bool:
        """Take pages for a step that computes `tokens` more; False and no change where there are not enough."""
        more = self.computing(request.computed, tokens, request.held) - request.blocks
        if self.kv.take(more):
            request.blocks += more
            return True
        return False

    def settle(self, request: Request) -> bool:
        """The prompt is computed: give back what the request keeps no longer. Whether that was anything."""
        left = request.blocks - self.needed(request.computed, request.held)
        self.kv.give(left)
        request.blocks -= left
        return left > 0

    def sync(self, request: Request) -> None:
        """A decode batch takes pages as a whole; work out how many of them are this request's."""
        request.blocks = self.needed(request.prompt + request.generated - 1, request.held)

    def share(self, request: Request) -> None:
        """Enter the request's full prompt blocks in the prefix cache."""
        if self.kv.hash_tokens and request.hashes:
            held = len(request.held)
            held += self.kv.share(request.hashes, held, min(request.prompt, request.computed))
            request.blocks -= (held - len(request.held)) * self.kv.hash_tokens // self.kv.block_size
            request.held = request.hashes[:held]

    def free(self, request: Request) -> None:
        """Give back all pages of the request."""
        self.kv.give(request.blocks)
        if request.held:
            self.kv.drop(request.held)
        request.blocks, request.held = 0, ()
