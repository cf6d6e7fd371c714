"""The zoo: every specimen gives the tokens of `transformers`, or is rejected by the line that its fault has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from hetkv.errors import InputError
from hetkv.runtime.demo import PAIR, DemoOptions, DemoResult, run_demo
from hetkv.runtime.plan import InstancePlan, SideOptions
from hetkv.runtime.prompts import Prompt
from hetkv.runtime.reference import Reference
from tests.models import zoo, zoo_edits

ALL = [*zoo.specimens(), *zoo_edits.specimens()]
QUICK = {f"{family}-plain" for family in zoo.FAMILY} | {
    "llama+scaling-next-to-parameters", "llama+old-index", "llama+truncating-tokenizer", "llama+eos-0", "llama+nan",
    "mistral+window-left-out", "llama+repetition_penalty", "qwen3_moe-some-dense",
}  # fmt: skip
"""A cross-section for `make test`."""


def fp32(instance: InstancePlan, tp: int, pp: int) -> InstancePlan:
    pool = SideOptions(block_size=instance.pool.block_size, layout=instance.pool.layout, dtype="float32")
    return InstancePlan(name=instance.name, role=instance.role, tp=tp, pp=pp, pool=pool)


def run(directory: Path, tp: int = 1, pp: int = 1, reference: Reference = "transformers") -> DemoResult:
    """What `hetkv demo --model DIR` does, with pools that keep every bit."""
    options = DemoOptions(
        model=str(directory),
        prompts=tuple(Prompt(zoo.prompt(count, count)) for count in (40, 1)),
        max_new_tokens=24,
        instances=(fp32(PAIR[0], tp, 1), fp32(PAIR[1], 1, pp)),
        reference=reference,
    )
    return run_demo(options)[0]


def check(specimen: zoo.Specimen, directory: Path) -> None:
    model = specimen.make(directory)
    if specimen.rejected is not None:
        with pytest.raises(InputError) as caught:
            run(directory)
        assert re.search(specimen.rejected, str(caught.value)), caught.value
        assert "\n" not in str(caught.value)
        return
    result = run(directory, reference="self" if specimen.unedited else "transformers")
    assert result.identical
    for request in result.requests:
        expected = request.reference_ids
        if specimen.unedited:
            ids = torch.tensor([request.prompt_ids])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
            expected = out[0, ids.shape[1] :].tolist()
        assert request.token_ids == expected


def test_there_are_enough() -> None:
    assert len(ALL) >= 150
    assert len({specimen.name for specimen in ALL}) == len(ALL)
    assert {specimen.name for specimen in ALL} > QUICK


@pytest.mark.parametrize("specimen", [one for one in ALL if one.name in QUICK], ids=lambda one: one.name)
def test_a_cross_section(specimen: zoo.Specimen, tmp_path: Path) -> None:
    check(specimen, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("specimen", [one for one in ALL if one.name not in QUICK], ids=lambda one: one.name)
def test_all_others(specimen: zoo.Specimen, tmp_path: Path) -> None:
    check(specimen, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", zoo.FAMILY)
def test_every_family_over_ranks_and_stages(family: str, tmp_path: Path) -> None:
    """TP 3 prefills (4 query heads, 2 KV heads: uneven and replicated), two pipeline stages decode."""
    zoo.Specimen("split", family).make(tmp_path)
    assert run(tmp_path, tp=3, pp=2).identical
