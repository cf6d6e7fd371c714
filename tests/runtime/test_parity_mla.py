"""MLA across different TP and PP: every rank holds the one latent; real processes generate what `transformers` does."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import DeepseekV2ForCausalLM

from hetkv.runtime.plan import InstancePlan
from tests.runtime.deployment_cases import POOLS, moved
from tests.runtime.test_mla import MODELS, checkpoints, prompt_of  # noqa: F401  (`checkpoints` is a fixture)
from tests.runtime.test_runtime import reference


@pytest.mark.parametrize(("prefill", "decode"), [((2, 1), (1, 3)), ((1, 2), (4, 1))], ids=["TP2-PP3", "PP2-TP4"])
@pytest.mark.parametrize("name", MODELS)
def test_mla_equals_transformers(
    name: str,
    prefill: tuple[int, int],
    decode: tuple[int, int],
    checkpoints: dict[str, tuple[Path, DeepseekV2ForCausalLM]],  # noqa: F811
) -> None:
    directory, truth = checkpoints[name]
    prompts = [prompt_of(count) for count in (1, 34)]
    plans = [
        InstancePlan(name=role, role=role, tp=tp, pp=pp, pool=POOLS[role])
        for role, (tp, pp) in (("prefill", prefill), ("decode", decode))
    ]
    assert moved(plans, directory, prompts, 16, chunk=10) == [reference(truth, prompt, 16) for prompt in prompts]
