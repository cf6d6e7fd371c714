"""All ordered pairs of engines: prefill in one, decode in the other, against the decode engine alone; docs/engines.md.

python bench/engines.py --engines '{"vllm": {"python": "..."}}'   # runs all pairs, and writes the tables
python bench/engines.py --table                                   # the tables alone, from the file of results
python bench/engines.py --check                                   # exits with 1 where they are not those of the file
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from hetkv.integrations.instance import Generated  # noqa: E402
from hetkv.integrations.pairs import PairResult, Pairs, Side, engines  # noqa: E402
from hetkv.integrations.sampling import divergence  # noqa: E402
from tests.integrations.checkpoints import llama  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "engines.json"
DOCUMENT = ROOT / "docs" / "engines.md"
MARKER = "<!-- made by bench/engines.py from bench/results/engines.json -->\n"
END = "<!-- end of what bench/engines.py made -->\n"
LENGTHS = (5, 6, 7, 9, 13, 16, 17, 24, 31, 32, 33, 40, 48, 63, 65, 90, 127, 129, 256, 800)
NEW_TOKENS = 64
HALF_TOKENS, HALF_STEP = 16, 3
"""In 16 bits: tokens whose distributions are compared, and which of the lengths are taken."""
HEADS = {"gqa": (4, 2), "mha": (2, 2)}
PACKAGES = {
    "reference": "reference",
    "transformers": "transformers",
    "vllm": "vllm",
    "llama.cpp": "llama_cpp",
    "mlx": "mlx",
}


def run(sides: dict[str, Side]) -> dict[str, Any]:
    """All pairs with both checkpoints."""
    draw = random.Random(2)
    prompts = [[draw.randrange(3, 3000) for _ in range(length)] for length in LENGTHS]
    pairs_of = [(prefill, decode) for prefill in sides for decode in sides]
    found: dict[str, Any] = {"pairs": [], "engines": {}, "lines": {name: lines_of(PACKAGES[name]) for name in sides}}
    for kind, (heads, kv_heads) in HEADS.items():
        with tempfile.TemporaryDirectory() as folder:
            model = llama(Path(folder) / kind, heads=heads, kv_heads=kv_heads)
            with engines(str(model), sides, pairs_of, {"capacity": 1024, "slots": 2}) as processes:
                pairs = Pairs(processes, NEW_TOKENS)
                for name, process in processes.items():
                    facts = process.call("facts")
                    found["engines"][name] = {k: v for k, v in facts.items() if k not in ("fingerprint", "pool")}
                for prefill, decode in pairs_of:
                    half, begin = len(prompts) // 2, time.monotonic()
                    concurrent = pairs.run(prefill, decode, prompts[:half], "concurrent")
                    first = pairs.run(prefill, decode, prompts[half:], "prefill_first")
                    result = PairResult(prefill=prefill, decode=decode, requests=concurrent.requests + first.requests)
                    found["pairs"].append(_row(kind, result))
                    print(f"{kind} {prefill} to {decode}: {result.identical} of {len(prompts)} identical, "
                          f"{time.monotonic() - begin:.1f} s", flush=True)  # fmt: skip
    return found


def run_half(sides: dict[str, Side], dtype: str) -> dict[str, Any]:
    """All pairs in a dtype of 16 bits with the first checkpoint: how far the next-token distributions are from those of
    the decode engine alone, and how far those of the two engines, each alone, are from each other."""
    draw = random.Random(3)
    prompts = [[draw.randrange(3, 3000) for _ in range(length)] for length in LENGTHS[::HALF_STEP]]
    pairs_of = [(prefill, decode) for prefill in sides for decode in sides]
    options = {name: {**side.options, "dtype": dtype} for name, side in sides.items()}
    if "vllm" in options:
        options["vllm"]["distributions"] = True
    sides = {name: Side(python=side.python, options=options[name]) for name, side in sides.items()}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = llama(Path(folder) / "half", heads=4, kv_heads=2, dtype=dtype)
        with engines(str(model), sides, pairs_of, {"capacity": 1024, "slots": 2}) as processes:
            pairs = Pairs(processes, HALF_TOKENS, distributions=HALF_TOKENS)
            for prefill, decode in pairs_of:
                result = pairs.run(prefill, decode, prompts)
                alone = [_between(pairs.alone(prefill, prompt), pairs.alone(decode, prompt)) for prompt in prompts]
                rows.append({"prefill": prefill, "decode": decode, "kl": result.kl, "kl_alone": max(alone),
                             "identical": result.identical, "requests": len(prompts)})  # fmt: skip
                print(f"{dtype} {rows[-1]}", flush=True)
    return {"dtype": dtype, "tokens": HALF_TOKENS, "pairs": rows}


def _between(first: Generated, second: Generated) -> float:
    """Of what two engines say alone: the largest KL of those tokens for which both have seen the same ones."""
    found = []
    for p, q, a, b in zip(first.distributions, second.distributions, first.tokens, second.tokens, strict=True):
        assert p is not None
        assert q is not None
        found.append(divergence(np.array(p), np.array(q)))
        if a != b:
            break
    return max(found)


def _row(kind: str, result: PairResult) -> dict[str, Any]:
    differences = [r.first_difference for r in result.requests if r.first_difference is not None]
    return {
        "checkpoint": kind,
        "prefill": result.prefill,
        "decode": result.decode,
        "requests": len(result.requests),
        "identical": result.identical,
        "first_difference": min(differences, default=None),
        **{name: round(result.median(name), 3) for name in ("ttft_ms", "prefill_ms", "alone_ms")},
    }


def lines_of(package: str) -> int:
    """Of an integration's code."""
    folder = ROOT / "hetkv" / "integrations" / package
    return sum(path.read_text(encoding="utf-8").count("\n") for path in folder.glob("*.py"))


