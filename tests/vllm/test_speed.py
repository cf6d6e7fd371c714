"""Ratios within one run: TTFT beside vLLM's NixlConnector, and how much of a transfer the prefill hides."""

from __future__ import annotations

import random
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
from engines import Engine, Pair, checkpoint

REQUESTS = 30
TOKENS = 1000
NIXL = {"connector": "NixlConnector", "module": None, "extra": {}}


def prompts(seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(5, 1000) for _ in range(TOKENS)] for _ in range(REQUESTS + 1)]


def ttft(pair: Pair, prompt: list[int]) -> float:
    """Seconds from the request to the consumer's first token, prefill first."""
    start = time.perf_counter()
    pair.prefill_first(prompt, 1)
    return time.perf_counter() - start


def test_ttft_beside_nixl(models: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any) -> None:
    """Requests in turn, so that both see the same machine."""
    pytest.importorskip("nixl", reason="NIXL is not installed")
    model = checkpoint(models, layers=6, kv_heads=4)
    pairs = {"hetkv": Pair(Engine(model, "kv_producer", 128), Engine(model, "kv_consumer", 128))}
    sides = []
    for role, port in (("kv_producer", "18601"), ("kv_consumer", "18602")):
        monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", port)
        sides.append(Engine(model, role, 128, kv_buffer_device="cpu", **NIXL))
    pairs["nixl"] = Pair(*sides)
    times: dict[str, list[float]] = {name: [] for name in pairs}
    for name, pair in pairs.items():
        ttft(pair, prompts(0)[0])  # connections
        times[name].clear()
    for prompt in prompts(1)[:REQUESTS]:
        for name, pair in pairs.items():
            times[name].append(ttft(pair, prompt))
    median = {name: statistics.median(seen) for name, seen in times.items()}
    ratio = median["hetkv"] / median["nixl"]
    record_property("ttft_ratio", ratio)
    print(f"TTFT hetkv {median['hetkv'] * 1e3:.1f} ms, NIXL {median['nixl'] * 1e3:.1f} ms, ratio {ratio:.3f}")
    for pair in pairs.values():
        pair.close()
    assert ratio <= 1.05


def test_exposed_time(models: Path, record_property: Any) -> None:
    """From the end of the prefill to the last verified layer: in mode `concurrent` under half of `prefill_first`."""
    model = checkpoint(models, layers=6, kv_heads=4)
    pair = Pair(Engine(model, "kv_producer", 128), Engine(model, "kv_consumer", 128))
    known, median = pair.describe(), {}
    for mode in ("prefill_first", "concurrent"):
        for prompt in prompts(2):
            if mode == "concurrent":
                prefill, decode = pair.begin_concurrent(prompt, 1, known)
                pair.producer.wait(prefill)
                pair.consumer.wait(decode)
            else:
                pair.prefill_first(prompt, 1)
        pair.settled()
        seen = pair.producer.call("take_observed", "exposed_seconds")
        assert len(seen) == REQUESTS + 1
        median[mode] = statistics.median(seen[1:])
    pair.close()
    ratio = median["concurrent"] / median["prefill_first"]
    record_property("exposed_ratio", ratio)
    print(f"exposed: {median['concurrent'] * 1e3:.2f} ms beside {median['prefill_first'] * 1e3:.2f} ms, {ratio:.3f}")
    assert ratio < 0.5
