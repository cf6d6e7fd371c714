"""The measured data sets: readers, and the exclusion rules that hold before anything is fitted.

Every rule is in `RULES` with its reason and is applied here, never in a fit. A reader returns the rows it keeps and
counts what each rule took.
"""

from __future__ import annotations

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from hetkv.errors import InputError

RULES = {
    "splitwise-repeat": "repeats of one configuration (GPU, TP, prompt, batch, output) are averaged before any split",
    "bench-invalid": "latency or throughput missing, zero or not a number",
    "bench-warmup": "batch 1 at 128 tokens: the first run of a sweep includes warm-up",
    "bench-die": "MI250 stays, though a GPU there may be one die or both; it is never pooled with others",
    "bench-thin": "hardware, framework and GPU count with fewer than 8 rows (Intel Max 1550, next to PVC)",
    "bench-mismatch": "throughput differs from batch x (input + output) / latency by more than 2 %",
    "hopper-duplicate": "the same measurement (equal TTFT and TPOT) under several ids counts once",
    "hopper-workers": "disaggregated row without the number of prefill and decode workers",
    "hopper-concurrency": "row without the number of requests in flight (a batch limit is not that number)",
    "hopper-model": "fewer than two output tokens per second at concurrency below 8: a cold or failing server",
}


@dataclass(frozen=True)
class StepRow:
    """One Splitwise configuration: prompt time and time per token of a static batch."""

    gpu: str
    model: str
    tp: int
    prompt: int
    batch: int
    output: int
    prompt_s: float
    token_s: float
    repeats: int


@dataclass(frozen=True)
class BatchRow:
    """One LLM-Inference-Bench run: a static batch from start to end. `length` is both input and output tokens."""

    gpu: str
    engine: str
    model: str
    tp: int
    length: int
    batch: int
    latency_s: float
    hardware: str


@dataclass(frozen=True)
class Side:
    """One kind of worker of a serving row: `workers` instances of `tp x dp` GPUs."""

    tp: int
    dp: int
    workers: int = 1


@dataclass(frozen=True)
class ServingRow:
    """One serving run in closed loop with `concurrency` requests in flight. `prefill` is None when aggregated."""

    id: str
    source: str
    gpu: str
    engine: str
    version: str
    model: str
    dtype: str
    prompt: int
    output: int
    concurrency: int
    decode: Side
    prefill: Side | None
    ttft_s: float
    tpot_s: float

    @property
    def disaggregated(self) -> bool:
        return self.prefill is not None


@dataclass
class Rows:
    """Kept rows with the number that each rule took."""

    excluded: Counter[str] = field(default_factory=Counter)
    splitwise: list[StepRow] = field(default_factory=list)
    bench: list[BatchRow] = field(default_factory=list)
    serving: list[ServingRow] = field(default_factory=list)


