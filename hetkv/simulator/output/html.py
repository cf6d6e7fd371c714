"""A self-contained HTML report of one simulation: no script, nothing fetched."""

from __future__ import annotations

from html import escape
from typing import Any

from hetkv.simulator.deployment import Plan, dump_plan
from hetkv.simulator.metrics import METRICS, PERCENTILES, Slo
from hetkv.simulator.output.plot import svg
from hetkv.simulator.run import Result

TIMES = (
    "t_arr arrival, t_sch first step with a token of the prompt, t_1 first and t_n last output token, t_pre prompt "
    "computed, t_kv KV complete at the decode instance, t_dec first decode step begins; n output tokens; T simulated "
    "time."
)
COUNTS = {
    "preemptions": "sequences that lost their KV to make room, and were computed again",
    "restarts": "requests that lost their instance, and began again elsewhere",
    "failures": "instances that failed",
    "rejected": "requests longer than the KV cache of the smallest instance",
    "failed": "requests lost with their instance, or never served",
}
LINK = {
    "transfers": ("", "transfers over the KV link"),
    "gigabytes": ("GB", "moved over the KV link"),
    "mean_gb_s": ("GB/s", "mean over T, all instances together"),
    "peak_gb_s": ("GB/s", "highest, all instances together"),
    "peak_transfers": ("", "most transfers at once"),
}
STYLE = """
:root { color-scheme: light; --ink: #22303c; --faint: #6b7885; --line: #e3e7eb; --accent: #2f6db3; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 40px 28px 64px; color: var(--ink); background: #fff;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 17px; margin: 40px 0 12px; }
.about { color: var(--faint); margin: 0 0 28px; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; }
.tile { flex: 1 1 150px; border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.tile b { display: block; font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile span { color: var(--faint); font-size: 13px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; font-size: 13px; color: var(--faint); }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.u, td.s { white-space: nowrap; color: var(--faint); }
td.s { color: var(--ink); }
.small { color: var(--faint); font-size: 13px; }
@page { size: A3 landscape; margin: 12mm; }
.note { border-left: 3px solid #d1722c; padding: 6px 12px; margin: 8px 0; background: #fdf7f2; }
svg { width: 100%; height: auto; }
pre { background: #f6f8f9; border-radius: 8px; padding: 14px 16px; overflow-x: auto; font-size: 13px; }
details summary { cursor: pointer; color: var(--accent); }
"""


def html(result: Result, plan: Plan, slo: Slo, title: str) -> str:
    """The whole page."""
    summary = result.summary
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="about">{escape(plan.model)} &middot; {escape(_pools(plan))} &middot; {escape(summary["workload"])} '
        f"&middot; seed {summary['seed']}</p>",
        f'<div class="tiles">{"".join(_tile(*t) for t in _tiles(summary, slo))}</div>',
    ]
    if result.notes:
        parts.append("<h2>Read this first</h2>")
        parts += [f'<div class="note">{escape(note)}</div>' for note in result.notes]
    parts += ["<h2>Latencies, queues and utilisation</h2>", svg(result, slo)]
    parts += ["<h2>Percentiles</h2>", _percentiles(summary), f'<p class="small">{escape(TIMES)}</p>']
    if "interval" in summary:
        parts += ["<h2>With step times at the ends of their 90 % interval</h2>", _interval(summary)]
    parts += ["<h2>All figures</h2>", _figures(summary)]
    parts += ["<h2>Plan</h2>", f"<pre>{escape(dump_plan(plan))}</pre>"]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _pools(plan: Plan) -> str:
    def one(count: int, gpu: str, tp: int, pp: int, role: str) -> str:
        split = f" TP{tp}" * (tp > 1) + f" PP{pp}" * (pp > 1)
        return f"{count} {role} on {gpu}{split}"

    return ", ".join(one(p.count, p.gpu, p.tp, p.pp, p.role) for p in plan.pools)


