"""Text to token ids and back, by the checkpoint's own `tokenizer.json`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from hetkv.errors import InputError
from hetkv.models.fields import load_object

LONG_TEXT = 1 << 14
"""Characters."""


class TextTokenizer:
    """A thin cover of `tokenizers.Tokenizer`, which neither truncates nor pads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        # A file remembers how it was last used, which says nothing about the next text.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, directory: Path | str) -> TextTokenizer:
        """Read `tokenizer.json` of a checkpoint directory.

        `InputError` names the file if it is missing or broken, and a token that `tokenizer_config.json` adds to it.
        """
        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{path}: not a readable tokenizer ({error})") from None
        _check_added(path.with_name("tokenizer_config.json"), tokenizer)
        return cls(tokenizer)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """Token ids, by default with the special tokens that the checkpoint puts around a text (such as BOS).

        Other threads run while a long text is encoded.
        """
        if len(text) < LONG_TEXT:
            return list(self._tokenizer.encode(text, add_special_tokens=special_tokens).ids)
        [found] = self._tokenizer.encode_batch_fast([text], add_special_tokens=special_tokens)
        return list(found.ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens. Incomplete UTF-8 characters become the replacement character."""
        return str(self._tokenizer.decode(list(token_ids)))

    def token(self, token_id: int) -> str:
        """Text of one token alone, special ones too. A part of a character becomes the replacement character."""
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False))

    def stream(self) -> TextStream:
        """For tokens that come one by one."""
        return TextStream(self._tokenizer)


class TextStream:
    """Text of tokens as they come: each piece once it is whole characters. Special tokens have no text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._sent = 0

    def push(self, token_id: int, last: bool = False) -> str:
        """What the token adds; empty where its characters are not whole yet. The `last` one brings what is left."""
        self._ids.append(token_id)
        text = self._stream.step(self._tokenizer, token_id) or ""
        self._sent += len(text)
        return text + str(self._tokenizer.decode(self._ids))[self._sent :] if last else text


class TokenIds:
    """In place of a `TextTokenizer` where there is none: the text is token ids, ` 17 4 23`."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """Raises `InputError` for what is no number."""
        try:
            return [int(word) for word in text.split()]
        except ValueError:
            raise InputError("the model has no tokenizer: its text is token ids, such as `17 4 23`") from None

    def token(self, token_id: int) -> str:
        """Text of one token."""
        return f" {token_id}"

    def stream(self) -> TokenIds:
        """For tokens that come one by one."""
        return self

    def push(self, token_id: int, last: bool = False) -> str:
        """What the token adds."""
        return self.token(token_id)


def _check_added(path: Path, tokenizer: Tokenizer) -> None:
    """Added tokens of `tokenizer_config.json` must be in `tokenizer.json`: others would be lost."""
    if not path.is_file():
        return
    added: Any = load_object(path).get("added_tokens_decoder") or {}
    if not isinstance(added, dict):
        raise InputError(f"{path}: `added_tokens_decoder` must be an object")
    for number, token in added.items():
        content = token.get("content") if isinstance(token, dict) else None
        if not isinstance(content, str) or tokenizer.token_to_id(content) != (
            int(number) if number.isdigit() else None
        ):
            raise InputError(f"{path}: added token {content!r} with id {number} is not in tokenizer.json as such")
