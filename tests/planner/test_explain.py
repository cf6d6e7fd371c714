"""What a plan says of itself: also where disaggregation or mixing is worth nothing."""

from __future__ import annotations

import msgspec
import pytest

from hetkv.planner.output.explain import link_use, others, phase_values, reasons, worth
from hetkv.planner.problem import parse_problem
from hetkv.planner.result import Shift, split
from tests.planner.cases import option, plan_of, small, some

SPLIT = (some("prefill", "H100-SXM", 1), some("decode", "MI300X", 1))
TOGETHER = some("aggregated", "MI300X", 4)


def test_a_split_over_vendors_says_what_both_are_worth():
    baselines = (
        option("aggregated only", TOGETHER),
        option("amd only", some("prefill", "MI300X", 2), some("decode", "MI300X", 1)),
    )
    said = worth(small(), plan_of(small(), *SPLIT, baselines=baselines))
    assert "31% less cost" in said["disaggregation"]  # 5.49 against 7.96
    assert "8% less cost" in said["mixing"]  # 5.49 against 5.97
    assert "4 aggregated on MI300X" in said["disaggregation"]


def test_a_plan_that_is_no_better_says_nothing_in_so_many_words():
    baselines = (option("disaggregated only", *SPLIT), option("nvidia only", some("aggregated", "H100-SXM", 3)))
    said = worth(small(), plan_of(small(), some("aggregated", "MI300X", 2), baselines=baselines))
    assert said["disaggregation"].startswith("Disaggregation is worth nothing here")
    assert "38% more" in said["disaggregation"]
    assert said["mixing"].startswith("Mixing vendors is worth nothing here: the best plan buys AMD alone")


def test_an_equal_rival_is_worth_nothing_too():
    same = option("aggregated only", some("aggregated", "H100-SXM", 1), some("aggregated", "MI300X", 1))
    said = worth(small(), plan_of(small(), *SPLIT, baselines=(same,)))
    assert "worth nothing" in said["disaggregation"]
    assert "is as good" in said["disaggregation"]


def test_a_rival_that_misses_its_targets_is_no_rival():
    late = option("aggregated only", some("aggregated", "MI300X", 1), feasible=False)
    said = worth(small(), plan_of(small(), *SPLIT, baselines=(late,)))
    assert "makes the plan possible" in said["disaggregation"]


def test_one_gpu_type_leaves_nothing_to_mix():
    one = small(gpus=[{"gpu": "MI300X", "usd_per_gpu_hour": 2.0, "basis": "on_demand", "as_of": "2026-05"}])
    assert "nothing to mix" in worth(one, plan_of(one, TOGETHER))["mixing"]


def test_restricted_roles_are_said():
    problem = small(roles="aggregated")
    assert worth(problem, plan_of(problem, TOGETHER))["disaggregation"] == "Only aggregated deployments were asked for."


def test_reasons_name_the_limit_the_link_the_bound_and_the_next_best():
    text = " ".join(reasons(small(), plan_of(small(), *SPLIT, baselines=(option("aggregated only", TOGETHER),))))
    for part in ("TPOT p90 (class chat), 50%", "The KV link carries it", "costs less than 4.94", "4 aggregated", "10%"):
        assert part in text


def test_one_vendor_slower_may_flip_the_choice():
    plan = plan_of(small(), TOGETHER)
    kept, flipped = Shift("nvidia", 1.2, ["amd"], False, 7.96, 4.0), Shift("amd", 1.2, ["nvidia"], True, 7.0, 4.0)
    text = " ".join(reasons(small(), msgspec.structs.replace(plan, shifts=[kept, flipped])))
    assert "Were AMD 20% slower, the choice would flip to NVIDIA, at 7.00 USD/hour." in text
    text = " ".join(reasons(small(), msgspec.structs.replace(plan, shifts=[kept])))
    assert "The choice of vendors stands with any one vendor 20% slower or faster than assumed." in text


def test_the_same_deployment_is_named_once():
    twice = (option("amd only", TOGETHER), option("aggregated only", TOGETHER), option("none", feasible=False))
    assert [o.name for o in others(plan_of(small(), *SPLIT, baselines=twice))] == ["amd only", "none"]


def test_runners_up_are_numbered_as_they_are_listed():
    after = [option(f"runner-up {i + 1}", some("aggregated", gpu, 3)) for i, gpu in enumerate(("MI300X", "H100-SXM"))]
    plan = plan_of(small(), *SPLIT, baselines=(option("amd only", *after[0].instances),))
    listed = others(msgspec.structs.replace(plan, runners_up=after))
    assert [(o.name, o.instances[0].gpu) for o in listed] == [("amd only", "MI300X"), ("runner-up 1", "H100-SXM")]


def test_link_use_is_the_kv_of_all_prompts_over_the_ports():
    (use,) = link_use(small(), plan_of(small(), *SPLIT))
    per_token = 2 * 32 * 8 * 128 * 2  # K and V, layers, heads, channels, bytes
    assert use.total_gb_s == pytest.approx(4.0 * 800 * per_token / 1e9, rel=0.02)
    assert use.send_share == pytest.approx(use.total_gb_s / 25)


def test_phase_values_rank_by_money_and_mark_what_was_chosen():
    values = phase_values(small(), plan_of(small(), *SPLIT))
    prefill = [v for v in values if v.role == "prefill"]
    assert [v.rate_per_usd for v in prefill] == sorted((v.rate_per_usd for v in prefill), reverse=True)
    assert {(v.role, v.gpu) for v in values if v.chosen} == {("prefill", "H100-SXM"), ("decode", "MI300X")}


def test_split_names_models_only_where_there_are_several():
    assert split(SPLIT) == "1 prefill on H100-SXM, 1 decode on MI300X"
    assert "for Qwen3-8B" in split([*SPLIT, some("aggregated", "MI300X", 1, "Qwen3-8B")])


def test_several_vendors_of_one_are_types():
    gpus = [
        {"gpu": gpu, "usd_per_gpu_hour": usd, "basis": "on_demand", "as_of": "2026-05"}
        for gpu, usd in (("MI300X", 1.99), ("MI325X", 2.5))
    ]
    problem = parse_problem({**_plain(), "gpus": gpus}, "x")
    assert worth(problem, plan_of(problem, TOGETHER))["mixing"].startswith("Mixing GPU types is worth nothing here")
    both = some("prefill", "MI300X", 1), msgspec.structs.replace(some("decode", "MI300X", 1), gpu="MI325X")
    rival = option("amd only", some("aggregated", "MI300X", 3))
    assert (
        "the best single-type plan (3 aggregated on MI300X)"
        in worth(problem, plan_of(problem, *both, baselines=(rival,)))["mixing"]
    )


def _plain() -> dict:
    return msgspec.to_builtins(small())