def tables(run: dict[str, Any]) -> str:
    """What stands between the markers."""
    by_pair: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in run["pairs"]:
        by_pair.setdefault((row["prefill"], row["decode"]), {})[row["checkpoint"]] = row
    keys = ("vllm", "mlx", "llama_cpp_python", "transformers", "torch")
    named = ((name, key, facts[key]) for name, facts in run["engines"].items() for key in keys if key in facts)
    first: dict[str, str] = {}
    for name, key, version in named:
        first.setdefault(name, f"{name} {version}" if key == name else f"{name} with {key} {version}")
    versions = "; ".join(first.values())
    lines = [
        f"{len(LENGTHS)} prompts of {min(LENGTHS)} to {max(LENGTHS)} tokens x {NEW_TOKENS} new tokens, float32; half "
        f"of them with both instances asked at once, half with the prefill first. {versions}.",
        "",
        "| prefill | decode | GQA, identical | MHA, identical | TTFT of the pair | TTFT of the decode engine alone |",
        "|---|---|---|---|---|---|",
    ]
    for (prefill, decode), kinds in by_pair.items():
        same = [_same(kinds[kind]) for kind in HEADS]
        gqa = kinds["gqa"]
        lines.append(
            f"| {prefill} | {decode} | {' | '.join(same)} | {gqa['ttft_ms']:.1f} ms | {gqa['alone_ms']:.1f} ms |"
        )
    for half in run.get("half", {}).values():
        lines += _half_table(half)
    for file in sorted(RESULTS.parent.glob("engines-device-*.json")):
        lines += _device_table(json.loads(file.read_text()))
    lines += ["", "| integration | lines |", "|---|---|"]
    lines += [f"| {name} | {count} |" for name, count in run["lines"].items()]
    return "\n".join(lines) + "\n"


def _half_table(half: dict[str, Any]) -> list[str]:
    count = half["pairs"][0]["requests"]
    lines = [
        "",
        f"In {half['dtype']}: largest KL of the first {half['tokens']} next-token distributions of {count} prompts: of "
        "the pair against the decode engine alone, and between the two engines when each computes them alone. "
        "The target is a ratio of 2 at most.",
        "",
        "| prefill | decode | pair | engines alone | ratio | same tokens |",
        "|---|---|---|---|---|---|",
    ]
    for row in half["pairs"]:
        ratio = f"{row['kl'] / row['kl_alone']:.2f}" if row["kl_alone"] else ""
        lines.append(
            f"| {row['prefill']} | {row['decode']} | {row['kl']:.1e} | {row['kl_alone']:.1e} | {ratio} "
            f"| {row['identical']} of {row['requests']} |"
        )
    return lines


def _device_table(found: dict[str, Any]) -> list[str]:
    """Of bench/gpu/engines.py."""
    return [
        "",
        f"transformers {found['transformers']} with continuous batching, prefill on one H200 (`cuda:0`), in "
        f"{found['dtype']}: TTFT of the pair, of its prefill alone, and of the decode device alone; medians, commit "
        f"{found['commit'][:12]}.",
        "",
        "| decode | prompt tokens | identical | TTFT of the pair | prefill | decode device alone |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['decode']} | {row['prompt_tokens']} | {row['identical']} of {row['requests']} | "
            f"{row['ttft_ms']:.1f} ms | {row['prefill_ms']:.1f} ms | {row['alone_ms']:.1f} ms |"
            for row in found["rows"]
        ),
    ]


def _same(row: dict[str, Any]) -> str:
    text = f"{row['identical']} of {row['requests']}"
    return text if row["first_difference"] is None else f"{text}; first at token {row['first_difference']}"


def head() -> dict[str, Any]:
    """Of a file of results."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    return {"commit": commit.stdout.strip(), "cpu": platform.processor() or platform.machine()}


def write_tables(made: str, marker: str, end: str, check: bool) -> int:
    """Put tables between two markers of the document; with `check` only say, by 1, that others are there."""
    document = DOCUMENT.read_text(encoding="utf-8")
    before, rest = document.split(marker)
    new = before + marker + "\n" + made + "\n" + end + rest.split(end)[1]
    if not check:
        DOCUMENT.write_text(new, encoding="utf-8")
    return int(check and new != document)


def main() -> int:
    """What the module says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--engines", default="{}", metavar="JSON", help="by name: python, options")
    parser.add_argument(
        "--half", metavar="DTYPE", help="float16 or bfloat16: only that part, into the file that is there"
    )
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if not (args.table or args.check):
        own = {"reference": Side(), "transformers": Side()}
        sides = {**own, **msgspec.json.decode(args.engines, type=dict[str, Side])}
        if args.half is None:
            kept = json.loads(RESULTS.read_text()).get("half", {}) if RESULTS.exists() else {}
            found = {**head(), **run(sides), "half": kept}
        else:
            found = json.loads(RESULTS.read_text())
            found["half"] = {**found["half"], args.half: {**head(), **run_half(sides, args.half)}}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    return write_tables(tables(json.loads(RESULTS.read_text())), MARKER, END, args.check)


if __name__ == "__main__":
    sys.exit(main())
