"""Tokens chosen from logits: greedy, seeded, and gone on with elsewhere."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from hetkv.errors import InputError
from hetkv.integrations.sampling import Sampling, choose, divergence, log_softmax

LOGITS = np.array([1.0, 3.0, 3.0, -2.0, 0.5], np.float32)


def test_greedy() -> None:
    chosen = choose(LOGITS, Sampling())
    assert chosen.token == 1
    assert chosen.logprob == pytest.approx(float(np.log(np.exp(3) / np.exp(LOGITS.astype(float)).sum())))


def test_what_comes_next_depends_on_seed_and_number_alone() -> None:
    """So that another instance goes on as the first would have."""
    sampling, seen = Sampling(temperature=1.0, seed=5), []
    for _ in range(20):
        seen.append(choose(LOGITS, sampling).token)
        sampling = sampling.after()
    again = [choose(LOGITS, Sampling(temperature=1.0, seed=5, drawn=number)).token for number in range(20)]
    assert again == seen
    assert len(set(seen)) > 1


def test_frequencies() -> None:
    """Those of the softmax; with top-k, of the most probable alone."""
    drawn = Counter(choose(LOGITS, Sampling(temperature=2.0, drawn=number)).token for number in range(4000))
    expected = np.exp(log_softmax(LOGITS / 2))
    assert [drawn[token] / 4000 for token in range(5)] == pytest.approx(list(expected), abs=0.03)
    assert {choose(LOGITS, Sampling(temperature=9.0, top_k=2, drawn=number)).token for number in range(200)} == {1, 2}


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"seed": -1}])
def test_what_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError):
        Sampling(**wrong)


def test_divergence() -> None:
    p, q = log_softmax(LOGITS), log_softmax(LOGITS[::-1])
    assert divergence(p, p) == 0
    assert divergence(p, q) == pytest.approx(float((np.exp(p) * (p - q)).sum()))
