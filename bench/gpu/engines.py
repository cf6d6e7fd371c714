"""transformers' continuous batching on two devices: TTFT of prefill on one and decode on another, against one alone.

python bench/gpu/engines.py [--prefill cuda:0] [--decode cuda:1 cpu] [--lengths 1024 4096] [--json FILE]

The checkpoint is made here, with random weights; every decode device also says alone what it would have said, and the
tokens are compared. Prints one line for each pair and length, and exits with 1 where a token differs in float32.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from hetkv.integrations.pairs import Pairs, Side, engines  # noqa: E402

WARM = 2
"""Prompts of a length before the ones that are counted: kernels are chosen and loaded."""
CPU_LENGTH = 1024
"""Longest prompt of a pair with the CPU, which computes each of them alone, too."""


def checkpoint(folder: Path, hidden: int, layers: int, dtype: str, positions: int) -> str:
    """A Llama with random weights and grouped queries."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = hidden // 128
    config = LlamaConfig(hidden_size=hidden, intermediate_size=hidden * 3, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=max(1, heads // 4), head_dim=128,
                         vocab_size=8192, max_position_embeddings=positions, initializer_range=0.04)  # fmt: skip
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return str(folder)


def main() -> int:
    """What the module says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prefill", default="cuda:0")
    parser.add_argument("--decode", nargs="+", default=["cuda:1", "cpu"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 1024, 4096, 16384])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    capacity = max(args.lengths) + args.new_tokens
    room = {"capacity": capacity, "slots": 2, "chunk": 8192, "block_size": 256, "dtype": args.dtype}
    sides = {
        "prefill": Side(engine="transformers-paged", options={"device": args.prefill}),
        **{name: Side(engine="transformers-paged", options={"device": name}) for name in args.decode},
    }
    draw, rows, wrong = random.Random(4), [], 0
    with tempfile.TemporaryDirectory() as folder:
        model = checkpoint(Path(folder) / "model", args.hidden, args.layers, args.dtype, capacity)
        with engines(model, sides, [("prefill", name) for name in args.decode], room) as processes:
            pairs = Pairs(processes, args.new_tokens)
            facts = processes["prefill"].call("facts")
            for name in args.decode:
                for length in args.lengths:
                    if name == "cpu" and length > CPU_LENGTH:
                        continue
                    warm = WARM if name != "cpu" else 1
                    count = warm + (args.prompts if name != "cpu" else 2)
                    prompts = [[draw.randrange(3, 8000) for _ in range(length)] for _ in range(count)]
                    row = _row(pairs.run("prefill", name, prompts, "concurrent"), name, length, warm)
                    rows.append(row)
                    wrong += row["requests"] - row["identical"]
                    print(json.dumps(row), flush=True)
    if args.json:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
        head = {"commit": commit.stdout.strip(), "dtype": args.dtype, "hidden": args.hidden, "layers": args.layers,
                "transformers": facts["transformers"], "torch": facts["torch"]}  # fmt: skip
        args.json.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    return int(wrong > 0 and args.dtype == "float32")


def _row(result: Any, name: str, length: int, warm: int) -> dict[str, Any]:
    counted = result.requests[warm:]
    return {
        "decode": name,
        "prompt_tokens": length,
        "requests": len(result.requests),
        "identical": result.identical,
        **{f"{kind}_ms": round(statistics.median(getattr(r, f"{kind}_ms") for r in counted), 2)
           for kind in ("ttft", "prefill", "alone")},
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
