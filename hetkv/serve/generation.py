"""One sequence that a client asked for, on its way through the fleet: `Generation`."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from hetkv.errors import GenerationError
from hetkv.runtime.sampling import Sampling, Token

if TYPE_CHECKING:
    from hetkv.serve.member import Member


class Generation:
    """What the scheduler knows of a sequence. Iterating over it gives its tokens, each with why it was the last one.

    Times are `time.monotonic` seconds, `nan`-free: `None` until they are known. The names are the simulator's.
    """

    def __init__(self, prompt: Sequence[int], sampling: Sampling) -> None:
        self.id = uuid.uuid4().hex
        self.prompt = list(prompt)
        self.sampling = sampling
        self.generated: list[int] = []
        self.hashes: tuple[int, ...] | None = None
        """Of the prompt's prefixes, where the fleet caches them."""
        self.home: Member | None = None
        """Computes its tokens, or holds their KV until `peer` has it."""
        self.peer: Member | None = None
        """Decodes it."""
        self.begun = False
        """The instance that decodes it knows its first token."""
        self.left = 0
        """Tokens that `home` has still to compute."""
        self.coming = 0
        """Tokens whose KV is on its way to `peer`."""
        self.attempt = 0
        self.restarts = 0
        self.finish = ""
        self.ended = False
        self.arrival = time.monotonic()
        self.scheduled: float | None = None
        self.prefilled: float | None = None
        self.first_token: float | None = None
        self.visible: float | None = None
        self.last_token: float | None = None
        self._outputs: asyncio.Queue[tuple[Token, str] | GenerationError] = asyncio.Queue()

    @property
    def target(self) -> int:
        """Tokens to compute before the next one is known."""
        return len(self.prompt) + len(self.generated)

    @property
    def transfer(self) -> str:
        """Unique name of this attempt and of its transfer.

        Its instances know it by this name, as one that gave the attempt before up may still have KV on its way.
        """
        return f"{self.id}/{self.attempt}"

    def push(self, token: Token, finish: str) -> None:
        """A token has come."""
        now = time.monotonic()
        self.generated.append(token.id)
        self.first_token = self.first_token or now
        self.last_token = now
        self._outputs.put_nowait((token, finish))

    def fail(self, reason: str) -> None:
        """No more tokens will come."""
        self._outputs.put_nowait(GenerationError(reason))

    async def __aiter__(self) -> AsyncIterator[tuple[Token, str]]:
        """Tokens in order, up to the one with a reason. Raises `GenerationError`."""
        while True:
            output = await self._outputs.get()
            if isinstance(output, GenerationError):
                raise output
            yield output
            if output[1]:
                return