def _tiles(summary: dict[str, Any], slo: Slo) -> list[tuple[str, str]]:
    tiles = [
        (f"{summary['finished'] / summary['requests']:.1%}", f"finished of {summary['requests']:,} requests"),
        (milliseconds(summary["ttft_ms"]["p90"]), "TTFT p90"),
        (milliseconds(summary["tpot_ms"]["p90"]), "TPOT p90"),
        (f"{summary['output_tokens_per_s']:,.0f}", "output tokens/s"),
    ]
    if any(v is not None for v in slo.as_json().values()):
        ends = summary.get("interval", {})
        span = " to ".join(f"{ends[end]['slo_attainment']:.1%}" for end in ("high", "low")) if ends else ""
        interval = f" ({span} over the interval of the step times)" if span else ""
        tiles.append((f"{summary['slo_attainment']:.1%}", f"within the SLO{interval}"))
        tiles.append((f"{summary['goodput_rps']:,.2f}", "goodput, requests/s"))
    for gpu, share in summary["utilisation"].items():
        tiles.append(("none" if share is None else f"{share:.0%}", f"utilisation, {gpu}"))
    if summary["usd_per_million_output_tokens"] is not None:
        tiles.append((f"${summary['usd_per_million_output_tokens']:,.2f}", "per million output tokens"))
    return tiles


def _tile(value: str, label: str) -> str:
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>'


def _percentiles(summary: dict[str, Any]) -> str:
    head = "".join(f'<th class="n">p{p}</th>' for p in PERCENTILES) + '<th class="n">mean</th>'
    rows = []
    for metric in METRICS:
        spread = summary.get(metric.key)
        if isinstance(spread, dict) and spread.get("mean") is not None:
            cells = "".join(f'<td class="n">{milliseconds(v)}</td>' for v in spread.values())
            rows.append(f"<tr><td><b>{metric.symbol}</b></td>{cells}<td>{escape(metric.definition)}</td></tr>")
    return f"<table><tr><th></th>{head}<th>definition</th></tr>{''.join(rows)}</table>"


def _interval(summary: dict[str, Any]) -> str:
    rows = []
    columns = {"low": summary["interval"]["low"], "central": summary, "high": summary["interval"]["high"]}
    for metric in METRICS:
        values = [figures.get(metric.key) for figures in columns.values()]
        if isinstance(values[0], dict):
            named = [(f"{metric.symbol} p{p}", [milliseconds(v[f"p{p}"]) for v in values if v]) for p in PERCENTILES]
        elif values[0] is not None:
            named = [(f"{metric.symbol} ({metric.unit})", [f"{v:,.4g}" for v in values if v is not None])]
        else:
            continue
        for name, cells in named:
            rows.append(f"<tr><td class='s'><b>{name}</b></td>{''.join(f'<td class=n>{c}</td>' for c in cells)}</tr>")
    head = "".join(f'<th class="n">{name} step times</th>' for name in columns)
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _figures(summary: dict[str, Any]) -> str:
    rows = []
    for metric in METRICS:
        value = summary.get(metric.key)
        if isinstance(value, (int, float)):
            rows.append(_figure(f"<b>{metric.symbol}</b>", value, metric.unit, metric.definition))
    for key, text in COUNTS.items():
        rows.append(_figure(key, summary[key], "", text))
    for key, value in (summary["link"] or {}).items():
        rows.append(_figure("KV link", value, *LINK[key]))
    return f"<table>{''.join(rows)}</table>"


def _figure(name: str, value: float, unit: str, text: str) -> str:
    number = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
    cells = f"<td class='s'>{name}</td><td class='n'>{number}</td><td class='u'>{'' if unit == '1' else unit}</td>"
    return f"<tr>{cells}<td>{escape(text)}</td></tr>"


def milliseconds(value: float | None) -> str:
    """A time for people: three digits, ms or s."""
    if value is None:
        return "none"
    return f"{value / 1e3:.3g} s" if value >= 1000 else f"{value:.3g} ms"
