"""What the simulator says is what runs: the same requests on instances whose steps take the times that it is given."""

from __future__ import annotations

import csv
import secrets
from pathlib import Path

import numpy as np
import pytest

from hetkv.costmodel import StepModel
from hetkv.costmodel.calibration.step_constants import COLUMNS, fit
from hetkv.costmodel.measured_steps import MeasuredSteps
from hetkv.simulator.affine import AffineStepModel
from hetkv.simulator.deployment import Engine, LinkPlan, Plan, PoolPlan, Role, Routing
from hetkv.simulator.metrics import Slo, summarise
from hetkv.simulator.run import simulate
from hetkv.simulator.traffic.sources import Traffic
from tests.serve.sleeping import KV_TOKENS, LIMITS, run

MODEL = AffineStepModel((20e-3, 0.4e-3, 4e-7, 3e-5, 5e-3), KV_TOKENS, 1.0)
"""About a model of 7e9 parameters on an H200, and slow enough that threads of a busy machine follow."""
FRONT_MS = 3.0
"""Messages of the scheduler and its instances, both ways: what is left where nothing waits."""


def measured(folder: Path) -> dict[str, StepModel]:
    """Steps as they were, by role: sleeping takes longer on a busy machine, which is not what is tested here."""
    rows: dict[str, list[list[float]]] = {}
    for path in folder.glob("*.csv"):
        with path.open() as file:
            found = [[float(row.get(column, 0)) for column in COLUMNS] for row in csv.DictReader(file)]
        rows.setdefault(path.name.split("-")[0], []).extend(found)
    return {role: MeasuredSteps(fit(role, np.array(some), 1.0, ""), KV_TOKENS) for role, some in rows.items()}


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("roles", "rate"), [(("aggregated", "aggregated"), 8.0), (("prefill", "decode"), 6.0)])
def test_simulated_as_it_runs(roles: tuple[Role, ...], rate: float, tmp_path: Path) -> None:
    traffic = Traffic(rate=rate, duration=8, prompt_tokens="uniform:512:1536", output_tokens="uniform:64:192")
    secret = tmp_path / "secret"
    secret.touch(0o600)
    secret.write_text(secrets.token_hex(16))
    columns = run(MODEL, roles, traffic.build(), 5, secret, tmp_path / "steps")
    real = summarise(columns, Slo(), float(columns["last_token"].max()))
    models = measured(tmp_path / "steps")
    plan = Plan(
        "Llama-2-7B",
        [PoolPlan(role, "H200", role, count=roles.count(role), kv_tokens=KV_TOKENS) for role in dict.fromkeys(roles)],
        Engine(max_num_seqs=LIMITS.max_num_seqs, max_num_batched_tokens=LIMITS.max_num_batched_tokens),
        LinkPlan(1e6, latency_us=0) if "decode" in roles else None,
        Routing("balanced", "balanced"),
        first_token_at="prefill",
        front_ms=FRONT_MS,
    )
    simulated = simulate(plan, traffic.build(), 5, models=lambda pool, _: models[pool.name]).summary
    for key, part, limit in (("ttft_ms", "p50", 0.15), ("tpot_ms", "p50", 0.1), ("tpot_ms", "p99", 0.15)):
        ratio = simulated[key][part] / real[key][part]
        print(f"{key} {part}: {simulated[key][part]:.1f} simulated, {real[key][part]:.1f} measured, {ratio:.3f}")
        assert ratio == pytest.approx(1, abs=limit), key
    assert simulated["output_tokens_per_s"] == pytest.approx(real["output_tokens_per_s"], rel=0.05)
