"""The bytes of a sequence's state, as `llama_state_seq_get_data` writes and `llama_state_seq_set_data` reads them.

    magic u32, sequence i32, streams u32
    for each stream: cells u32, and of the stream that has the sequence
        for each cell: position i32, 1 u32, sequence i32
        V is transposed u32, layers u32
        for each layer: type i32, bytes of a row u64, rows of K
        for each layer: type i32, bytes of a row u64, rows of V            (not transposed)
                    or: type i32, bytes of an element u32, rows u32, V     (transposed: a row for each channel)

llama.cpp keeps this form to itself and may change it. So it is not believed: `StateForm.parse` reads a state that the
context itself wrote, and `set_data` is given only what was checked against that.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hetkv.errors import UnsupportedError

Bytes = npt.NDArray[np.uint8]
MAX_LAYERS = 10_000


class Part(NamedTuple):
    """K or V of one layer."""

    type: int
    """A `ggml_type`."""
    row: int
    """Bytes of one token."""
    element: int
    """Bytes of one element where the memory is transposed, otherwise 0."""

    @property
    def head(self) -> bytes:
        if self.element:
            return struct.pack("<iII", self.type, self.element, self.row // self.element)
        return struct.pack("<iQ", self.type, self.row)


class StateForm(NamedTuple):
    """What the states of all sequences of a context have in common."""

    magic: int
    streams: int
    parts: tuple[Part, ...]
    """K of all layers, then V of all layers."""

    @property
    def transposed(self) -> bool:
        """V is."""
        return self.parts[-1].element > 0

    @classmethod
    def parse(cls, data: Bytes, sequence: int, tokens: int) -> StateForm:
        """Of the state of a sequence of `tokens` tokens at positions 0, 1, 2, ... Raises `UnsupportedError`."""
        raw = data.tobytes()
        try:
            magic, _, streams = struct.unpack_from("<IiI", raw)
            at = 12 + 4 * (1 + min(sequence, streams - 1)) + 12 * tokens
            transposed, layers = struct.unpack_from("<II", raw, at)
            if transposed > 1 or not 0 < layers < MAX_LAYERS:
                raise UnsupportedError(f"llama.cpp's state has {layers} layers and a V of form {transposed}")
            at, parts = at + 8, []
            for place in range(2 * layers):
                if transposed and place >= layers:
                    kind, element, rows = struct.unpack_from("<iII", raw, at)
                    parts.append(Part(kind, element * rows, element))
                else:
                    kind, row = struct.unpack_from("<iQ", raw, at)
                    parts.append(Part(kind, row, 0))
                at += 12 + tokens * parts[-1].row
        except struct.error:
            raise UnsupportedError("llama.cpp's state ends early: this version's form of it is not known") from None
        form = cls(magic, streams, tuple(parts))
        if at + 4 * max(0, streams - 1 - sequence) != len(data) or not form._fits(data, sequence, tokens):
            raise UnsupportedError(f"llama.cpp's state of {len(data)} bytes: this version's form of it is not known")
        return form

    def make(self, sequence: int, tokens: int) -> tuple[Bytes, list[Bytes]]:
        """A state whose data is still to be filled in, and of each part the view of its `tokens * row` bytes."""
        pieces = list(self._pieces(sequence, tokens))
        state = np.zeros(sum(len(piece) if isinstance(piece, bytes) else piece for piece in pieces), np.uint8)
        for at, piece in _placed(pieces):
            if isinstance(piece, bytes):
                state[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
        return state, self.data(state, sequence, tokens)

    def data(self, state: Bytes, sequence: int, tokens: int) -> list[Bytes]:
        """Views of the parts of a state of this form."""
        placed = _placed(self._pieces(sequence, tokens))
        return [state[at : at + piece] for at, piece in placed if isinstance(piece, int)]

    def _fits(self, data: Bytes, sequence: int, tokens: int) -> bool:
        placed = _placed(self._pieces(sequence, tokens))
        return all(data[at : at + len(piece)].tobytes() == piece for at, piece in placed if isinstance(piece, bytes))

    def _pieces(self, sequence: int, tokens: int) -> Iterator[bytes | int]:
        """What a state is made of: bytes that are known, and how many of data."""
        own = min(sequence, self.streams - 1)
        cells = np.empty((tokens, 3), "<i4")
        cells[:, 0], cells[:, 1], cells[:, 2] = np.arange(tokens), 1, sequence
        yield struct.pack("<IiI", self.magic, sequence, self.streams) + bytes(4 * own)
        yield struct.pack("<I", tokens) + cells.tobytes()
        yield struct.pack("<II", self.transposed, len(self.parts) // 2)
        for part in self.parts:
            yield part.head
            yield tokens * part.row
        yield bytes(4 * (self.streams - 1 - own))


def _placed(pieces: Any) -> Iterator[tuple[int, bytes | int]]:
    """Pieces with their offsets."""
    at = 0
    for piece in pieces:
        yield at, piece
        at += len(piece) if isinstance(piece, bytes) else piece
