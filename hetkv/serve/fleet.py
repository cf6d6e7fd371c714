"""hetkv's own instances as the HTTP side asks them: `Fleet`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from hetkv.errors import ApiError, GenerationError, InputError
from hetkv.runtime.chat import ChatTemplate
from hetkv.runtime.tokenizer import LONG_TEXT, TextTokenizer, TokenIds
from hetkv.serve.answer import Answer, Piece
from hetkv.serve.app import unless_gone
from hetkv.serve.errors import error_body
from hetkv.serve.formats import Format
from hetkv.serve.protocol import Call, parse
from hetkv.serve.scheduler import Scheduler


class Fleet:
    """A scheduler over hetkv's own instances. Implements `Engines`."""

    def __init__(
        self,
        scheduler: Scheduler,
        model: str,
        tokenizer: TextTokenizer | TokenIds,
        template: ChatTemplate | None,
        context: int,
    ) -> None:
        self.scheduler, self.model = scheduler, model
        self._tokenizer, self._template, self._context = tokenizer, template, context
        self._long_texts = ThreadPoolExecutor(1, "long texts")

    async def complete(self, request: Request, body: bytes, chat: bool) -> Response:
        call = parse(body, chat)
        if call.model != self.model:
            raise ApiError(
                404, f"The model `{call.model}` does not exist", code="model_not_found", param="model"
            )  # fmt: skip
        if len(body) < LONG_TEXT:
            prompts = self._prompts(call)
        else:  # in a thread, one after the other, so that instances and clients with short texts do not wait
            prompts = await asyncio.get_running_loop().run_in_executor(self._long_texts, self._prompts, call)
        longest = max(map(len, prompts))
        limit = min(self._context, self.scheduler.longest or self._context)
        most = limit - longest + (limit < self._context)  # the last token needs no KV
        if (call.max_tokens or 1) > most:
            raise ApiError(
                400,
                f"This model's maximum context length is {limit} tokens. However, you requested "
                f"{longest + (call.max_tokens or 1)} tokens ({longest} in the prompt; {call.max_tokens or 1} for the "
                "completion).",
                code="context_length_exceeded",
                param="messages" if chat else "prompt",
            )
        sampling = msgspec.structs.replace(call.sampling, max_tokens=call.max_tokens or most)
        answer = Answer(msgspec.structs.replace(call, sampling=sampling), prompts, self._tokenizer)
        pieces, form = answer.pieces(self.scheduler), Format(answer)
        # The first piece is awaited here, so that an error before it has a status of its own.
        got = await unless_gone(request, anext(pieces) if call.stream else _collected(pieces))
        if got is None:
            await pieces.aclose()
            return Response(status_code=499)
        return _Events(got, pieces, form) if call.stream else JSONResponse(form.whole(got))

    def _prompts(self, call: Call) -> list[list[int]]:
        """Token ids of all prompts."""
        if call.chat:
            if self._template is None:
                raise ApiError(400, f"The model `{self.model}` has no chat template", code="no_chat_template")
            try:
                text = self._template.render(call.messages)
            except InputError as error:
                raise ApiError(400, str(error), param="messages") from None
            return [self._tokenizer.encode(text, special_tokens=False)]
        found = []
        for prompt in call.prompts:
            ids = self._tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
            if not ids:
                raise ApiError(400, "prompt has no tokens", param="prompt")
            if min(ids) < 0 or max(ids) >= self._tokenizer.vocab_size:
                raise ApiError(400, "prompt has a token id outside the vocabulary", param="prompt")
            found.append(ids)
        return found

    async def models(self) -> dict[str, Any]:
        return {
            "object": "list",
            "data": [{"id": self.model, "object": "model", "created": 0, "owned_by": "hetkv"}],
        }

    async def health(self) -> tuple[bool, dict[str, Any]]:
        members = self.scheduler.members.values()
        ready = any(m.up and m.role == "aggregated" for m in members) or all(
            any(m.up and m.role == role for m in members) for role in ("prefill", "decode")
        )
        detail = {m.name: {"role": m.role, "up": m.up, "requests": m.requests} for m in members}
        return ready, {"instances": detail, "rejected": self.scheduler.rejected}


async def _collected(pieces: AsyncGenerator[Piece]) -> list[Piece]:
    return [piece async for piece in pieces]


class _Events(StreamingResponse):
    """Server-sent events of an answer, which is given up however the response ends."""

    def __init__(self, first: Piece, pieces: AsyncGenerator[Piece], form: Format) -> None:
        super().__init__(_events(first, pieces, form), media_type="text/event-stream",
                         headers={"Cache-Control": "no-cache"})  # fmt: skip
        self._pieces = pieces

    async def __call__(self, *asgi: Any) -> None:
        try:
            await super().__call__(*asgi)
        finally:
            await self._pieces.aclose()


async def _events(first: Piece, pieces: AsyncGenerator[Piece], form: Format) -> AsyncIterator[bytes]:
    try:
        for chunk in form.begin():
            yield _event(chunk)
        piece: Piece | None = first
        while piece is not None:
            made = form.chunk(piece)
            if made is not None:
                yield _event(made)
            piece = await anext(pieces, None)
        for chunk in form.end():
            yield _event(chunk)
        yield b"data: [DONE]\n\n"
    except GenerationError as error:
        yield _event(error_body(500, str(error)))


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"
