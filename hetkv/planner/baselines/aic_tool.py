"""The AIConfigurator tool itself (PyPI: `aiconfigurator`), where it is installed and covers the model and the GPUs.

It is asked by its own Python interface (`cli_recommend`: the fewest GPUs for a request rate) in a process of its own,
which may be another environment: it pins versions of packages. Step times are its own measurements, not ours; the
plan that it makes is judged by our simulator like any other. A GPU that it has no data for is reported.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from hetkv.costmodel import load_catalogue
from hetkv.costmodel.models import model_config
from hetkv.errors import NotCoveredError
from hetkv.planner.baselines.aiconfigurator import one_size
from hetkv.planner.baselines.candidates import hourly
from hetkv.planner.problem import ModelSpec, Problem
from hetkv.planner.result import Instances

SECONDS = 900
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "LlamaForCausalLM",  # the same shape; the tool does not know it by its own name
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
}
"""By `model_type`: the catalogue's model files leave `architectures` out."""

PROGRAM = """
import json, logging, sys, warnings
warnings.simplefilter("ignore")
logging.disable(logging.CRITICAL)
task = json.load(sys.stdin)
try:
    from importlib.metadata import version
    from importlib.resources import files
    from aiconfigurator.cli.api import cli_recommend
except ImportError as error:
    sys.exit(json.dump({"missing": str(error)}, sys.stdout))
data = files("aiconfigurator_core") / "systems"
known = {f.name[:-5] for f in data.iterdir() if f.name.endswith(".yaml")} & {f.name for f in (data / "data").iterdir()}
answers = []
for names in task["pairs"]:
    systems = [next((n for n in own if n in known), None) for own in names]
    answer = {"systems": systems, "rows": []}
    answers.append(answer)
    if None in systems:
        answer["error"] = "no data for this GPU"
        continue
    try:
        options = {"decode_system": systems[1], "top_n": 20, "strict_sla": True, **task["options"]}
        found = cli_recommend(task["model"], systems[0], **options)
        keep = ("tp", "pp", "dp", "cp", "workers")
        for mode, table in found.best_configs.items():
            for row in table.to_dict("records"):
                own = {k: int(v) for k, v in row.items() if k.split(")")[-1] in keep and v == v}
                answer["rows"].append({**own, "mode": mode, "replicas": int(row["replicas_needed"])})
    except Exception as error:
        answer["error"] = f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0]
json.dump({"version": version("aiconfigurator"), "answers": answers}, sys.stdout)
"""


class AicTool:
    """The tool's answers for a problem; calling it repeats its replicas for a multiple of the problem's rates.

    `python` is an interpreter that can import `aiconfigurator`. `NotCoveredError` where it is not installed, or covers
    neither a GPU of the problem nor its model.
    """

    def __init__(self, problem: Problem, python: str = sys.executable) -> None:
        self.problem, self.python = problem, python
        self.version = ""
        self.uncovered: list[str] = []
        if len(problem.models) > 1:
            raise NotCoveredError("the tool plans for one model at a time")
        self.rows = self._ask(problem.models[0])

    def __call__(self, scale: float = 1.0) -> list[Instances] | None:
        """The cheapest of its plans, asked at the problem's rate and repeated for `scale` times that."""
        options = [self._instances(pair, row, scale) for pair, row in self.rows]
        return min(options, key=lambda o: hourly(self.problem, o), default=None)

    def _ask(self, model: ModelSpec) -> list[tuple[tuple[str, str], dict[str, Any]]]:
        engine, size = self.problem.engine_for(model), one_size(self.problem, model)
        config = dict(model_config(model.name)[0])
        kind = config.get("model_type")
        if kind not in ARCHITECTURES:
            raise NotCoveredError(f"model type {kind} is not passed on to the tool")
        if engine.kv_dtype not in ("bf16", "fp16") or engine.weight_dtype not in ("bf16", "fp16", "fp8"):
            raise NotCoveredError(
                f"{engine.weight_dtype} weights with {engine.kv_dtype} KV are not passed on to the tool"
            )
        config["architectures"] = [ARCHITECTURES[kind]]
        if engine.weight_dtype == "fp8":
            config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        names = [offer.gpu for offer in self.problem.gpus if offer.cap != 0]
        catalogue = load_catalogue(self.problem.catalogue)
        aliases = {name: list(catalogue.gpu(name).aliases) for name in names}
        pairs = list(product(names, names))
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
            task = {
                "model": folder,
                "pairs": [[aliases[a], aliases[b]] for a, b in pairs],
                "options": {
                    "backend": engine.name if engine.name in ("vllm", "sglang") else "vllm",
                    "target_request_rate": size.rate,
                    "isl": round(size.prompt),
                    "osl": round(size.output),
                    "ttft": 1e3 * size.ttft,
                    "tpot": 1e3 * size.tpot,
                },
            }
            answers = self._run(task)
        found = []
        for pair, answer in zip(pairs, answers, strict=True):
            if answer.get("error"):
                self.uncovered.append(f"{' to '.join(dict.fromkeys(pair))}: {answer['error']}")
            for row in answer["rows"]:
                # Attention replicas and context parallelism are not among our instances; aggregated ones have one type.
                extra = [v for k, v in row.items() if k.split(")")[-1] in ("dp", "cp")]
                if all(v == 1 for v in extra) and (row["mode"] == "disagg" or pair[0] == pair[1]):
                    found.append((pair, row))
        if not found:
            raise NotCoveredError("; ".join(self.uncovered) or "no plan of it can be expressed in TP and PP")
        return found

    def _run(self, task: dict[str, Any]) -> list[dict[str, Any]]:
        try:
            done = subprocess.run(
                [self.python, "-c", PROGRAM], input=json.dumps(task), capture_output=True, text=True, timeout=SECONDS
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NotCoveredError(str(error)) from None
        line = done.stdout.strip().splitlines()[-1:] or [""]
        try:
            answer = json.loads(line[0])
        except json.JSONDecodeError:
            last = done.stderr.strip().splitlines()[-1:] or ["no answer"]
            raise NotCoveredError(f"the tool failed: {last[0]}") from None
        if "missing" in answer:
            raise NotCoveredError(
                f"not installed ({answer['missing']}): pip install aiconfigurator, in any environment"
            )
        self.version = answer["version"]
        return list(answer["answers"])

    def _instances(self, pair: tuple[str, str], row: dict[str, Any], scale: float) -> list[Instances]:
        model = self.problem.models[0]
        budget = self.problem.engine_for(model).max_num_batched_tokens
        times = max(1, round(row["replicas"] * scale + 0.499))

        def instances(role: Any, gpu: str, tp: int, pp: int, count: int) -> Instances:
            offer = self.problem.offer(gpu)
            usd = None if offer.usd_per_gpu_hour is None else self.problem.usd_per_gpu_hour(offer)
            return Instances(role, gpu, tp, pp, count, model.name, budget, None, None if usd is None else usd * tp * pp)

        if row["mode"] == "disagg":
            return [
                instances("prefill", pair[0], row["(p)tp"], row["(p)pp"], row["(p)workers"] * times),
                instances("decode", pair[1], row["(d)tp"], row["(d)pp"], row["(d)workers"] * times),
            ]
        return [instances("aggregated", pair[0], row["tp"], row["pp"], times)]
