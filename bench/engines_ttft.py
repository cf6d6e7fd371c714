"""TTFT of a prefill in one engine and a decode in another against each alone, on this machine; docs/engines.md.

make engines-ttft                       # runs it, and writes the table
python bench/engines_ttft.py --table    # the table alone, from the file of results
python bench/engines_ttft.py --check    # exits with 1 where it is not that of the file

The checkpoint has random weights and the shape of a small model, so that a prefill takes as long as one of that size.
Each prompt goes through the prefill engine alone, the decode engine alone and the pair, one after the other, again and
again: a machine that is slower for a while is so for all three. Medians.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.engines import head, write_tables  # noqa: E402
from hetkv.integrations.pairs import Pairs, Side, engines  # noqa: E402
from tests.integrations.checkpoints import llama  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "engines_ttft.json"
MARKER = "<!-- made by bench/engines_ttft.py from bench/results/engines_ttft.json -->\n"
END = "<!-- end of what bench/engines_ttft.py made -->\n"
SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "initializer_range": 0.02}
"""Of SmolLM2-135M, with 9 query heads and 3 KV heads."""
NEW_TOKENS = 2
NO_TABLE = "There is no table yet: it wants a machine at rest.\n"


def run(args: argparse.Namespace, sides: dict[str, Side]) -> dict[str, Any]:
    """All prompts through the two engines and the pair."""
    draw, names = random.Random(5), (args.prefill, args.decode)
    rows: dict[int, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        most = 64 + max(args.lengths)
        model = llama(Path(folder) / "model", heads=9, kv_heads=3, max_position_embeddings=most, **SHAPE)
        room = {"capacity": most, "slots": 2}
        with engines(str(model), sides, [names], room) as processes:
            facts = {name: process.call("facts") for name, process in processes.items()}
            pairs = Pairs(processes, NEW_TOKENS)
            for number in range(args.rounds + 1):
                for length in args.lengths:
                    prompt = [draw.randrange(3, 3000) for _ in range(length)]
                    row = rows.setdefault(length, {"prefill": [], "decode": [], "pair": []})
                    other, own = (pairs.alone(name, prompt) for name in names)
                    request = pairs.run(*names, [prompt]).requests[0]
                    if request.first_difference is not None:
                        raise SystemExit(f"{length} tokens: token {request.first_difference} is another one")
                    if number:  # the first round is to warm up
                        row["prefill"].append((other.first_ns - other.start_ns) / 1e6)
                        row["decode"].append((own.first_ns - own.start_ns) / 1e6)
                        row["pair"].append(request.ttft_ms)
                print(f"round {number} of {args.rounds}", flush=True)
    found = [{"tokens": n, **{k: round(statistics.median(v), 2) for k, v in row.items()}} for n, row in rows.items()]
    versions = {name: {k: v for k, v in of.items() if k not in ("fingerprint", "pool")} for name, of in facts.items()}
    return {"prefill": args.prefill, "decode": args.decode, "rounds": args.rounds, "threads": args.threads,
            "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "engines": versions,
            "rows": found}  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """What stands between the markers."""
    a, b = found["prefill"], found["decode"]
    threads = f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"
    lines = [
        f"Float32, {threads} each on {found['cores']} cores, medians of {found['rounds']} prompts of each length, the "
        f"three ways in turn; load of the machine at the end {found['load']}. All tokens are those of {b} alone.",
        "",
        f"| prompt tokens | {a} alone | {b} alone | prefill {a}, decode {b} | of {b} alone |",
        "|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        lines.append(
            f"| {row['tokens']} | {row['prefill']:.1f} ms | {row['decode']:.1f} ms | {row['pair']:.1f} ms "
            f"| {row['pair'] / row['decode']:.2f} x |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """What the module says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--engines", default="{}", metavar="JSON", help="by name: python, options")
    parser.add_argument("--prefill", default="vllm")
    parser.add_argument("--decode", default="llama.cpp")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of each engine (OMP_NUM_THREADS)")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if not (args.table or args.check):
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
        sides = msgspec.json.decode(args.engines, type=dict[str, Side])
        args.json.write_text(json.dumps({**head(), **run(args, sides)}, indent=1) + "\n")
        if args.json != RESULTS:
            print(table(json.loads(args.json.read_text())))
            return 0
    made = table(json.loads(RESULTS.read_text())) if RESULTS.exists() else NO_TABLE
    return write_tables(made, MARKER, END, args.check)


if __name__ == "__main__":
    sys.exit(main())
