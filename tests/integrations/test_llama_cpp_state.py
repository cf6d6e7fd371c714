"""The form of llama.cpp's states, and its order of channels, without llama.cpp: `tests/engines` has it."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from hetkv.errors import UnsupportedError
from hetkv.integrations.llama_cpp.state import Part, StateForm

FORMS = [
    StateForm(0xAF143CD8, 1, (Part(0, 64, 0), Part(0, 64, 0), Part(0, 32, 0), Part(0, 32, 0))),
    StateForm(0xAF143CD8, 4, (Part(1, 16, 0), Part(1, 24, 2))),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sequence", [0, 3])
def test_a_state_is_read_as_it_is_made(form: StateForm, sequence: int) -> None:
    state, parts = form.make(sequence, 5)
    for number, part in enumerate(parts):
        part[:] = number + 1
    assert [len(part) for part in parts] == [5 * part.row for part in form.parts]
    assert StateForm.parse(state, sequence, 5) == form
    assert [set(part.tolist()) for part in form.data(state, sequence, 5)] == [
        {number + 1} for number in range(len(parts))
    ]


def test_bytes_of_a_state() -> None:
    """Written by hand from the table in `state.py`: two streams, sequence 1, two tokens, one layer, V transposed."""
    by_hand = struct.pack("<IiI", 7, 1, 2)
    by_hand += struct.pack("<I", 0) + struct.pack("<I", 2) + struct.pack("<iIi", 0, 1, 1) + struct.pack("<iIi", 1, 1, 1)
    by_hand += struct.pack("<II", 1, 1)
    by_hand += struct.pack("<iQ", 0, 8) + bytes(16)
    by_hand += struct.pack("<iII", 0, 4, 2) + bytes(16)
    form = StateForm(7, 2, (Part(0, 8, 0), Part(0, 8, 4)))
    assert form.make(1, 2)[0].tobytes() == by_hand


@pytest.mark.parametrize("at", [8, 12, 16, 24, 40, 44, 56])
def test_another_form_is_rejected(at: int) -> None:
    """One field changed: streams, cells, a position, the V's form, layers, a row's size."""
    state, _ = FORMS[0].make(0, 2)
    state[at] ^= 0x3
    with pytest.raises(UnsupportedError, match=r"llama\.cpp's state"):
        StateForm.parse(state, 0, 2)


def test_what_is_cut_or_longer_is_rejected() -> None:
    state, _ = FORMS[0].make(0, 2)
    for wrong in (state[:-1], state[:30], state[:4], np.append(state, np.zeros(4, np.uint8))):
        with pytest.raises(UnsupportedError, match=r"llama\.cpp's state"):
            StateForm.parse(wrong, 0, 2)


def test_interleaved_rows() -> None:
    """Row c of a head's first half and row c of its second become neighbours."""
    gguf_file = pytest.importorskip("hetkv.integrations.llama_cpp.gguf_file", reason="gguf is not installed")
    heads, half = 2, 3
    rows = np.arange(heads * 2 * half)[:, None] * np.ones((1, 4))
    moved = gguf_file.interleave(rows, heads)[:, 0].tolist()
    for head in range(heads):
        first = head * 2 * half
        assert moved[first : first + 2 * half] == [first, first + 3, first + 1, first + 4, first + 2, first + 5]
