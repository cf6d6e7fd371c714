"""Programs in parts have the value that HiGHS finds for all of it."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
from scipy.sparse import csr_array

from hetkv.planner import exact
from hetkv.planner.exact import Piece, Program, minimise, solved

OPTIONS = {"mip_rel_gap": 0.0, "node_limit": 100_000, "time_limit": 60.0}


def random_program(seed: int, cap: float) -> Program:
    """Two roles of columns on three GPU types, each with ranges of pool sizes; `cap` of the GPUs that would do."""
    random = np.random.default_rng(seed)
    cost, whole, high, pieces = [], [], [], []
    rows: list[tuple[dict[int, float], float, float]] = []
    used: dict[int, dict[int, float]] = {0: {}, 1: {}, 2: {}}
    shared = []

    def add(price: float, most: float) -> int:
        cost.append(price)
        high.append(most)
        whole.append(1)
        return len(cost) - 1

    for _ in range(2):
        need, carried = float(random.uniform(50, 3000)), {}
        for _ in range(6):
            gpu, size = int(random.integers(3)), int(random.choice([1, 2, 4]))
            rate, price = float(random.uniform(1, 2) * size), float(np.round(random.uniform(1, 2) * size, 2))
            ys = []
            for first, last, part in ((1, 7, 0.7), (8, 31, 0.9), (32, 10_000, 1.0)):
                x, y = add(price, last), add(0.0, 1)
                pieces.append(Piece(x, y, first))
                carried[x], used[gpu][x] = part * rate, float(size)
                ys.append(y)
                rows.extend([({x: 1.0, y: -last}, -inf, 0.0), ({x: 1.0, y: -first}, 0.0, inf)])
            rows.append((dict.fromkeys(ys, 1.0), -inf, 1.0))
        rows.append((carried, need, inf))
    for own in used.values():
        shared.append(len(rows))
        rows.append((own, -inf, cap * float(random.uniform(300, 1500))))
    matrix = np.zeros((len(rows), len(cost)))
    for i, (terms, _, _) in enumerate(rows):
        for j, value in terms.items():
            matrix[i, j] = value
    return Program(
        np.array(cost),
        np.array(whole),
        np.zeros(len(cost)),
        np.array(high, dtype=np.float64),
        csr_array(matrix),
        np.array([low for _, low, _ in rows]),
        np.array([most for _, _, most in rows]),
        pieces,
        shared,
    )


@pytest.mark.parametrize("cap", [10.0, 1.0, 0.4])
def test_parts_have_the_value_of_the_whole(cap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    widened = []
    real = exact.solved
    monkeypatch.setattr(exact, "solved", lambda *a: widened.append(1) or real(*a))
    for seed in range(12):
        program = random_program(seed, cap)
        whole, parts = real(program, OPTIONS), minimise(program, OPTIONS)
        assert parts.value == pytest.approx(whole.value, abs=1e-6)
        assert parts.bound == pytest.approx(whole.bound, abs=1e-3)
        if parts.v is not None:
            v = np.round(parts.v)
            assert program.cost @ v == pytest.approx(parts.value)
            assert (program.matrix @ v <= program.most + 1e-6).all()
            assert (program.matrix @ v >= program.least - 1e-6).all()
            assert minimise(program, OPTIONS, best=whole.value * 0.99).value > whole.value * 0.99
        else:
            assert whole.v is None
    assert len(widened) > 12  # windows that were too narrow at first, or parts


@pytest.mark.parametrize("price", [0.0, 10.0])
@pytest.mark.parametrize("nodes", [-8.0, 0.0])
def test_a_part_that_needs_nothing(price: float, nodes: float) -> None:
    """Nodes of a GPU type whose instances are fixed at none, and what is in a shared limit alone."""
    matrix = csr_array(np.array([[1.0, 0.0, 0.0], [0.0, 1.0, nodes], [1.0, 1.0, 1.0]]))
    least, most = np.array([2.0, -inf, -inf]), np.array([inf, 0.0, 100.0])
    cost, high = np.array([3.0, 0.0, price]), np.array([9.0, 0.0, 9.0])
    program = Program(cost, np.ones(3, dtype=np.int64), np.zeros(3), high, matrix, least, most, (), (2,))
    found = minimise(program, OPTIONS)
    assert found.v is not None
    assert found.v[0] == 2
    assert (found.value, found.bound) == (6, 6)


def test_a_limit_that_ends_the_search_is_no_proof() -> None:
    program = random_program(3, 1.0)
    left = minimise(program, {**OPTIONS, "time_limit": 0.0})
    assert left.v is None or left.bound < left.value
    assert left.bound < inf
    assert solved(program, {**OPTIONS, "time_limit": 0.0}).bound < inf