def _read(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    with path.open(encoding="utf-8", newline="") as stream:
        yield from enumerate(csv.DictReader(stream), start=2)


def _number(row: dict[str, str], name: str, path: Path, line: int) -> float:
    text = row.get(name)
    if text is None:
        raise InputError(f"{path}: missing column `{name}`")
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{path}:{line}: `{name}` must be a number, got {text!r}") from None


def read_splitwise(path: Path) -> Rows:
    """Read `splitwise_llama2_70b.csv`; times there are milliseconds."""
    groups: dict[tuple[str, int, int, int, int], list[tuple[float, float]]] = defaultdict(list)
    for line, row in _read(path):
        whole = [
            int(_number(row, name, path, line))
            for name in ("tensor_parallel", "prompt_size", "batch_size", "token_size")
        ]
        times = _number(row, "prompt_time", path, line) / 1e3, _number(row, "token_time", path, line) / 1e3
        groups[(row["hardware"], whole[0], whole[1], whole[2], whole[3])].append(times)
    rows = Rows()
    for (gpu, tp, prompt, batch, output), times_of in sorted(groups.items()):
        rows.excluded["splitwise-repeat"] += len(times_of) - 1
        prompt_s, token_s = fmean(t[0] for t in times_of), fmean(t[1] for t in times_of)
        rows.splitwise.append(StepRow(gpu, "Llama-2-70B", tp, prompt, batch, output, prompt_s, token_s, len(times_of)))
    return rows


ENGINES = {"TensorRT-LLM": "trtllm", "vLLM": "vllm", "Deepspeed": "deepspeed", "trtllm": "trtllm", "sglang": "sglang"}


def read_bench(path: Path) -> Rows:
    """Read `llm_inference_bench.csv`; latency there is seconds for the whole batch."""
    rows = Rows()
    kept: list[BatchRow] = []
    for line, row in _read(path):
        try:
            latency, throughput = float(row["Latency"]), float(row["Throughput"])
        except (KeyError, ValueError):
            rows.excluded["bench-invalid"] += 1
            continue
        length, batch = (int(_number(row, name, path, line)) for name in ("Input Output Length", "Batch Size"))
        if not (latency > 0 and throughput > 0):
            rows.excluded["bench-invalid"] += 1
        elif batch == 1 and length == 128:
            rows.excluded["bench-warmup"] += 1
        elif abs(throughput * latency / (batch * 2 * length) - 1) > 0.02:
            rows.excluded["bench-mismatch"] += 1
        else:
            hardware = row["Hardware"]
            engine = ENGINES.get(row["Framework"], row["Framework"].lower())
            count = int(_number(row, "Num of Hardware", path, line))
            kept.append(BatchRow(hardware, engine, row["Model"], count, length, batch, latency, hardware))
    sizes = Counter((r.gpu, r.engine, r.tp) for r in kept)
    for row_kept in kept:
        if sizes[(row_kept.gpu, row_kept.engine, row_kept.tp)] < 8 or row_kept.gpu == "Intel Max 1550":
            rows.excluded["bench-thin"] += 1
        else:
            rows.bench.append(row_kept)
    return rows


_SOURCE_ORDER = ("gap", "2026-03-25", "db-dump", "2026-04-06")
_ID_SPLIT = re.compile(r"_tp(\d+)(?:_0)?_ep(\d+)(?:_0)?_\d+$")


def _source(text: str) -> str:
    if text.startswith("db-dump"):
        return "db-dump"
    found = re.match(r"source_file=(\d{4}-\d\d-\d\d)", text)
    return found.group(1) if found else "gap"


def read_serving(path: Path) -> Rows:
    """Read `disaggregated_hopper.csv`; times there are milliseconds.

    The 2026-04-06 dump writes TP x EP into `tp_size` and `moe_ep_size`; its ids hold the true split, and so count.
    """
    rows = Rows()
    found: list[tuple[int, ServingRow]] = []
    for line, row in _read(path):
        source = _source(row["silicon_data_source"])
        match = re.search(r"silicon_concurrency=(\d+)", row["silicon_data_source"])
        disaggregated = row["mode"] == "disagg"
        if disaggregated and not row["prefill_num_workers"]:
            rows.excluded["hopper-workers"] += 1
            continue
        if not match:
            rows.excluded["hopper-concurrency"] += 1
            continue
        batch = float(match.group(1))
        ttft, tpot = (_number(row, f"silicon_{name}_ms", path, line) / 1e3 for name in ("ttft", "tpot"))
        if batch < 8 and tpot > 0.5:
            rows.excluded["hopper-model"] += 1
            continue
        serving = ServingRow(
            id=row["id"],
            source=source,
            gpu=row["system"],
            engine=ENGINES.get(row["backend"], row["backend"]),
            version=row["backend_version"] or "unrecorded",
            model=row["model_path"],
            dtype=row["precision"] or "bf16",
            prompt=int(_number(row, "isl", path, line)),
            output=int(_number(row, "osl", path, line)),
            concurrency=int(batch),
            decode=_side(row, "decode_" if disaggregated else "", path, line),
            prefill=_side(row, "prefill_", path, line) if disaggregated else None,
            ttft_s=ttft,
            tpot_s=tpot,
        )
        found.append((_SOURCE_ORDER.index(source), serving))
    seen: set[tuple[float, float]] = set()
    for _, serving in sorted(found, key=lambda item: item[0]):
        measurement = (round(serving.ttft_s, 5), round(serving.tpot_s, 5))
        if measurement in seen:
            rows.excluded["hopper-duplicate"] += 1
            continue
        seen.add(measurement)
        rows.serving.append(serving)
    return rows


def _side(row: dict[str, str], prefix: str, path: Path, line: int) -> Side:
    def whole(name: str, default: int = 1) -> int:
        text = row.get(prefix + name, "")
        return int(_number(row, prefix + name, path, line)) if text else default

    tp, dp = whole("tp_size"), whole("attention_dp_size", 0)
    world = max(1, whole("moe_tp_size")) * max(1, whole("moe_ep_size"))
    found = _ID_SPLIT.search(row["id"])
    if found and not prefix and _source(row["silicon_data_source"]) != "gap":
        tp, dp = (int(found.group(1)), 1) if dp <= 1 or tp > 1 else (1, int(found.group(1)))
    elif tp * max(1, dp) > 8 and world == tp * max(1, dp):
        tp, dp = (8, 1) if tp > 1 else (1, 8)
    return Side(tp, max(1, dp), whole("num_workers"))
