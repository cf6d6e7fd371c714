"""What a limit ends early: the plan until then stays, and says so; what is not known is not called infeasible."""

from __future__ import annotations

from io import StringIO
from math import inf
from sys import modules
from typing import Any

import msgspec
import pytest
from rich.console import Console

from hetkv.errors import InfeasibleError, UndecidedError
from hetkv.planner import exact, search
from hetkv.planner import frontier as sweep
from hetkv.planner import milp as program
from hetkv.planner import replay as trace
from hetkv.planner.calibrator import Calibrator
from hetkv.planner.columns import build_columns
from hetkv.planner.effort import Effort
from hetkv.planner.frontier import Frontier, Point, point
from hetkv.planner.milp import optimise
from hetkv.planner.output.explain import reasons
from hetkv.planner.output.html import html
from hetkv.planner.output.terminal import CUT, show_frontier, show_replan
from hetkv.planner.replay import Replan, plan_period
from hetkv.planner.search import Search
from hetkv.planner.slo_checker import SloChecker
from hetkv.planner.solve import solve
from tests.planner.cases import small
from tests.planner.test_planner import problem

SENT = {"Llama-3.1-8B": 1e8}


def undecided_after(monkeypatch: Any, calls: int) -> None:
    """HiGHS answers `calls` times and then meets its limit."""
    left = [calls]

    def few(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise UndecidedError("no answer")
        return optimise(*args, **options)

    for module in (search, modules["hetkv.planner.sensitivity"]):
        monkeypatch.setattr(module, "optimise", few)


def goodput() -> Any:
    return small(objective={"goal": "goodput", "budget_usd_per_hour": 4.0})


def shown(show: Any, found: Any) -> str:
    console = Console(file=StringIO(), width=200)
    show(console, found)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_nodes_that_run_out_prove_nothing(monkeypatch: Any) -> None:
    columns = build_columns(problem()).columns
    monkeypatch.setattr(program, "NODES", 0)
    monkeypatch.setattr(exact, "solved", lambda *_: exact.Answer(None, inf, 1.0))  # the parts need no nodes
    with pytest.raises(UndecidedError, match="found no counts within 0 nodes"):
        optimise(problem(), columns, {"Llama-3.1-8B": 61.0}, SENT)
    (chat,) = small().classes
    with pytest.raises(UndecidedError) as raised:
        solve(msgspec.structs.replace(small(), classes=[msgspec.structs.replace(chat, rate=200.0)]), alternatives=False)
    assert not isinstance(raised.value, InfeasibleError)


def test_a_cap_that_is_too_small_is_still_infeasible() -> None:
    offers = [msgspec.structs.replace(o, cap=1) for o in small().gpus]
    (chat,) = small().classes
    asked = msgspec.structs.replace(small(), gpus=offers, classes=[msgspec.structs.replace(chat, rate=500.0)])
    with pytest.raises(InfeasibleError, match="GPU caps"):
        solve(asked, alternatives=False)


def test_a_plan_outlives_a_later_round_that_is_not_decided(monkeypatch: Any) -> None:
    whole = solve(goodput(), alternatives=False)
    assert whole.cut == []
    undecided_after(monkeypatch, 1)
    plan = solve(goodput(), alternatives=False)
    assert plan.meets
    assert plan.cut == ["no answer: the search ended there"]
    assert set(plan.cut) <= set(plan.notes)
    assert plan.lower_bound == float("inf")  # not known, and no claim that nothing serves more
    assert plan.as_json()["lower_bound"] is None
    assert any("no bound is known" in text for text in reasons(goodput(), plan))


def test_an_alternative_may_be_undecided(monkeypatch: Any) -> None:
    whole = solve(small())
    undecided_after(monkeypatch, 1)
    plan = solve(small())
    assert plan.instances == whole.instances
    assert plan.lower_bound == 0
    assert any(text.endswith(" only: no answer: the search ended there") for text in plan.cut)
    unknown = [b for b in plan.baselines if not b.instances]
    assert unknown
    assert {b.why for b in unknown} == {"no answer"}
    assert [s.why for s in plan.sensitivity] == ["no answer", "no answer"]
    assert sum("not known" in text for text in reasons(small(), plan)) == 2


def test_a_point_that_is_undecided_leaves_the_others(monkeypatch: Any) -> None:
    undecided_after(monkeypatch, 0)
    found = point("AMD only", small(), 1.0, 1.0)
    assert (found.cost_per_hour, found.why, found.cut) == (None, "no answer", "no answer")
    assert "none *" in shown(show_frontier, Frontier([found], []))
    rows: Any = [(0.1 * i, 800, 64, ()) for i in range(60)]
    assert plan_period(small(), 0.0, 6.0, rows, 0.0).why == "no answer"


def test_a_point_that_was_cut_short_is_marked(monkeypatch: Any) -> None:
    whole = point("mixed", small(), 1.0, 1.0)
    assert whole.cut == ""
    for module in (sweep, trace):
        monkeypatch.setattr(module, "ALTERNATIVE_EVENTS", 0)
    found = point("mixed", small(), 1.0, 1.0)
    assert found.cost_per_hour is not None
    assert "limit of 0 simulated events" in found.cut
    for points, marked in ((found, True), (whole, False)):
        assert (f"{points.cost_per_hour:,.2f} *" in shown(show_frontier, Frontier([points], []))) is marked
        page = html(small(), solve(small(), alternatives=False), Frontier([points], [points]))
        assert (CUT in page) is marked
    rows: Any = [(0.1 * i, 800, 64, ()) for i in range(60)]
    cut = plan_period(small(), 0.0, 6.0, rows, 0.0)
    assert cut.cut == found.cut
    assert CUT in shown(show_replan, Replan("trace.csv", [cut], None, None))
    single = Point("AMD only", 1.0, 1.0, 4.0, 0.5)
    mixed = sweep._at_least_one_of(found, [found, single])
    assert (mixed.cost_per_hour, mixed.cut) == (0.5, found.cut)


def test_a_slack_that_was_not_measured_to_the_end_is_none() -> None:
    plan = solve(small(), alternatives=False, events=0)
    assert plan.meets
    assert plan.simulated_slack is None
    assert any("slack was not measured to the end: at least 0%" in note for note in plan.notes)
    checkers = {m.name: SloChecker(small(), m) for m in small().models}
    columns = build_columns(small()).columns
    column = next(c for c in columns if c.role == "aggregated")
    counts = {column.key: 1}
    calibrator = Calibrator(small(), columns, checkers, Effort(checkers, 0))
    (reach,) = calibrator.measure(column.model, counts, 3.0, ["aggregated"]).values()
    assert (reach.scale, reach.cut) == (3.0, True)
    assert calibrator.corrected() == calibrator.columns  # a pool that holds may carry any amount more
    calibrator.effort = None
    (reach,) = calibrator.measure(column.model, counts, 3.0, ["aggregated"]).values()
    assert not reach.cut
    assert reach.scale > 3.0


def test_a_search_that_ended_by_itself_met_no_limit() -> None:
    checkers = {m.name: SloChecker(small(), m) for m in small().models}
    columns = build_columns(small(), every=True)
    whole = Search(small(), columns, checkers).run()
    events = sum(j.events for j in checkers.values())
    checkers = {m.name: SloChecker(small(), m) for m in small().models}
    again = Search(small(), columns, checkers, events).run()
    assert again.best == whole.best
    assert again.effort.short == ""
    assert again.effort.spent  # all of it was used


def test_neighbours_of_a_plan_that_misses_have_events_of_their_own() -> None:
    """Rounds that found nothing may have used the limit up: the plan is among the neighbours then."""
    checkers = {m.name: SloChecker(small(), m) for m in small().models}
    search = Search(small(), build_columns(small(), every=True), checkers, 20_000)
    found = search.run().best
    assert found is not None
    assert search.effort.spent
    search.best = None
    search._improve()
    assert search.best is not None
    assert search.best.cost <= found.cost
    assert not search.effort.spent
    search.best = None
    search._improve()  # once a search, however often it is taken up
    assert search.effort._end == 80_000
