"""The lines that vLLM and SGLang print while they serve: throughput, running requests and KV tokens."""

from __future__ import annotations

import re

from hetkv.costmodel.calibration.logs.observations import Observation, Period
from hetkv.errors import InputError

VLLM = re.compile(
    r"Avg prompt throughput: (?P<prompt>[\d.]+) tokens/s, Avg generation throughput: (?P<output>[\d.]+) tokens/s, "
    r"Running: (?P<running>\d+) reqs.*?(?:KV cache usage|GPU cache usage): (?P<usage>[\d.]+)%"
    r"(?:.*?Prefix cache hit rate: (?P<hits>[\d.]+)%)?"
)
VLLM_TOKENS = re.compile(r"GPU KV cache size: (?P<tokens>[\d,]+) tokens")
VLLM_INTERVAL_S = 10.0
"""vLLM prints its averages every 10 s (`VLLM_LOG_STATS_INTERVAL`)."""
SGLANG = re.compile(
    r"Decode batch.*?#running-req: (?P<running>\d+), #token: (?P<tokens>\d+),.*?"
    r"gen throughput \(token/s\): (?P<output>[\d.]+)"
)
SGLANG_PREFILL = re.compile(r"Prefill batch")
STEADY = 0.25
"""The running requests of two lines may differ by this share; beyond it the last count is no mean of the period."""


def looks_like(text: str) -> bool:
    return bool(VLLM.search(text) or SGLANG.search(text))


def observations(text: str, origin: str) -> list[Observation]:
    """Periods between lines where the number of running requests is steady.

    vLLM: a line with prompts and prefix cache hits is left out, as it does not say how many of the tokens were
    computed. SGLang: a decode line is used where no prefill comes between it and the one before.
    """
    return _vllm(text, origin) if VLLM.search(text) else _sglang(text)


def _vllm(text: str, origin: str) -> list[Observation]:
    size = VLLM_TOKENS.search(text)
    if size is None:
        raise InputError(f"{origin}: no line `GPU KV cache size: ... tokens`: give the log from the engine's start on")
    capacity = float(size["tokens"].replace(",", ""))
    found: list[Observation] = []
    before = 0.0
    for line in VLLM.finditer(text):
        running, prompt, output = float(line["running"]), float(line["prompt"]), float(line["output"])
        computed = prompt == 0 or float(line["hits"] or 0) < 1
        if running and output and computed and abs(running - before) <= STEADY * running:
            mean, seconds = (running + before) / 2, VLLM_INTERVAL_S
            context = float(line["usage"]) / 100 * capacity
            each = max(1.0, context / running)
            found.append(Period(seconds, mean, context, output * seconds, prompt * seconds, prompt * seconds / each))
        before = running
    return found


def _sglang(text: str) -> list[Observation]:
    found: list[Observation] = []
    before = 0.0
    for line in text.splitlines():
        if SGLANG_PREFILL.search(line):
            before = 0.0
        elif decode := SGLANG.search(line):
            running, output = float(decode["running"]), float(decode["output"])
            if running and output and abs(running - before) <= STEADY * running:
                found.append(Period(1.0, running, float(decode["tokens"]), output))
            before = running
    return found
