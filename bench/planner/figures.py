"""Writes the tables of docs/planner-baselines.md, planner-figures.md and planning.md from bench/results; none is typed.

python bench/planner/figures.py            # rewrites what follows the markers, and draws the pictures again
python bench/planner/figures.py --check    # exits with 1 where a document is not what the files say
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCS, RESULTS = ROOT / "docs", ROOT / "bench" / "results"
MARKER = "<!-- made by bench/planner/figures.py from bench/results -->\n"
METHODS = {
    "distserve": "DistServe's enumeration",
    "distserve-mixed": "the same, a GPU type for each phase",
    "melange": "Mélange's program",
    "aiconfigurator": "AIConfigurator's rate matching",
    "aiconfigurator-mixed": "the same, a GPU type for each phase",
    "aiconfigurator-tool": "AIConfigurator itself",
}
FLEETS = 200
EXAMPLES = ("llama-2-7b", "llama-3-70b", "llama-3-405b", "deepseek-v3")


def baselines_section() -> str:
    """How often each method's plan holds, its cost relative to ours, and its seconds."""
    run = json.loads((RESULTS / "planner_baselines.json").read_text())
    fleets = [f for f in run["fleets"] if f["planner"]["meets"]]
    ours = [f["planner"]["seconds"] for f in fleets]
    lines = [
        "| method | fleets | plans that hold | cost of those / ours | repaired | cost then / ours, median (highest) "
        "| seconds, median (highest) |",
        "|---|---|---|---|---|---|---|",
        f"| hetkv plan | {len(fleets)} | {len(fleets)} | 1 | | 1 | {_spread(ours)} |",
    ]
    for method, name in METHODS.items():
        rows = [f["methods"][method] for f in fleets if "meets" in f["methods"].get(method, {})]
        if rows:
            lines.append(_method(name, rows))
    tool = [f["methods"].get("aiconfigurator-tool", {}) for f in run["fleets"]]
    rejected = sorted({answer["not_covered"].split(". ")[0] for answer in tool if "not_covered" in answer})
    text = "\n".join(lines)
    for reason in rejected:
        text += f"\n\nThe tool was not asked on some fleets: {reason}."
    none = len(run["fleets"]) - len(fleets)
    if none:
        text += (
            f"\n\nOn {none} of the {len(run['fleets'])} fleets the planner found no plan that holds; they are left out."
        )
    return f"\n{text}\n\nFrom `bench/results/planner_baselines.json`: {_origin(run)}.\n"


def _method(name: str, rows: list[dict[str, Any]]) -> str:
    hold = [r for r in rows if r["meets"]]
    repaired = [r["repaired_ratio"] for r in rows if r.get("repaired_ratio")]
    cells = [
        name,
        str(len(rows)),
        str(len(hold)),
        f"{statistics.median(r['ratio'] for r in hold):.2f}" if hold else "",
        f"{len(repaired)} of {len(rows)}",
        _spread(repaired),
        _spread([r["seconds"] for r in rows]),
    ]
    return f"| {' | '.join(cells)} |"


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({max(values):.2f})" if values else ""


def _origin(run: dict[str, Any]) -> str:
    return (
        f"{run['cpus']} CPUs, {run['jobs']} at once, load average {run['load_average']}, commit {run['commit']}, "
        f"{run['time'][:10]}"
    )


def figures_section() -> str:
    """How near the planner's plans are to the optimum, and how long large problems take."""
    run = json.loads((RESULTS / "planner_optimality.json").read_text())
    facts = run["summary"]
    text = f"""
## Optimality

| | |
|---|---|
| random small fleets with a plan | {facts["with_a_plan"]} of {facts["fleets"]} |
| of these the link binds on | {facts["binding_link"]} |
| have two classes | {facts["several_classes"]} |
| plans that meet their SLO in the simulator | {facts["meet_their_slo"]} |
| at the optimum | {facts["at_the_optimum"]} |
| within 1.05 of it (target 97 %) | {facts["within_1.05"]}, {facts["share_within"]:.1%} |
| largest ratio (target 1.15) | {facts["largest_ratio"]:.2f} |
| plans that miss a target on eight other seeds together (target 5 %) | {facts["plans_that_miss_on_other_seeds"]} |
| by at most (target 2 %) | {facts["miss_by_at_most"]:.1%} |
| seconds a plan, mean | {facts["planner_seconds_mean"]:.1f} |

{_left_out(FLEETS - facts["fleets"])}From `bench/results/planner_optimality.json`: {_origin(run)}.
"""
    return text + "".join(
        _speed(path) for name in ("", "_experts") if (path := RESULTS / f"planner_speed{name}.json").exists()
    )


def _left_out(fleets: int) -> str:
    if not fleets:
        return ""
    return f"{fleets} of the {FLEETS} fleets are not among them, as their brute force takes longest.\n\n"


def _speed(path: Path) -> str:
    run = json.loads(path.read_text())
    rows = run["problems"]
    model = rows[0].get("model", "Llama-3.1-70B")
    clock = "columns and solve of CPU time" if rows[0].get("program_seconds_of") == "cpu" else "all of the clock"
    first = [r["columns_seconds"] + r["solve_seconds"] for r in rows]
    verify = [r["verify_seconds"] for r in rows]
    largest = max(r["gap"] for r in rows)
    return f"""
## Speed: {model}

5 GPU types of 10,000 GPUs each, 4 classes, {len(rows)} random rates and targets; seconds, median and worst ({clock}).

| | median | worst | limit |
|---|---|---|---|
| columns | {_both(r["columns_seconds"] for r in rows)} | |
| columns and solve, all rounds | {_both(first)} | 2 |
| verification | {_both(verify)} | 60 |
| rounds | {_both((r["iterations"] for r in rows), "g")} | |
| GPUs of the plan | {_both((r["gpus"] for r in rows), "g")} | |

Largest gap of the integer program: {largest:.2g}. Plans that meet their targets in the simulator:
{sum(r["meets"] for r in rows)} of {len(rows)}.

From `bench/results/{path.name}`: {run["cpus"]} CPUs, commit {run["commit"]}, {run["time"][:10]}.
"""


