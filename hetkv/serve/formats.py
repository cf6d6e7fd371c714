"""What clients get: OpenAI's objects of completions and chats, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from typing import Any

from hetkv.runtime.sampling import Token
from hetkv.runtime.tokenizer import TextTokenizer, TokenIds
from hetkv.serve.answer import Answer, Piece


class Format:
    """Of one answer."""

    def __init__(self, answer: Answer) -> None:
        self.answer, self.call = answer, answer.call
        kind = "chat.completion" if self.call.chat else "text_completion"
        self._chunk_kind = "chat.completion.chunk" if self.call.chat else kind
        self._head = {
            "id": ("chatcmpl-" if self.call.chat else "cmpl-") + uuid.uuid4().hex,
            "object": kind,
            "created": int(time.time()),
            "model": self.call.model,
        }
        self._offsets = [0] * len(answer.generations)

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        """All pieces as one object."""
        choices = []
        for number in range(len(self.answer.generations)):
            mine = [piece for piece in pieces if piece.choice == number]
            text = "".join(piece.text for piece in mine)
            choice = {
                "index": number,
                "logprobs": self._logprobs(number, [t for piece in mine for t in piece.tokens]),
                "finish_reason": mine[-1].finish,
            }
            if self.call.chat:
                choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                choice["text"] = text
            choices.append(choice)
        return {**self._head, "choices": choices, "usage": self._usage()}

    def begin(self) -> list[dict[str, Any]]:
        """Chunks before the first token: chats say who speaks."""
        if not self.call.chat:
            return []
        return [self._chunk(n, {"role": "assistant", "content": ""}) for n in range(len(self.answer.generations))]

    def chunk(self, piece: Piece) -> dict[str, Any] | None:
        """A piece as a chunk; None where it says nothing yet."""
        if not (piece.text or piece.finish or (piece.tokens and self.call.logprobs >= 0)):
            return None
        content: Any = piece.text
        if self.call.chat:
            content = {"content": piece.text} if piece.text or not piece.finish else {}
        return self._chunk(piece.choice, content, self._logprobs(piece.choice, piece.tokens), piece.finish or None)

    def end(self) -> list[dict[str, Any]]:
        """Chunks after the last token."""
        if not self.call.usage:
            return []
        return [{**self._head, "object": self._chunk_kind, "choices": [], "usage": self._usage()}]

    def _chunk(self, number: int, content: Any, logprobs: Any = None, finish: str | None = None) -> dict[str, Any]:
        name = "delta" if self.call.chat else "text"
        choice = {"index": number, name: content, "logprobs": logprobs, "finish_reason": finish}
        chunk = {**self._head, "object": self._chunk_kind, "choices": [choice]}
        if self.call.usage:
            chunk["usage"] = self._usage() if self.call.continuous_usage else None
        return chunk

    def _usage(self) -> dict[str, Any]:
        prompt, completion = self.answer.prompt_tokens, self.answer.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _logprobs(self, number: int, tokens: list[Token]) -> Any:
        if self.call.logprobs < 0:
            return None
        tokenizer = self.answer.tokenizer
        if self.call.chat:
            return {"content": [_chat_logprob(tokenizer, token) for token in tokens], "refusal": None}
        texts = [tokenizer.token(token.id) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets[number])
            self._offsets[number] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [_completion_likeliest(tokenizer, token) for token in tokens],
            "text_offset": offsets,
        }


def _completion_likeliest(tokenizer: TextTokenizer | TokenIds, token: Token) -> dict[str, float | None]:
    """The likeliest tokens and the chosen one, as OpenAI gives them."""
    return {tokenizer.token(other): log for other, log in (*token.likeliest, (token.id, token.logprob))}


def _chat_logprob(tokenizer: TextTokenizer | TokenIds, token: Token) -> dict[str, Any]:
    likeliest = [_entry(tokenizer, other, log) for other, log in token.likeliest]
    return {**_entry(tokenizer, token.id, token.logprob), "top_logprobs": likeliest}


def _entry(tokenizer: TextTokenizer | TokenIds, token: int, logprob: float | None) -> dict[str, Any]:
    text = tokenizer.token(token)
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
