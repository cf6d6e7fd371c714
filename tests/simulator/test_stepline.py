"""Many decode steps in closed form against a loop over single steps."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetkv.costmodel import StepModel, step_model
from hetkv.simulator.stepline import StepLine


class Kinked(StepModel):
    """Memory time or a floor, whichever is larger, and a second, steeper memory regime: two kinks."""

    kv_capacity_tokens = 1_000_000
    kv_bytes_per_token = 1.0

    def step_seconds(self, batch, context, prefill_tokens=0, prefill_pairs=0.0):
        return 0.004 + 1e-5 * batch + max(0.002, 3e-8 * context, 9e-8 * context - 0.02)


class Curved(Kinked):
    def step_seconds(self, batch, context, prefill_tokens=0, prefill_pairs=0.0):
        return 0.005 + 1e-6 * context**0.8


def loop(model, batch, context, steps):
    return sum(model.step_seconds(batch, context + i * batch) for i in range(steps))


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 300), st.integers(0, 900_000), st.integers(1, 3000))
def test_sum_equals_the_loop(batch, context, steps):
    line = StepLine(Kinked(), batch, 1_000_000)
    assert line.seconds(context, steps) == pytest.approx(loop(Kinked(), batch, context, steps), rel=1e-6)
    assert len(line.starts) <= 60


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 300), st.integers(0, 900_000), st.integers(1, 2000), st.floats(0, 1.1))
def test_steps_until_is_the_first_boundary_at_or_after(batch, context, limit, share):
    line = StepLine(Kinked(), batch, 1_000_000)
    elapsed = share * line.seconds(context, limit)
    steps = line.steps_until(context, elapsed, limit)
    assert 1 <= steps <= limit
    assert steps == limit or line.seconds(context, steps) >= elapsed * (1 - 1e-12)
    assert steps == 1 or line.seconds(context, steps - 1) < elapsed * (1 + 1e-12)


def test_curved_model_is_followed_within_its_tolerance():
    line = StepLine(Curved(), 64, 1_000_000)
    assert line.tolerance > 1e-10
    for context in (0, 1000, 50_000, 600_000):
        assert line.seconds(context, 500) == pytest.approx(loop(Curved(), 64, context, 500), rel=1e-4)


@pytest.mark.parametrize(("gpu", "model", "tp"), [("H100-SXM", "Llama-3.1-70B", 4), ("MI300X", "Mistral-7B", 1)])
@pytest.mark.parametrize("batch", [1, 17, 256])
def test_catalogue_models_are_exact(gpu, model, tp, batch):
    steps = step_model(gpu, model, tp)
    line = StepLine(steps, batch, steps.kv_capacity_tokens)
    assert line.tolerance == 1e-10
    for context in (batch * 100, batch * 1000):
        assert line.seconds(context, 700) == pytest.approx(loop(steps, batch, context, 700), rel=1e-9)