def _both(values: Iterable[float], kind: str = ".2f") -> str:
    found = list(values)
    return f"{statistics.median(found):{kind}} | {max(found):{kind}}"


def examples_section() -> str:
    """For each example: command, prices, what the plan says, and the table over the rate."""
    run = [name for name in EXAMPLES if (RESULTS / f"plan-{name}.json").exists()]
    left = [name for name in EXAMPLES if name not in run]
    text = "\n" + "\n".join(example(name) for name in run)
    if left:
        text += f"Not run with the present planner: {', '.join(left)}.\n"
    return text


def example(name: str) -> str:
    """The part of one example."""
    facts = json.loads((RESULTS / f"plan-{name}.json").read_text())
    problem = facts["problem"]
    (spec,) = problem["classes"]
    model = problem["models"][0]["name"]
    points = facts["frontier"]["rates"]
    fleets = list(dict.fromkeys(p["fleet"] for p in points))
    split = next(f for f in fleets if " to " in f)
    singles = [f for f in fleets if f != split]
    rows = [
        "| requests/s | " + split + " | P:D GPUs | USD/hour | " + " | ".join(f"{f}, USD/hour" for f in singles) + " |"
    ]
    rows.append("|---" * (4 + len(singles)) + "|")
    for rate in dict.fromkeys(p["rate"] for p in points):
        own = {p["fleet"]: p for p in points if p["rate"] == rate}
        one = own[split]
        ratio = f"{one['prefill_gpus']}:{one['decode_gpus']}" if one["split"] else ""
        cells = [f"{rate:g}", one["split"] or "none meets the targets", ratio, _usd(one)]
        rows.append("| " + " | ".join(cells + [_usd(own[f]) for f in singles]) + " |")
    prices = ", ".join(f"{o['gpu']} {o['usd_per_gpu_hour']:.2f} ({o['basis']}, {o['as_of']})" for o in problem["gpus"])
    weights = problem.get("engine", {}).get("weight_dtype", "bf16")
    percentile = f"p{spec.get('ttft_percentile', 99):g}"
    targets_text = f"TTFT {spec['ttft_ms']:g} ms and TPOT {spec['tpot_ms']:g} ms at {percentile}"
    said = " ".join(facts["worth"].values())
    pair = split.replace(" to ", ":")
    rates = ",".join(f"{p['scale']:g}" for p in points if p["fleet"] == split)
    targets = ",".join(f"{t:g}" for t in dict.fromkeys(p["target"] for p in facts["frontier"]["users"]))
    return "\n".join(
        [
            f"### {model}",
            "",
            f"Prompts {spec['prompt_tokens']}, outputs {spec['output_tokens']}, {weights} weights; {targets_text}. "
            f"Prices in USD per GPU and hour: {prices}.",
            "",
            f"    hetkv plan --problem docs/examples/{name}.yaml --split {pair} --rates {rates} --targets {targets} \\",
            f"        --plot docs/pictures/plan-{name}.png --json bench/results/plan-{name}.json",
            "",
            f"At {spec['rate']:g} requests/s: {_instances(facts)}, {facts['cost_per_hour']:.2f} USD/hour. {said}",
            "",
            *rows,
            "",
            f"![{model}: cost, tokens/s per GPU, and prefill to decode GPUs](pictures/plan-{name}.png)",
            "",
        ]
    )


def _instances(facts: dict[str, Any]) -> str:
    return ", ".join(
        f"{i['count']} {i['role']} on {i['gpu']} TP{i['tp']}" + f" PP{i['pp']}" * (i["pp"] > 1)
        for i in facts["instances"]
    )


def _usd(point: dict[str, Any]) -> str:
    return "none" if point["cost_per_hour"] is None else f"{point['cost_per_hour']:.2f}"


def draw(name: str) -> None:
    """The picture of one example again, from its JSON."""
    import msgspec

    from hetkv.planner.frontier import Frontier
    from hetkv.planner.output.plot import save_frontier

    facts = json.loads((RESULTS / f"plan-{name}.json").read_text())
    found = msgspec.convert(facts["frontier"], Frontier)
    save_frontier(found, str(DOCS / "pictures" / f"plan-{name}.png"), facts["problem"]["models"][0]["name"])


def main() -> int:
    stale = 0
    for name in EXAMPLES if "--check" not in sys.argv else ():
        if (RESULTS / f"plan-{name}.json").exists():
            draw(name)
    made_by = {
        "planner-baselines.md": baselines_section,
        "planner-figures.md": figures_section,
        "planning.md": examples_section,
    }
    for document, section in made_by.items():
        path = DOCS / document
        text = path.read_text(encoding="utf-8")
        before, marker, _ = text.partition(MARKER)
        if not marker:
            print(f"{path}: the marker is missing", file=sys.stderr)
            return 1
        made = before + MARKER + section()
        if "--check" not in sys.argv:
            path.write_text(made, encoding="utf-8")
        elif made != text:
            print(f"{path}: not what bench/results says; run bench/planner/figures.py", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    raise SystemExit(main())
