"""Choosing tokens: greedy, temperature, top-k, top-p, seeds and logprobs, against plain definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hetkv.runtime.sampling import Draw, Sampling, sample, uniform

VOCABULARY = 50


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def draws(count: int, **settings: float) -> list[int]:
    """Tokens of one distribution, at `count` places of one seed."""
    sampling = Sampling(max_tokens=1, seed=7, **settings)  # type: ignore[arg-type]
    rows = logits(1).expand(count, -1)
    return [token.id for token in sample(rows, [Draw(sampling, place) for place in range(count)])]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1e-9}, {"temperature": 3.0, "top_k": 1}])
def test_greedy_is_the_likeliest(settings: dict[str, float]) -> None:
    rows = logits(6)
    chosen = sample(rows, [Draw(Sampling(max_tokens=1, **settings), 0)] * 6)  # type: ignore[arg-type]
    assert [token.id for token in chosen] == rows.argmax(dim=-1).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_probabilities(temperature: float) -> None:
    found = np.bincount(draws(20000, temperature=temperature), minlength=VOCABULARY) / 20000
    wanted = (logits(1)[0] / temperature).softmax(dim=-1).numpy()
    assert np.abs(found - wanted).max() < 0.015


def test_top_k_and_top_p_leave_the_likeliest() -> None:
    order = logits(1)[0].argsort(descending=True).tolist()
    assert set(draws(3000, temperature=2.0, top_k=4)) == set(order[:4])
    probabilities = logits(1)[0].softmax(dim=-1)[order]
    count = int((probabilities.cumsum(dim=-1) < 0.8).sum()) + 1
    assert set(draws(3000, temperature=1.0, top_p=0.8)) == set(order[:count])
    assert set(draws(100, temperature=1.0, top_p=1e-9)) == {order[0]}
    # The cuts are of one another: top-p of what top-k left.
    left = probabilities[:5] / probabilities[:5].sum()
    count = int((left.cumsum(dim=-1) < 0.5).sum()) + 1
    assert set(draws(3000, temperature=1.0, top_k=5, top_p=0.5)) == set(order[:count])


def test_a_draw_depends_on_seed_and_place_alone() -> None:
    """Whatever else is in the batch: so a sequence that moves or is computed again continues as it would have."""
    rows = logits(8)
    mixed = [Draw(Sampling(max_tokens=9, temperature=0.1 * (row % 3), seed=row), 3 * row) for row in range(8)]
    together = [token.id for token in sample(rows, mixed)]
    assert together == [sample(rows[row : row + 1], [mixed[row]])[0].id for row in range(8)]
    assert len({uniform(seed, place) for seed in range(30) for place in range(30)}) == 900
    assert all(0 <= uniform(seed, 0) < 1 for seed in range(1000))


def test_logprobs_are_of_the_model() -> None:
    """Before temperature and cuts, for those who ask, as many as they ask for."""
    rows = logits(3)
    asked = [Draw(Sampling(max_tokens=1, temperature=5.0, seed=row, logprobs=count), 0) for row, count in
             enumerate((-1, 0, 4))]  # fmt: skip
    nothing, own, best = sample(rows, asked)
    assert nothing.logprob is None
    assert own.likeliest == ()
    logs = rows.log_softmax(dim=-1)
    assert own.logprob == pytest.approx(float(logs[1, own.id]), rel=1e-5)
    assert best.logprob == pytest.approx(float(logs[2, best.id]), rel=1e-5)
    values, ids = logs[2].topk(4)
    assert [token for token, _ in best.likeliest] == ids.tolist()
    assert [value for _, value in best.likeliest] == pytest.approx(values.tolist(), rel=1e-5)
    assert math.exp(best.likeliest[0][1]) <= 1
