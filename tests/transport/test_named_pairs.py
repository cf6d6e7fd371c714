"""Every named pair works, byte for byte, or is rejected with its reason; docs/compatibility.md says so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.transport.named_pairs import ALL, Pair
from tests.transport.named_pairs_run import DOCUMENT, document, run


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The oracle's tensors are tiny: handing them to threads costs more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("pair", ALL, ids=lambda pair: pair.name.replace(" ", "-"))
def test_pair(pair: Pair) -> None:
    outcome = run(pair)
    assert outcome.result == ("rejected" if pair.rejected else "identical"), outcome.how


def test_names_are_distinct() -> None:
    assert len({pair.name for pair in ALL}) == len(ALL)


def test_the_document_is_what_the_transfers_say() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "run: python tests/transport/named_pairs_run.py"
