"""A self-contained HTML report of a plan: no script, nothing fetched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape

from hetkv.planner.frontier import Frontier, Point
from hetkv.planner.output import replay_plot
from hetkv.planner.output import terminal as show
from hetkv.planner.output.explain import others, own_option, phase_values, reasons, worth
from hetkv.planner.output.kubernetes import kubernetes_yaml
from hetkv.planner.output.launch import sglang_lines, vllm_lines
from hetkv.planner.output.plot import draw, svg
from hetkv.planner.problem import Problem, dump_problem
from hetkv.planner.replay import Period, Replan
from hetkv.planner.result import ClassLatency, Plan, gpus, split
from hetkv.simulator.deployment import dump_plan
from hetkv.simulator.output.html import STYLE, milliseconds

OWN_STYLE = """
.worth { border-left: 3px solid var(--accent); padding: 6px 12px; margin: 8px 0; background: #f4f8fc; }
.bar { display: inline-block; height: 9px; border-radius: 2px; background: #c9d3dc; vertical-align: middle; }
tr.own td { font-weight: 600; } tr.own .bar { background: var(--accent); }
tr.none td { color: var(--faint); }
td.bad { color: #b8434e; } td.good { color: #2d7a50; }
ul.why { padding-left: 18px; } ul.why li { margin: 4px 0; }
details { margin: 10px 0; } pre { white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def html(
    problem: Problem,
    plan: Plan,
    found: Frontier | None = None,
    replanned: Replan | None = None,
    gpus_per_node: Mapping[str, int] | None = None,
) -> str:
    """The whole page; `found` and `replanned` are drawn where there are any."""
    title = f"{split(plan.instances)}"
    models = ", ".join(m.name for m in problem.models)
    traffic = ", ".join(f"{c.name} at {c.rate:g}/s" for c in problem.classes)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="about">{escape(models)} &middot; {escape(traffic)} &middot; goal: {plan.goal}</p>',
        f'<div class="tiles">{"".join(_tile(*t) for t in _tiles(plan))}</div>',
    ]
    parts += [f'<div class="note">{escape(note)}</div>' for note in plan.notes]
    parts += ["<h2>Why this one</h2>"]
    parts += [f'<div class="worth">{escape(text)}</div>' for text in worth(problem, plan).values()]
    parts.append(f'<ul class="why">{"".join(f"<li>{escape(r)}</li>" for r in reasons(problem, plan))}</ul>')
    parts += ["<h2>Deployment</h2>", _deployment(plan), "<h2>Targets</h2>", _targets(plan)]
    parts += ["<h2>What each GPU is worth</h2>", _values(problem, plan)]
    parts += ["<h2>Alternatives</h2>", _others(plan)]
    if found is not None:
        parts += ["<h2>Other rates, other targets</h2>", svg(draw(found)), _frontier(found)]
    if replanned is not None:
        parts += ["<h2>Through the trace</h2>", svg(replay_plot.draw(replanned)), _periods(replanned)]
    parts += ["<h2>To start it</h2>", *_launch(plan, gpus_per_node)]
    parts += ["<h2>Asked</h2>", f"<pre>{escape(dump_problem(problem))}</pre>"]
    parts.append(
        f'<p class="small">columns {plan.columns_seconds:.2f} s, solve {plan.solve_seconds:.2f} s, verification '
        f"{plan.verify_seconds:.1f} s, {plan.iterations} iterations</p>"
    )
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}{OWN_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _tile(value: str, label: str) -> str:
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>'


def _tiles(plan: Plan) -> list[tuple[str, str]]:
    tiles = []
    if plan.cost_per_hour is not None:
        tiles.append((f"${plan.cost_per_hour:,.2f}", "per hour"))
    if plan.kw is not None:
        tiles.append((f"{plan.kw:,.3g}", "kW"))
    if plan.co2_kg_per_hour is not None:
        tiles.append((f"{plan.co2_kg_per_hour:,.3g}", "kg CO2 per hour"))
    tiles += [
        (f"{plan.rate:,.4g}", "requests/s"),
        (f"{gpus(plan.instances)}", "GPUs"),
        (show.pd_ratio(plan), "prefill to decode GPUs"),
        ("meets" if plan.meets else "misses", "its targets, simulated"),
    ]
    if plan.simulated_slack is not None:
        tiles.append((f"{plan.simulated_slack:.0%}", "more traffic fits"))
    return tiles


def _rows(head: Iterable[tuple[str, str]], rows: Iterable[str]) -> str:
    cells = "".join(f'<th class="{kind}">{escape(name)}</th>' for name, kind in head)
    return f"<table><tr>{cells}</tr>{''.join(rows)}</table>"


def _deployment(plan: Plan) -> str:
    head = [
        ("role", ""),
        ("GPU", ""),
        ("model", ""),
        ("TP", "n"),
        ("PP", "n"),
        ("DP", "n"),
        ("instances", "n"),
        ("GPUs", "n"),
    ]
    rows = []
    for one in plan.instances:
        cells = f"<td>{one.role}</td><td>{escape(one.gpu)}</td><td>{escape(one.model)}</td>"
        numbers = [one.tp, one.pp, one.dp, one.count, one.count * one.gpus]
        cells += "".join(f'<td class="n">{n}</td>' for n in numbers)
        cells += f'<td class="n">{"" if one.usd_per_hour is None else f"{one.count * one.usd_per_hour:,.2f}"}</td>'
        rows.append(f"<tr>{cells}</tr>")
    return _rows([*head, ("USD/hour", "n")], rows)


def _targets(plan: Plan) -> str:
    rows = []
    for name, said in plan.simulated.items():
        predicted = plan.predicted.get(name)
        for kind, limit, simulated, foretold in (
            (f"TTFT p{said.ttft_percentile:g}", said.ttft_limit_ms, said.ttft_ms, _of(predicted, "ttft_ms")),
            (f"TPOT p{said.tpot_percentile:g}", said.tpot_limit_ms, said.tpot_ms, _of(predicted, "tpot_ms")),
        ):
            used = min((simulated or 0.0) / limit, 1.5)
            good = simulated is None or simulated <= limit
            rows.append(
                f"<tr{' class=own' if good else ''}><td>{escape(name)}</td><td>{kind}</td>"
                f'<td class="n">{milliseconds(limit)}</td><td class="n">{milliseconds(foretold)}</td>'
                f'<td class="n {"good" if good else "bad"}">{milliseconds(simulated)}</td>'
                f'<td><span class="bar" style="width:{120 * used:.0f}px"></span></td></tr>'
            )
    head = [("class", ""), ("", ""), ("limit", "n"), ("predicted", "n"), ("simulated", "n"), ("of the limit", "")]
    return _rows(head, rows)


def _of(latency: ClassLatency | None, field: str) -> float | None:
    return None if latency is None else getattr(latency, field)


def _values(problem: Problem, plan: Plan) -> str:
    unit = "USD/hour" if problem.prices else "GPU"
    values = phase_values(problem, plan)
    rows = []
    for value in values:
        top = max(v.rate_per_usd for v in values if (v.model, v.role) == (value.model, value.role))
        shape = f"TP{value.tp}" + f" PP{value.pp}" * (value.pp > 1) + f" DP{value.dp}" * (value.dp > 1)
        rows.append(
            f"<tr{' class=own' if value.chosen else ''}><td>{escape(value.model)}</td><td>{value.role}</td>"
            f'<td>{escape(value.gpu)}</td><td>{shape}</td><td class="n">{value.rate:.3g}</td>'
            f'<td class="n">{value.rate_per_usd:.3g}</td>'
            f'<td><span class="bar" style="width:{140 * value.rate_per_usd / top:.0f}px"></span></td></tr>'
        )
    head = [
        ("model", ""),
        ("role", ""),
        ("GPU", ""),
        ("best size", ""),
        ("requests/s each", "n"),
        (f"per {unit}", "n"),
        ("", ""),
    ]
    text = "Requests/s of one instance in a large pool that keeps the targets; bold where the plan uses it."
    return _rows(head, rows) + f'<p class="small">{text}</p>'


def _others(plan: Plan) -> str:
    options = [own_option(plan), *others(plan)]
    numbers = [o.cost_per_hour if plan.goal == "cost" else o.rate for o in options]
    top = max((n for n in numbers if n is not None), default=1.0)
    rows = []
    for option, number in zip(options, numbers, strict=True):
        kind = "own" if option.name == "this plan" else "" if option.feasible else "none"
        width = 140 * (number or 0.0) / top if option.instances else 0
        why = f' <span class="small">({escape(option.why)})</span>' if option.why and option.instances else ""
        rows.append(
            f'<tr class="{kind}"><td>{escape(option.name)}</td><td class="s">{show.verdict(option)}</td>'
            f"<td>{escape(show.option_split(option))}{why}</td>"
            f'<td class="n">{show.option_figure(plan, option)}</td><td class="n">{show.against(plan, option)}</td>'
            f'<td><span class="bar" style="width:{width:.0f}px"></span></td></tr>'
        )
    head = [
        ("plan", ""),
        ("targets", ""),
        ("instances", ""),
        (show.figure_head(plan), "n"),
        ("against this", "n"),
        ("", ""),
    ]
    return _rows(head, rows)


def _frontier(found: Frontier) -> str:
    rows = [
        f'<tr{"" if p.split else " class=none"}><td>{escape(p.fleet)}</td><td class="n">{p.rate:,.4g}</td>'
        f'<td class="n">{p.target:g} x</td><td>{escape(p.split or p.why)}</td>'
        f'<td class="n">{_number(p.cost_per_hour)}{show.mark(p)}</td>'
        f'<td class="n">{_number(p.gpu_tokens_per_s)}</td><td class="n">{_number(p.user_tokens_per_s)}</td></tr>'
        for p in dict.fromkeys([*found.rates, *found.users])
    ]
    head = [("fleet", ""), ("requests/s", "n"), ("TPOT limit", "n"), ("instances", ""), ("USD/hour", "n")]
    head += [("tokens/s per GPU", "n"), ("per user", "n")]
    table = _rows(head, rows)
    said = _cut([*found.rates, *found.users])
    return f"<details><summary>All {len(rows)} plans</summary>{table}{said}</details>"


def _cut(points: Iterable[Point | Period]) -> str:
    texts = dict.fromkeys(p.cut for p in points if p.cut)
    return "".join(f'<p class="small">{escape(f"{show.CUT} ({text})")}</p>' for text in texts)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def _periods(found: Replan) -> str:
    rows = []
    for w in found.periods:
        ratio = "" if w.ratio is None else f"{w.prefill_gpus}:{w.decode_gpus}"
        rows.append(
            f'<tr><td class="s">{w.start_s / 60:.0f} to {w.end_s / 60:.0f} min</td><td class="n">{w.rate:.3g}</td>'
            f'<td class="n">{w.prompt_mean:,.0f}</td><td class="n">{w.output_mean:,.0f}</td><td class="n">{ratio}</td>'
            f"<td>{escape(w.split or w.why)}</td><td class=n>{_number(w.cost_per_hour)}{show.mark(w)}</td>"
            f'<td class="{"bad" if w.replay_meets is False else ""}">{show.replayed(w)}</td></tr>'
        )
    head = [("period", ""), ("requests/s", "n"), ("prompt", "n"), ("output", "n"), ("P:D GPUs", "n"), ("plan", "")]
    text = "The last column replays the period's own requests, bursts and prefixes included. Where a plan for Poisson "
    text += "arrivals at their mean rate misses a target, the plan shown is the cheapest one found that holds."
    if found.cost is not None and found.peak_cost is not None:
        text += f" {found.cost:,.2f} USD with a plan a period, {found.peak_cost:,.2f} USD with the costliest one kept."
    return (
        _rows([*head, ("USD/hour", "n"), ("own requests", "")], rows)
        + f'<p class="small">{text}</p>'
        + _cut(found.periods)
    )


def _launch(plan: Plan, gpus_per_node: Mapping[str, int] | None) -> list[str]:
    parts = []
    for model, deployment in plan.deployments.items():
        many = f" ({model})" if len(plan.deployments) > 1 else ""
        for name, text, shown in (
            ("plan.yaml, for `hetkv simulate --plan`", dump_plan(deployment), False),
            ("vLLM", vllm_lines(deployment, gpus_per_node), True),
            ("SGLang", sglang_lines(deployment, gpus_per_node), False),
            ("Kubernetes, a sketch", kubernetes_yaml(deployment, gpus_per_node), False),
        ):
            summary = f"<summary>{escape(name + many)}</summary>"
            parts.append(f"<details{' open' * shown}>{summary}<pre>{escape(text)}</pre></details>")
    return parts
