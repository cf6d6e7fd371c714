"""What the package aiconfigurator-core predicts for the measured serving runs on Hopper.

    python -m venv aic && aic/bin/pip install aiconfigurator-core==0.12.0
    python bench/aiconfigurator.py --data DIR --python aic/bin/python

Writes `hetkv/costmodel/data/aiconfigurator.json`, from which `hetkv calibrate --report` takes the package's lines.
`DIR` is that of docs/cost-model.md. Each run is asked as it is recorded: model, GPU, engine, parallel sizes, dtypes,
lengths, and the requests in flight on each attention replica as the batch; with the package's current tables of the
engine, as it serves no older ones, and for each of `BUDGETS` as tokens of prompts in a step, which is not recorded.
Runs with separate prefill workers are left out: the core package has no answer for them.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from hetkv.costmodel.calibration.datasets import read_serving
from hetkv.costmodel.calibration.serving_runs import FILE

ROOT = Path(__file__).parents[1]
OUT = ROOT / "hetkv" / "costmodel" / "data" / "aiconfigurator.json"
BUDGETS = ("prompt", "8192")
MODELS = {
    "meta-llama/Llama-3.1-8B-Instruct": "meta-llama/Meta-Llama-3.1-8B",
    "nvidia/Llama-3.1-8B-Instruct-FP8": "meta-llama/Meta-Llama-3.1-8B",
    "meta-llama/Llama-3.1-70B": "meta-llama/Meta-Llama-3.1-70B",
    "zhipuai/GLM-5": "zai-org/GLM-5-FP8",
}
"""The package's own name of a model, where the data have another; it reads no configuration from the network here."""

PROGRAM = """
import json, logging, sys, warnings
from functools import lru_cache
from importlib.metadata import version
warnings.simplefilter("ignore")
logging.disable(logging.CRITICAL)
from aiconfigurator_core.sdk import common, config, perf_database
from aiconfigurator_core.sdk.backends.factory import get_backend
from aiconfigurator_core.sdk.models import get_model

@lru_cache(None)
def tables(system, engine):
    slots = perf_database.get_version_slots(system, engine) or {}
    found = slots.get("current")
    return found, perf_database.get_database_view(system, engine, found) if found else None

@lru_cache(None)
def built(name, engine, system, tp, dp, moe_tp, moe_ep, gemm, moe):
    options = {"tp_size": tp, "attention_dp_size": dp, "moe_tp_size": moe_tp, "moe_ep_size": moe_ep, "system": system}
    if gemm:
        options["gemm_quant_mode"] = common.GEMMQuantMode[gemm]
        options["moe_quant_mode"] = common.MoEQuantMode[moe]
    return get_model(name, config.ModelConfig(**options), engine)

def answer(task, budget):
    why = ""
    for gemm, moe in dict.fromkeys([tuple(task["quant"]), ("", "")]):  # else the checkpoint's own
        try:
            database = tables(task["system"], task["engine"])[1]
            if database is None:
                return "no tables of this engine on this GPU"
            model = built(task["model"], task["engine"], task["system"], *task["parallel"], gemm, moe)
            run = config.RuntimeConfig(batch_size=task["batch"], isl=task["prompt"], osl=task["output"])
            tokens = task["prompt"] if budget == "prompt" else int(budget)
            row = get_backend(task["engine"]).run_agg(model, database, run, ctx_tokens=tokens).get_summary_df().iloc[0]
            return [round(float(row["ttft"]), 4), round(float(row["tpot"]), 4)]
        except Exception as error:
            why = why or f"{type(error).__name__}: {error}".splitlines()[0].split(" { ")[0].split(". ")[0][:120]
    return why

tasks, budgets = json.load(sys.stdin)
rows = {task["id"]: {budget: answer(task, budget) for budget in budgets} for task in tasks}
rows = {key: row if isinstance(row[budgets[0]], list) else row[budgets[0]] for key, row in rows.items()}
used = {f"{s} {e}": tables(s, e)[0] for s, e in sorted({(t["system"], t["engine"]) for t in tasks})}
about = {"version": version("aiconfigurator-core"), "tables": used, "budgets": budgets}
json.dump(about | {"ttft_tpot_ms": rows}, sys.stdout)
"""


def tasks(data: Path) -> list[dict[str, Any]]:
    """The aggregated runs, as the program takes them."""
    with (data / FILE).open(encoding="utf-8", newline="") as stream:
        raw = {row["id"]: row for row in csv.DictReader(stream)}
    found = []
    for row in read_serving(data / FILE).serving:
        if row.disaggregated:
            continue
        own, side = raw[row.id], row.decode
        width = side.tp * side.dp
        moe_tp, moe_ep = int(own["moe_tp_size"] or 1), int(own["moe_ep_size"] or 1)
        if moe_tp * moe_ep != width:  # some records have TP x EP in both columns; their ids have EP
            match = re.search(r"_ep(\d+)(?:_0)?_", row.id)
            moe_ep = int(match.group(1)) if match and width % int(match.group(1)) == 0 else 1
            moe_tp = width // moe_ep
        quant = [own["gemm_quant_mode"] or "bfloat16", own["moe_quant_mode"] or "bfloat16"]
        found.append(
            {
                "id": row.id,
                "system": row.gpu,
                "engine": row.engine,
                "model": MODELS.get(own["model_path"], own["model_path"]),
                "parallel": [side.tp, side.dp, moe_tp, moe_ep],
                "quant": ["", ""] if own["precision"] in ("fp4", "int4") else quant,
                "batch": max(1, round(row.concurrency / side.dp)),
                "prompt": row.prompt,
                "output": row.output,
            }
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--python", required=True, help="an interpreter that has aiconfigurator-core")
    args = parser.parse_args()
    asked = json.dumps([tasks(args.data), BUDGETS])
    done = subprocess.run([args.python, "-c", PROGRAM], input=asked, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return 1
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    rows = answer["ttft_tpot_ms"]
    OUT.write_text(json.dumps(answer, separators=(",", ":")).replace('},"', '},\n"') + "\n", encoding="utf-8")
    answered = sum(isinstance(row, dict) for row in rows.values())
    print(f"{answered} of {len(rows)} runs answered: {OUT.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
