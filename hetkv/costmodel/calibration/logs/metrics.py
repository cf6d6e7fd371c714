"""Scrapes of `/metrics`: what happened between two scrapes of vLLM or SGLang, from sums and counts of histograms."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from prometheus_client.parser import text_string_to_metric_families

from hetkv.costmodel.calibration.logs.observations import Observation, Period, Prompt
from hetkv.errors import InputError

TOKEN_SECONDS = ("inter_token_latency_seconds", "time_per_output_token_seconds")
PREFILL_SECONDS = "request_prefill_time_seconds"
NEEDED = ("prompt_tokens", "generation_tokens", "request_prompt_tokens_count")
LEAST_TOKENS = 200

Scrape = dict[str, float]


def looks_like(text: str) -> bool:
    return "\nvllm:" in f"\n{text}" or "\nsglang:" in f"\n{text}"


def parse(text: str, origin: str) -> Scrape:
    """Samples without the engine's prefix, summed over labels; buckets of histograms are left out."""
    found: Scrape = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name = sample.name.split(":", 1)[-1].removesuffix("_total")
                if not name.endswith("_bucket"):
                    found[name] = found.get(name, 0.0) + sample.value
    except ValueError as error:
        raise InputError(f"{origin}: not a Prometheus text: {error}") from None
    return found


def observations(scrapes: Sequence[Scrape], origin: str) -> list[Observation]:
    """One period, and one mean prompt where the engine times them, for each pair of consecutive scrapes.

    The batch is generated tokens by steps (`iteration_tokens`), or the mean of the counts of running requests. A single
    scrape is taken against the engine's start: that period holds the warm-up.
    """
    whole: list[Scrape] = [{}, *scrapes] if len(scrapes) == 1 else list(scrapes)
    found: list[Observation] = []
    for before, after in pairwise(whole):
        found += _between(before, after, origin)
    return found


def _between(before: Scrape, after: Scrape, origin: str) -> list[Observation]:
    def grown(name: str) -> float:
        value = after.get(name, 0.0) - before.get(name, 0.0)
        if value < 0:
            raise InputError(
                f"{origin}: `{name}` shrank between two scrapes: order them by time, from one engine's life"
            )
        return value

    name = next((each for each in TOKEN_SECONDS if f"{each}_sum" in after), None)
    if name is None:
        raise InputError(f"{origin}: no `{TOKEN_SECONDS[0]}`: not a scrape of vLLM or SGLang, or statistics are off")
    tokens, prompts = grown("generation_tokens"), grown("request_prompt_tokens_count") or grown("num_requests")
    timed = grown(f"{name}_count")
    if tokens < LEAST_TOKENS or not timed or not prompts:
        return []
    step = grown(f"{name}_sum") / timed
    counts = [scrape.get("num_requests_running", scrape.get("num_running_reqs", 0.0)) for scrape in (before, after)]
    steps = grown("iteration_tokens_total_count")
    running = max(1.0, tokens / steps) if steps else max(1.0, sum(counts) / 2)
    prompt, output = grown("prompt_tokens") / prompts, tokens / prompts
    context = running * (prompt + output / 2)
    found: list[Observation] = [Period(tokens / running * step, running, context, tokens, prompt * prompts, prompts)]
    if grown(f"{PREFILL_SECONDS}_count"):
        seconds = grown(f"{PREFILL_SECONDS}_sum") / grown(f"{PREFILL_SECONDS}_count")
        found.append(Prompt(seconds, prompt, running, context))
    return found
