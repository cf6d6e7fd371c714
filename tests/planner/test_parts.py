"""Parts of the planner: problem files, queueing, columns, pruning, the program, errors on the command line."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
import yaml

from hetkv.cli import main
from hetkv.errors import InputError
from hetkv.planner.calibrator import rate_of
from hetkv.planner.capacity import Demand
from hetkv.planner.columns import Column, build_columns
from hetkv.planner.milp import Cut, optimise
from hetkv.planner.problem import dump_problem, load_problem, parse_problem
from hetkv.planner.prune import prune
from hetkv.planner.queueing import COUNTS, LOADS, Late, erlang_c, waiting_load
from hetkv.planner.result import Instances
from hetkv.planner.slo_checker import SloChecker
from hetkv.planner.traffic import Mix, samples
from hetkv.simulator.validation.closed_forms import mmc_wait
from tests.planner.test_planner import problem


def document() -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(problem())
    return found


def changed(path: str, value: Any) -> dict[str, Any]:
    """The document with one field changed; `...` removes it."""
    found = document()
    node: Any = found
    *parents, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    for part in parents:
        node = node.setdefault(part, {}) if isinstance(node, dict) else node[part]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return found


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("gpus.0.usd_per_gpu_hour", -2.5, "gpus[0] (H100-SXM): `usd_per_gpu_hour` must be greater than 0, got -2.5"),
        ("gpus.0.usd_per_gpu_hour", ..., "gpus[0] (H100-SXM): missing price `usd_per_gpu_hour`"),
        ("gpus.0.as_of", ..., "gpus[0] (H100-SXM): a price needs `as_of`"),
        ("gpus.0.as_of", "yesterday", "gpus[0] (H100-SXM): `as_of` must be a date such as 2026-05 or 2026-05-31"),
        ("gpus.0.as_of", "2026-13", "`as_of` must be a date such as 2026-05 or 2026-05-31, got '2026-13'"),
        ("gpus.1.basis", "reserved", "prices of different basis (on_demand, reserved) do not compare"),
        ("gpus.1.gpu", "H200-XXL", "gpus[1]: unknown GPU 'H200-XXL'"),
        ("gpus.1.gpu", "H100", "H100-SXM is given twice"),
        ("gpus.1.cap", -1, "gpus[1] (MI300X): `cap` must be 0 or more GPUs, got -1"),
        ("gpus", [], "`gpus` is empty"),
        ("classes", [], "`classes` is empty"),
        ("classes.0.rate", 0, "classes[0] (chat): `rate` must be greater than 0, got 0"),
        ("classes.0.ttft_ms", float("nan"), "classes[0] (chat): `ttft_ms` must be greater than 0"),
        ("classes.0.ttft_percentile", 100, "`ttft_percentile` must be between 0 and 100"),
        ("classes.0.prompt_tokens", "normal:5", "`prompt_tokens`: 'normal:5' is not a length distribution"),
        ("classes.0.model", "Llama-9", "`model` 'Llama-9' is not among `models`"),
        ("models.0.name", "Llama-9", "Llama-9"),
        ("models.0.tp", [0], "`tp` must be greater than 0, got 0"),
        ("objective", {"goal": "goodput"}, "missing `budget_usd_per_hour`"),
        ("objective", {"goal": "split"}, "missing `cap`: the goal `split` divides a given fleet"),
        ("objective", {"goal": "cost", "budget_usd_per_hour": 5}, "belongs to the goal `goodput`"),
        ("pair_limits", [{"prefill": "L4", "decode": "H100", "gb_s": 1}], "pair_limits[0]: L4 is not among `gpus`"),
        ("link.gb_s", -1, "link `gb_s` must be greater than 0"),
        ("engine.max_num_seqs", 0, "engine `max_num_seqs` must be greater than 0"),
        ("models.0.engine", {"block_sise": 3}, "block_sise"),
        ("colour", "red", "unknown field `colour`"),
        ("seed", -1, "`seed` must be 0 or more"),
    ],
)
def test_a_wrong_problem_is_one_line_that_names_file_place_and_value(
    path: str, value: Any, says: str, tmp_path: Any, capsys: Any
) -> None:
    file = tmp_path / "problem.yaml"
    file.write_text(yaml.safe_dump(changed(path, value)))
    assert main(["plan", "--problem", str(file), "--json", str(tmp_path / "out.json")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error
    assert str(file) in error
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"classes.0.ttft_ms": 2}, "the tightest constraint is TTFT of class chat: 2 ms at p99 is asked"),
        ({"classes.0.tpot_ms": 0.5}, "the tightest constraint is TPOT of class chat: 0.5 ms at p99 is asked"),
        ({"gpus.0.cap": 1, "gpus.1.cap": 0, "classes.0.rate": 500.0}, "the tightest constraint is GPU caps"),
        ({"gpus.0.cap": 0, "gpus.1.cap": 0}, "every offered GPU has the cap 0"),
        (
            {"objective": {"goal": "goodput", "budget_usd_per_hour": 0.5}},
            "budget: the cheapest plan for any traffic costs 2.00 USD/hour, 0.50 may be spent",
        ),
        (
            {"roles": "disaggregated", "link.fabric_gb_s": 0.01},
            "the tightest constraint is KV fabric: prompts send about",
        ),
    ],
)
def test_an_infeasible_plan_says_which_constraint_is_the_tightest(
    changes: dict[str, Any], says: str, tmp_path: Any, capsys: Any
) -> None:
    found = document()
    for path, value in changes.items():
        node: Any = found
        *parents, last = [int(p) if p.isdigit() else p for p in path.split(".")]
        for part in parents:
            node = node[part]
        node[last] = value
    file = tmp_path / "problem.yaml"
    file.write_text(yaml.safe_dump(found))
    assert main(["plan", "--problem", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "give either --problem FILE or --model"),
        (["--model", "Llama-3.1-8B"], "missing --gpu"),
        (["--model", "Llama-3.1-8B", "--gpu", "H100", "--rate", "1", "--ttft", "1", "--tpot", "1"], "missing --prices"),
        (["--problem", "/nowhere/problem.yaml"], "/nowhere/problem.yaml"),
    ],
)
def test_wrong_options_are_one_line(options: list[str], says: str, capsys: Any) -> None:
    assert main(["plan", *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error


def test_a_model_that_fits_nowhere_says_how_much_it_needs(capsys: Any) -> None:
    line = ["--model", "Llama-3.1-405B", "--gpu", "L4:0.8", "--prices-as-of", "2026-05", "--rate", "1"]
    assert main(["plan", *line, "--ttft", "5000", "--tpot", "100"]) == 2
    error = capsys.readouterr().err
    assert "Llama-3.1-405B fits on none of the offered GPUs" in error
    assert "GiB" in error


def test_flags_plan_and_write_json(tmp_path: Any, capsys: Any) -> None:
    line = ["--model", "Llama-3.1-8B", "--gpu", "H100:2.5", "--prices-as-of", "2026-05", "--rate", "3"]
    traffic = ["--prompt-tokens", "500", "--output-tokens", "uniform:10:30", "--ttft", "300", "--tpot", "40"]
    out = tmp_path / "plan.json"
    assert main(["plan", *line, *traffic, "--percentile", "90", "--json", str(out)]) == 0
    plan = json.loads(out.read_text())
    assert plan["meets"]
    assert plan["cost_per_hour"] == 2.5
    assert "2.50 USD/h" in capsys.readouterr().out


def test_a_problem_survives_its_file(tmp_path: Any) -> None:
    file = tmp_path / "problem.yaml"
    file.write_text(dump_problem(problem()))
    assert load_problem(file) == problem()


def test_erlang_c_is_that_of_the_mean_wait() -> None:
    table = erlang_c()
    for servers, load in ((1, 0.5), (4, 0.8), (16, 0.92)):
        row = COUNTS.index(servers)
        column = int(np.abs(LOADS - load).argmin())
        wait = table[row, column] / (servers * (1 - LOADS[column]))
        assert wait == pytest.approx(mmc_wait(float(LOADS[column]), 1.0, servers), rel=1e-9)


def test_larger_pools_may_be_used_more_and_looser_targets_too() -> None:
    service = np.linspace(0.05, 0.2, 100)
    loads = [
        waiting_load([Late(service, limit, 0.01)], float(service.mean()), float(service.var()))
        for limit in (0.1, 0.25, 0.5, 2.0)
    ]
    assert loads[0].max() == 0  # half of the prompts alone are late
    for tight, loose in itertools.pairwise(loads):
        assert (tight <= loose).all()
    assert all((np.diff(found) >= 0).all() for found in loads)
    assert loads[1][0] < 0.35 < 0.9 < loads[1][COUNTS.index(64)]


def test_prefill_capacities_are_near_the_simulators() -> None:
    asked = problem()
    found = build_columns(asked)
    checker = SloChecker(asked, asked.models[0])
    column = next(c for c in found.columns if str(c) == "prefill H100-SXM tp 2")
    for count in (2, 4):
        scale = rate_of(column, count) / 12.0
        pool = [Instances("prefill", column.gpu, column.tp, column.pp, count, column.model, column.budget)]
        assert checker(pool, 0.75 * scale, prompts_only=True).used("prefill") <= 1
        assert checker(pool, 1.4 * scale, prompts_only=True).used("prefill") > 1


def test_a_larger_pool_is_late_no_more_often_in_the_simulator() -> None:
    asked = problem()
    checker = SloChecker(asked, asked.models[0])
    for role, tp in (("prefill", 1), ("aggregated", 1)):
        used = [
            checker([Instances(role, "H100-SXM", tp, 1, n, "Llama-3.1-8B", 2048)], 2.0, role == "prefill").used(role)  # type: ignore[arg-type]
            for n in (2, 3, 4)
        ]
        assert used == sorted(used, reverse=True)


def test_traffic_has_the_rates_and_the_same_requests_at_every_scale() -> None:
    classes = [msgspec.structs.replace(problem().classes[0], name=n, rate=r) for n, r in (("a", 1.0), ("b", 3.0))]
    slow, fast = (list(Mix(classes, scale, 4000).requests(5)) for scale in (1.0, 2.0))
    assert [(r.prompt, r.output) for r in slow] == [(r.prompt, r.output) for r in fast]
    assert slow[-1].arrival == pytest.approx(2 * fast[-1].arrival)
    assert 4000 / slow[-1].arrival == pytest.approx(4.0, rel=0.05)
    assert Mix(classes, 1.0, 4000).kinds(5).mean() == pytest.approx(0.75, abs=0.03)
    demand = Demand(samples(classes))
    assert demand.prompt == pytest.approx(np.mean([r.prompt for r in slow]), rel=0.05)


def test_pruning_leaves_the_optimum() -> None:
    for rate, ttft, tpot in ((3.0, 150.0, 12.0), (40.0, 250.0, 25.0), (300.0, 400.0, 40.0)):
        asked = problem()
        asked = msgspec.structs.replace(
            asked, classes=[msgspec.structs.replace(asked.classes[0], rate=rate, ttft_ms=ttft, tpot_ms=tpot)]
        )
        columns = build_columns(asked).columns
        left = prune(columns, asked)
        assert len(left) < len(columns)
        values = [optimise(asked, some, {"Llama-3.1-8B": rate}, {"Llama-3.1-8B": 1e8}) for some in (columns, left)]
        assert all(v is not None and v.gap == 0 for v in values)
        assert values[0].value == pytest.approx(values[1].value)  # type: ignore[union-attr]


def few(asked: Any) -> list[Column]:
    found = build_columns(asked).columns
    return [c for c in found if (c.role != "aggregated" and c.tp == 1) or c.role == "prefill"]


def test_the_milp_finds_what_counting_finds() -> None:
    asked = problem(roles="disaggregated")
    columns = few(asked)
    for rate in (5.0, 23.0, 61.0):
        least = float("inf")
        ways = {}
        for role in ("prefill", "decode"):
            mine = [c for c in columns if c.role == role]
            ways[role] = [
                sum(n * c.price for c, n in zip(mine, counts, strict=True))
                for counts in itertools.product(range(5), repeat=len(mine))
                if sum(rate_of(c, n) for c, n in zip(mine, counts, strict=True)) >= rate
            ]
        least = min(ways["prefill"], default=least) + min(ways["decode"], default=least)
        solution = optimise(asked, columns, {"Llama-3.1-8B": rate}, {"Llama-3.1-8B": 1e8})
        assert solution is not None
        assert solution.value == pytest.approx(least, rel=0.003)  # ranges are merged within 0.3 %
        assert solution.gap == 0


def test_fewer_instances_than_the_least_pool_carry_nothing() -> None:
    """A column whose pools below eight instances miss the target: one instance is no eighth of a pool."""
    asked = problem(roles="disaggregated")
    decode = next(c for c in few(asked) if c.role == "decode")
    late = replace(decode, rates=np.where(np.array(COUNTS) < 8, 0.0, decode.rates.max()))
    columns = [next(c for c in few(asked) if c.role == "prefill"), late]
    solution = optimise(asked, columns, {"Llama-3.1-8B": 0.5 * float(late.rates[-1])}, {"Llama-3.1-8B": 1e8})
    assert solution is not None
    assert solution.counts[late.key] == 8


def test_cuts_and_pair_limits_hold_in_the_milp() -> None:
    asked = problem(roles="disaggregated")
    columns = few(asked)
    rates, sent = {"Llama-3.1-8B": 20.0}, {"Llama-3.1-8B": 1e8}
    plain = optimise(asked, columns, rates, sent)
    assert plain is not None
    first = {k: n for k, n in plain.counts.items() if k[1] == "prefill"}
    other = optimise(asked, columns, rates, sent, cuts=[Cut("Llama-3.1-8B", "prefill", first)])
    assert other is not None
    assert any(n > first.get(k, 0) for k, n in other.counts.items() if k[1] == "prefill")
    assert other.value >= plain.value
    pairs = [{"prefill": a, "decode": b, "gb_s": 0} for a in ("H100", "MI300X") for b in ("H100", "MI300X") if a != b]
    separate = optimise(problem(roles="disaggregated", pair_limits=pairs), columns, rates, sent)
    assert separate is not None
    assert len({k[2] for k in separate.counts}) == 1
    assert separate.value >= plain.value


def test_the_spare_instance_is_more_than_is_needed() -> None:
    rates, sent = {"Llama-3.1-8B": 30.0}, {"Llama-3.1-8B": 1e8}
    asked = problem(roles="disaggregated", spare_instances=1)
    columns = build_columns(asked).columns
    solution = optimise(asked, columns, rates, sent)
    assert solution is not None
    by_key = {c.key: c for c in columns}
    for down in solution.counts:
        for role in ("prefill", "decode"):
            left = [(by_key[k], n - (k == down)) for k, n in solution.counts.items() if k[1] == role]
            assert sum(rate_of(c, n) for c, n in left) >= 30.0 * (1 - 0.003)


def test_errors_name_the_origin() -> None:
    with pytest.raises(InputError, match=r"^here: "):
        parse_problem({"models": []}, "here")
