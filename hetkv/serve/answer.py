"""Tokens of a call's choices as text: `Choice` finds stop strings, `Answer` runs all choices of a call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import NamedTuple

import msgspec

from hetkv.errors import GenerationError
from hetkv.runtime.sampling import Token
from hetkv.runtime.tokenizer import TextTokenizer, TokenIds
from hetkv.serve.generation import Generation
from hetkv.serve.protocol import Call
from hetkv.serve.scheduler import Scheduler


class Piece(NamedTuple):
    """What one choice has got more. `tokens` may be there before their text, which waits for whole characters."""

    choice: int
    text: str
    tokens: list[Token]
    finish: str
    """Why the choice has ended (`stop`, `length`), or empty."""


class StopStrings:
    """Text up to the first of some strings. What could be the beginning of one is kept back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._kept = stops, ""
        self._longest = max(map(len, stops), default=0)

    def push(self, text: str, last: bool = False) -> tuple[str, bool]:
        """What can be sent of the text so far, and whether a stop string ended it."""
        self._kept += text
        found = [at for at in (self._kept.find(stop) for stop in self._stops) if at >= 0]
        if found:
            sent, self._kept = self._kept[: min(found)], ""
            return sent, True
        keep = 0
        if not last:
            for count in range(min(self._longest - 1, len(self._kept)), 0, -1):
                if any(stop.startswith(self._kept[-count:]) for stop in self._stops):
                    keep = count
                    break
        sent, self._kept = self._kept[: len(self._kept) - keep], self._kept[len(self._kept) - keep :]
        return sent, False


class Answer:
    """All choices of a call, as they come. Leaving the block gives up what has not ended."""

    def __init__(self, call: Call, prompts: Sequence[Sequence[int]], tokenizer: TextTokenizer | TokenIds) -> None:
        self.call, self.tokenizer = call, tokenizer
        self.prompt_tokens = sum(map(len, prompts))
        self.completion_tokens = 0
        self.generations = [
            Generation(prompt, msgspec.structs.replace(call.sampling, seed=call.sampling.seed + choice))
            for prompt in prompts
            for choice in range(call.n)
        ]
        """Choice `i` of prompt `p` is number `p * n + i`."""
        self._pieces: asyncio.Queue[Piece | GenerationError] = asyncio.Queue()

    async def pieces(self, scheduler: Scheduler) -> AsyncGenerator[Piece]:
        """Run to the end. Raises `GenerationError`, and what `Scheduler.submit` does before the first piece."""
        tasks: list[asyncio.Task[None]] = []
        try:
            for generation in self.generations:
                scheduler.submit(generation)
            tasks += [
                asyncio.create_task(self._follow(scheduler, number, one)) for number, one in enumerate(self.generations)
            ]
            left = len(tasks)
            while left:
                piece = await self._pieces.get()
                if isinstance(piece, GenerationError):
                    raise piece
                self.completion_tokens += len(piece.tokens)
                left -= bool(piece.finish)
                yield piece
        finally:
            for generation in self.generations:
                if generation.id in scheduler.generations:
                    scheduler.cancel(generation)
            for task in tasks:
                task.cancel()

    async def _follow(self, scheduler: Scheduler, number: int, generation: Generation) -> None:
        """Body of a choice's task."""
        stream, stops = self.tokenizer.stream(), StopStrings(self.call.stop)
        try:
            async for token, finish in generation:
                text, stopped = stops.push(stream.push(token.id, bool(finish)), last=bool(finish))
                if stopped:
                    scheduler.cancel(generation)
                self._pieces.put_nowait(Piece(number, text, [token], "stop" if stopped else finish))
                if stopped:
                    return
        except GenerationError as error:
            self._pieces.put_nowait(error)
