"""Plans at a chosen end of one GPU's interval."""

from __future__ import annotations

import argparse

import pytest

from hetkv.cli.plan import _confident, add_arguments
from hetkv.errors import InputError
from hetkv.planner.columns import build_columns
from hetkv.planner.problem import Problem
from tests.planner.cases import small


def rate(problem: Problem, gpu: str) -> float:
    """The largest rate of one aggregated instance of a GPU."""
    columns = build_columns(problem, every=True).columns
    return max(float(c.rates.max()) for c in columns if c.gpu == gpu and c.role == "aggregated")


def test_a_gpu_planned_at_the_slow_end_carries_less_and_the_others_as_much() -> None:
    plain = small()
    names = [offer.gpu for offer in plain.gpus]
    careful = _confident(plain, f"{names[0]}=0.95")
    assert rate(careful, names[0]) < rate(plain, names[0])
    for name in names[1:]:
        assert rate(careful, name) == rate(plain, name)
    every = _confident(plain, "all=0.95")
    assert all(offer.engine == {"confidence": 0.95} for offer in every.gpus)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("H100", "expected GPU=Q"),
        ("H100=2", "Q between 0 and 1"),
        ("L4=0.9", "L4 is not among the GPUs"),
        ("H9=0.9", "unknown GPU"),
    ],
)
def test_bad_confidences(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _confident(small(), text)


def test_the_option_repeats() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert parser.parse_args(["--confidence", "a=0.1", "--confidence", "b=0.2"]).confidence == ["a=0.1", "b=0.2"]


def test_a_confidence_in_a_problem_is_checked() -> None:
    with pytest.raises(InputError, match=r"`confidence` must be between 0 and 1, got 1.5"):
        small(engine={"confidence": 1.5})
