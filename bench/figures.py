"""Writes the tables of docs/figures.md and README.md from the files of bench/results, so that no figure is typed in.

python bench/figures.py            # rewrites what stands between the markers
python bench/figures.py --check    # exits with 1 where a document is not what the files say
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from hetkv.bench.traffic_cases import rivals

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "figures.md"
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
MARKER = "<!-- made by bench/figures.py from bench/results -->\n"
END = "<!-- end of what bench/figures.py made -->\n"
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


GPU_KINDS = {"move": "same dtype", "convert": "conversions", "transpose": "transposing layouts, x-packed K"}


def gpu_remap_table(file: Path) -> str:
    """Per kind of case and size: as remap_table, against a device-to-device copy; and what the checksum costs."""
    results = json.loads(file.read_text())["results"]
    by_name = {(case["case"], case["mib"]): case["microseconds"] for case in results}
    head = "remap on a GPU, ratio to a device-to-device copy"
    lines = [
        f"| {head} | MiB | target | lowest | median | at target | checksum, median |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, name in GPU_KINDS.items():
        for mib in sorted({case["mib"] for case in results}):
            cases = [case for case in results if case["kind"] == kind and case["mib"] == mib]
            ratios, target = [case["ratio"] for case in cases], cases[0]["target"]
            costs = [
                case["microseconds"] / by_name[plain] - 1
                for case in cases
                if case["checksum"] and (plain := (f"{case['case']}, no checksum", mib)) in by_name
            ]
            reached = sum(ratio >= target for ratio in ratios)
            lines.append(
                f"| {name} | {mib} | {target} | {min(ratios):.2f} | {statistics.median(ratios):.2f} "
                f"| {reached} of {len(ratios)} | {100 * statistics.median(costs):.1f} % |"
            )
    return "\n".join(lines)


UNFAIR = {"nixl"}
"""Peers that these files measured with settings which are not their best: no ratio to them is published."""


def transfer_table(file: Path) -> str:
    """Per destination and path: the rate, and its ratio to UCX and to the peers that were measured."""
    results = json.loads(file.read_text())["results"]
    peers = sorted({name for row in results for name, peer in row["peers"].items() if "gb_s" in peer} - UNFAIR)
    head = "".join(f" x {name} |" for name in peers)
    lines = [
        f"| pool to pool, from nhd 16 to | path | GB/s | of UCX put (target 0.45) |{head}",
        "|---|---|---|---|" + "---|" * len(peers),
    ]
    for row in results:
        to = row["destination"]
        name = to if isinstance(to, str) else f"{to['layout']} {to['block_size']}"
        ratios = "".join(f" {row[f'ratio_{peer}']:.2f} |" for peer in peers)
        lines.append(f"| {name} | {row['path']} | {row['hetkv_gb_s']:.2f} | {row['ratio_ucx']:.2f} |{ratios}")
    return "\n".join(lines)


def device_table(file: Path) -> str:
    """Pool to pool between two GPUs, and what was measured for comparison in the same run."""
    run = json.loads(file.read_text())
    shape = run["shape"]
    lines = [
        f"| between two GPUs, {shape['layers']} layers of {shape['layer_mib']:g} MiB, {shape['source']} to "
        f"{shape['destination']} | path | GB/s |",
        "|---|---|---|",
    ]
    lines += [
        f"| hetkv, {way} | {row['path']} | {row['gb_s']:.1f} |" for way, row in run["hetkv"].items() if "gb_s" in row
    ]
    if run["ucx_contiguous_gb_s"]:
        lines.append(f"| UCX put, one contiguous layer | | {run['ucx_contiguous_gb_s']:.1f} |")
    if "gb_s" in run["pinned_copy"]:
        lines.append(f"| pinned device-to-host copy | | {run['pinned_copy']['gb_s']:.1f} |")
    ratio = f"{run['ratio_pinned_copy']:.2f} (target {run['targets']['ratio_pinned_copy']:g})"
    return "\n".join(lines) + f"\n\nHost-staged, of the pinned copy: {ratio}."


def traffic_table(file: Path) -> str:
    """Steps of many requests, and small ones: all layers ready at once, layer by layer, and latency."""
    run = json.loads(file.read_text())
    peers = file.with_name(file.name.replace("-device", "-peers"))
    measured = run.get("nixl") or (json.loads(peers.read_text())["nixl"] if peers.is_file() and peers != file else [])
    nixl = rivals({"nixl": measured})
    rows: dict[str, dict[str, Any]] = {}
    orders = [row for row in run["results"] if row["kind"] == "order"]
    for row in run["results"]:
        if "gb_s" in row and row["kind"] != "order":
            rows.setdefault(row["name"], {})[row["kind"]] = row
    where = "two GPUs" if "device" in file.name else "two processes of a host with 2 cores"
    lines = [
        f"| between {where}, NHD 16 to HND 64: layers x heads, tokens, requests | GB/s, all ready "
        "| GB/s, layer by layer | us until visible, all ready | us of a call for all requests |"
        + (" x NIXL, its best |" if nixl else ""),
        "|---|---|---|---|---|" + ("---|" if nixl else ""),
    ]
    for name, kinds in rows.items():
        ready = kinds.get("ready") or kinds["latency"]
        step = kinds.get("layers")
        call = (step or ready).get("call_us") or (step or ready).get("send_layer_us")
        line = (
            f"| {name} | {ready['gb_s']:.2f} | {step['gb_s']:.2f} |" if step else f"| {name} | {ready['gb_s']:.2f} | |"
        )
        line += f" {ready['visible_us']:,.0f} | {call:.1f} |"
        if nixl:
            rival = nixl.get((name, ready["dtype"]))
            line += f" {ready['gb_s'] / rival:.1f} |" if rival else " |"
        lines.append(line)
    ends = [
        f"{row['name']}: ends are on average at {row['mean_of_ends_over_last']:.2f} of the last, "
        f"which comes {row['last_call_us']:,.0f} us after its call."
        for row in orders
    ]
    return "\n".join(lines) + ("\n\n" + " ".join(ends) if ends else "")


def latency_table(file: Path) -> str:
    """One small request: its stages, after a short and a long rest."""
    run = json.loads(file.read_text())
    stages = list(run["results"][0]["stages_us"])
    lines = [
        f"| one request between CPU pools, us | rest before it | visible | least | {' | '.join(stages)} |",
        "|---|---|---|---|" + "---|" * len(stages),
    ]
    for row in run["results"]:
        parts = " | ".join(f"{us:.0f}" for us in row["stages_us"].values())
        times = f"{row['visible_us']:.0f} | {row['visible_us_least']:.0f}"
        lines.append(f"| {row['name']} | {row['rest_us']:,} | {times} | {parts} |")
    how = ", the benchmark with real-time priority" if run["real_time"] else ""
    return "\n".join(lines) + f"\n\nMedians. Load average {run['load_average']:g} on {run['cpus']} cores{how}."


def overlap_table(file: Path) -> str:
    """What sending costs a prefill, by batch size and thread blocks of a pack."""
    run = json.loads(file.read_text())
    at_most = run["targets"]
    lines = [
        f"| {run['shape']}, prompt {run['prompt']}: batch | way | prefill ms | slowed (at most "
        f"{100 * at_most['slowdown']:g} %) | a layer's transfer us | exposed, in layers (at most "
        f"{at_most['exposed_layers']}) | after its KV, in layers | TTFT ratio (at most {at_most['ttft_ratio']}) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in run["results"]:
        lines.append(
            f"| {row['batch']} | {row['way']} | {row['prefill_ms']:.1f} | "
            f"{100 * row['slowdown']:.2f} % | {row['layer_us']:.0f} | {row['exposed_layers']:.2f} | "
            f"{row['after_kv_layers']:.2f} | {row['ttft_ratio']:.4f} |"
        )
    return "\n".join(lines)


def resharded_table(file: Path) -> str:
    """Per destination and pair of parallelisms: the rate, and its ratio to TP 1 to TP 1 with the same bytes."""
    run = json.loads(file.read_text())
    target = run["targets"]["ratio_unsharded"]
    lines = [
        f"| from nhd 16 to | TP | processes | path | GB/s | of TP 1 to 1 (target {target}) | rounds | CPU s/GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in run["results"]:
        tp, rounds = " to ".join(map(str, row["tp"])), row["ratio_unsharded_rounds"]
        share = "one" if row["tp"] == [1, 1] else f"one a {row['processes']}"
        spread = "" if row["tp"] == [1, 1] else f"{min(rounds):.2f} to {max(rounds):.2f}"
        lines.append(
            f"| {row['destination']} | {tp} | {share} | {row['path']} | {row['hetkv_gb_s']:.2f} "
            f"| {row['ratio_unsharded']:.2f} | {spread} | {row['cpu_s_per_gb']:.2f} |"
        )
    return "\n".join(lines)


VLLM_TARGETS = {
    "ttft, hetkv prefill_first over NixlConnector": 1.05,
    "exposed, hetkv concurrent over hetkv prefill_first": 0.5,
}


def vllm_table(file: Path) -> str:
    """TTFT, TPOT, exposed time and throughput of vLLM with and without disaggregation; the targets' ratios."""
    run = json.loads(file.read_text())
    options = run["options"]
    lines = [
        f"| vLLM, {options['requests']} requests of {options['prompt']} tokens, blocks {options['prefill_block']} to "
        f"{options['decode_block']} | identical | TTFT ms | whole ms | TPOT ms | exposed ms | tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in run["systems"].items():
        keys = ("ttft_s", "whole_s", "tpot_s", "exposed_s")
        ms = (f"{1e3 * row[key]['median']:.1f}" if key in row else "" for key in keys)
        rate = f"{row['tokens_per_s']['median']:.0f}" if "tokens_per_s" in row else ""
        lines.append(f"| {name} | {row['identical']} of {row['of']} | {' | '.join(ms)} | {rate} |")
    reached = [
        f"{what} {ratio:.3f}" + (f" (at most {VLLM_TARGETS[what]:g})" if what in VLLM_TARGETS else "")
        for what, ratio in run["ratios"].items()
    ]
    return "\n".join(lines) + f"\n\nRatios: {'; '.join(reached)}."


def network_table(file: Path) -> str:
    """hetkv over TCP against a plain socket loop, between two network namespaces."""
    run = json.loads(file.read_text())
    lines = [
        "| TCP between two network namespaces | connections | plain loop, GB/s | hetkv, GB/s | ratio (target "
        f"{run['target']}) | CPU s/GB, plain | hetkv |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in run["results"]:
        limit = f"{row['mbit'] / 1000:g} Gbit/s" if row["mbit"] else "no limit"
        rates = f"{row['plain_gb_s']:.2f} | {row['hetkv_gb_s']:.2f} | {row['ratio']:.2f}"
        cpu = f"{row['plain_cpu_s_per_gb']:.2f} | {row['hetkv_cpu_s_per_gb']:.2f}"
        lines.append(f"| {limit} | {row['connections']} | {rates} | {cpu} |")
    return "\n".join(lines) + f"\n\nOther work ran on the {run['cpus']} cores: load average {run['load_average']:g}."


def origin(file: Path) -> str:
    run: dict[str, Any] = json.loads(file.read_text())
    device = ", ".join(run.get("gpus", [])) or run["device"]
    return f"`bench/results/{file.name}`: {device}, {run['cpus']} CPUs, commit {run['commit']}, {run['time'][:10]}."


def section() -> str:
    """The generated part of the document."""
    remaps = sorted(RESULTS.glob("remap-*.json"))
    transfer = RESULTS / "transfer.json"
    more = [("transfer-resharded.json", resharded_table), ("transfer-device.json", device_table)]
    more.append(("gpu-remap.json", gpu_remap_table))
    more += [("traffic-device.json", traffic_table), ("traffic.json", traffic_table)]
    more.append(("latency.json", latency_table))
    more.append(("network.json", network_table))
    more.append(("overlap.json", overlap_table))
    more.append(("vllm_pd.json", vllm_table))
    peers = [file for file in [RESULTS / "traffic-peers.json"] if file.is_file()]
    found = [(RESULTS / name, table) for name, table in more if (RESULTS / name).is_file()]
    tables = [remap_table(remaps), transfer_table(transfer), *(table(file) for file, table in found)]
    sources = "\n".join(f"- {origin(file)}" for file in [*remaps, transfer, *(f for f, _ in found), *peers])
    return "\n" + "\n\n".join([*tables, "From", sources]) + "\n"


def readme() -> str:
    """The table of README.md: one row a question, each from one file."""
    host = json.loads((RESULTS / "transfer.json").read_text())
    gpus = json.loads((RESULTS / "transfer-device.json").read_text())
    overlap = json.loads((RESULTS / "overlap.json").read_text())
    pair = next(row for row in host["results"] if row["destination"] == "hnd:64" and row["path"] == "shm")
    best = gpus["hetkv"]["auto"]
    single = next(row for row in overlap["results"] if row["batch"] == 1)
    steps = json.loads((RESULTS / "traffic-device.json").read_text())["results"]
    nixl = rivals(json.loads((RESULTS / "traffic-peers.json").read_text()))

    def step(name: str, words: str) -> tuple[str, str, str, str]:
        row = next(row for row in steps if row["name"] == name and row["kind"] == "ready")
        rival = nixl[name, row["dtype"]]
        ratio = row["gb_s"] / rival
        return (f"The same two, {words}", f"{row['gb_s']:.0f} GB/s",
                f"{ratio:.0f} x NIXL at its best settings ({rival:.1f} GB/s)", "traffic-device")  # fmt: skip

    rows = [
        ("Two H200 of one host, layers of 16 MiB", f"{best['gb_s']:.0f} GB/s",
         f"{best['gb_s'] / gpus['ucx_contiguous_gb_s']:.2f} of UCX's put of one contiguous buffer", "transfer-device"),
        step("80 x 1 head, 1k tokens", "one request of 80 layers of one KV head (a rank of TP 8), 1,024 tokens"),
        step("80 x 1 head, 1k tokens, 32 requests", "32 such requests in one step"),
        step("32 x 8 heads, 128 tokens, 64 requests", "64 requests of 32 layers of 8 KV heads, 128 tokens"),
        ("Two processes of a host with 2 cores", f"{pair['hetkv_gb_s']:.1f} GB/s",
         f"{pair['ratio_ucx']:.2f} of UCX's put; {pair['ratio_mooncake']:.1f} x Mooncake (TCP); "
         f"{pair['ratio_ucxx']:.1f} x UCXX", "transfer"),
        (f"Prefill of {overlap['shape']}, {overlap['prompt']} tokens, while it sends",
         f"{100 * single['slowdown']:.1f} % slower", f"{single['exposed_layers']:.2f} layers of transfer exposed",
         "overlap"),
    ]  # fmt: skip
    lines = ["| NHD, blocks of 16 tokens to HND, blocks of 64 | hetkv | compared | file |", "|---|---|---|---|"]
    lines += [f"| {what} | {figure} | {to} | `bench/results/{file}.json` |" for what, figure, to, file in rows]
    return "\n" + "\n".join(lines) + "\n\n"


def filled(document: Path, made: str) -> str | None:
    """The document with `made` between its markers; `None` where a marker is missing."""
    before, marker, rest = document.read_text().partition(MARKER)
    _, end, after = rest.partition(END)
    return before + MARKER + made + END + after if marker and end else None


def main() -> int:
    status = 0
    for document, made in ((DOCUMENT, section()), (README, readme())):
        text = filled(document, made)
        if text is None:
            print(f"{document}: a marker is missing", file=sys.stderr)
            status = 1
        elif "--check" not in sys.argv:
            document.write_text(text)
        elif text != document.read_text():
            print(f"{document}: not what the files of bench/results say; run bench/figures.py", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    raise SystemExit(main())
