"""Text to token ids and back, by the checkpoint's own `tokenizer.json`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from hetkv.errors import InputError


class TextTokenizer:
    """A thin cover of `tokenizers.Tokenizer`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, directory: Path | str) -> TextTokenizer:
        """Read `tokenizer.json` of a checkpoint directory; `InputError` names the file if it is missing or broken."""
        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{path}: not a readable tokenizer ({error})") from None

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the checkpoint's template puts around a text (such as BOS)."""
        return list(self._tokenizer.encode(text).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens. Bytes that are no whole UTF-8 character come out as the replacement mark."""
        return str(self._tokenizer.decode(list(token_ids)))
