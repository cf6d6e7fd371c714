"""Results of `vllm bench serve` and of SGLang's `bench_serving`: one closed loop for each."""

from __future__ import annotations

import json
from typing import Any

from hetkv.costmodel.calibration.datasets import ServingRow, Side
from hetkv.costmodel.calibration.logs.observations import Setup
from hetkv.errors import InputError

TPOT, TTFT = ("mean_tpot_ms", "median_tpot_ms"), ("mean_ttft_ms", "median_ttft_ms")


def looks_like(text: str) -> bool:
    return text.lstrip().startswith("{") and any(f'"{name}"' in text for name in TPOT)


def rows(text: str, origin: str, setup: Setup) -> list[ServingRow]:
    """One row for each result of a file: a JSON object, or a line each (`--append-result`)."""
    try:
        results = [json.loads(text)]
    except json.JSONDecodeError:
        results = [_line(line, f"{origin}:{i}") for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    return [_row(result, f"{origin}: result {i}", setup) for i, result in enumerate(results)]


def _line(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {error}") from None


def _row(result: Any, where: str, setup: Setup) -> ServingRow:
    if not isinstance(result, dict):
        raise InputError(f"{where}: expected an object")

    def number(*names: str) -> float:
        for name in names:
            value = result.get(name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf"):
                return float(value)
        raise InputError(f"{where}: `{names[0]}` must be a positive number, got {result.get(names[0])!r}")

    requests = number("completed")
    if result.get("failed"):
        raise InputError(f"{where}: {result['failed']} requests failed: their times are not in the result")
    prompt, output = (
        number("total_input_tokens", "total_input") / requests,
        number("total_output_tokens", "total_output") / requests,
    )
    tpot, ttft = number(*TPOT) / 1e3, number(*TTFT) / 1e3
    in_flight = requests / number("duration") * (ttft + max(0.0, output - 1) * tpot)
    limit = result.get("max_concurrency")
    concurrency = min(float(limit), requests) if isinstance(limit, (int, float)) and limit else in_flight
    return ServingRow(
        id=where,
        source="user",
        gpu=setup.gpu,
        engine=setup.engine,
        version=setup.version,
        model=setup.model,
        dtype=setup.dtype,
        prompt=round(prompt),
        output=max(1, round(output)),
        concurrency=max(1, round(concurrency)),
        decode=Side(setup.tp, setup.dp),
        prefill=None,
        ttft_s=ttft,
        tpot_s=tpot,
    )
