"""Writes the tables of docs/measuring.md from the files of bench/results, so that no figure there is typed in.

python bench/figures.py            # rewrites the section behind the marker
python bench/figures.py --check    # exits with 1 where the document is not what the files say
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "measuring.md"
RESULTS = ROOT / "bench" / "results"
MARKER = "<!-- made by bench/figures.py from bench/results -->\n"
KINDS = {0.85: "same dtype, runs of 256 bytes or more", 0.6: "conversions", 0.5: "transposing layouts"}


def remap_table(files: list[Path]) -> str:
    """Per kind of case and thread count: the lowest and the median ratio, and how many reach the target."""
    lines = ["| remap, ratio to memcpy | threads | target | lowest | median | at target |", "|---|---|---|---|---|---|"]
    for file in files:
        run = json.loads(file.read_text())
        for target, kind in KINDS.items():
            ratios = [case["ratio"] for case in run["results"] if case["target"] == target]
            reached = sum(ratio >= target for ratio in ratios)
            lines.append(
                f"| {kind} | {run['threads']} | {target} | {min(ratios):.2f} | {statistics.median(ratios):.2f} "
                f"| {reached} of {len(ratios)} |"
            )
    return "\n".join(lines)


def transfer_table(file: Path) -> str:
    """Per destination and reach: the rate, and its ratio to UCX and to the peers that were measured."""
    results = json.loads(file.read_text())["results"]
    peers = sorted({name for row in results for name, peer in row["peers"].items() if "gb_s" in peer})
    head = "".join(f" x {name} (target 2.5) |" if name == "nixl" else f" x {name} |" for name in peers)
    lines = [
        f"| pool to pool, from nhd 16 to | reach | GB/s | of UCX put (target 0.45) |{head}",
        "|---|---|---|---|" + "---|" * len(peers),
    ]
    for row in results:
        to = row["destination"]
        name = to if isinstance(to, str) else f"{to['layout']} {to['block_size']}"
        ratios = "".join(f" {row[f'ratio_{peer}']:.2f} |" for peer in peers)
        lines.append(f"| {name} | {row['reach']} | {row['hetkv_gb_s']:.2f} | {row['ratio_ucx']:.2f} |{ratios}")
    return "\n".join(lines)


def resharded_table(file: Path) -> str:
    """Per destination and pair of parallelisms: the rate, and its ratio to TP 1 to TP 1 with the same bytes."""
    run = json.loads(file.read_text())
    target = run["targets"]["ratio_unsharded"]
    lines = [
        f"| from nhd 16 to | TP | processes | reach | GB/s | of TP 1 to 1 (target {target}) | rounds | CPU s/GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in run["results"]:
        tp, rounds = " to ".join(map(str, row["tp"])), row["ratio_unsharded_rounds"]
        share = "one" if row["tp"] == [1, 1] else f"one a {row['processes']}"
        spread = "" if row["tp"] == [1, 1] else f"{min(rounds):.2f} to {max(rounds):.2f}"
        lines.append(
            f"| {row['destination']} | {tp} | {share} | {row['reach']} | {row['hetkv_gb_s']:.2f} "
            f"| {row['ratio_unsharded']:.2f} | {spread} | {row['cpu_s_per_gb']:.2f} |"
        )
    return "\n".join(lines)


def origin(file: Path) -> str:
    run: dict[str, Any] = json.loads(file.read_text())
    return (
        f"`bench/results/{file.name}`: {run['device']}, {run['cpus']} CPUs, commit {run['commit']}, {run['time'][:10]}."
    )


def section() -> str:
    """The generated part of the document."""
    remaps = sorted(RESULTS.glob("remap-*.json"))
    transfer = RESULTS / "transfer.json"
    resharded = [file for file in (RESULTS / "transfer-resharded.json",) if file.is_file()]
    tables = [remap_table(remaps), transfer_table(transfer), *map(resharded_table, resharded)]
    sources = "\n".join(f"- {origin(file)}" for file in [*remaps, transfer, *resharded])
    return "\n" + "\n\n".join([*tables, "From", sources]) + "\n"


def main() -> int:
    text = DOCUMENT.read_text()
    before, marker, _ = text.partition(MARKER)
    if not marker:
        print(f"{DOCUMENT}: the marker is missing", file=sys.stderr)
        return 1
    made = before + MARKER + section()
    if "--check" in sys.argv:
        return int(made != text)
    DOCUMENT.write_text(made)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
