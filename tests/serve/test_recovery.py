"""One of two decode instances is killed under a steady load: no request is lost, and p99 is soon what it was."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest

from tests.serve.serving import QUICK, Serving, serving
from tests.serve.test_lifecycle import ask

RATE, TOKENS = 6.0, 24
BEFORE_S, RECOVERY_S, AFTER_S = 12.0, 10.0, 12.0


class Answered(NamedTuple):
    """One request: when it was sent, and how long it took; seconds."""

    sent: float
    took: float
    status: int


async def load(server: Serving, victim: int) -> tuple[list[Answered], float]:
    """All requests, and when the instance was killed."""
    start, answers = time.monotonic(), []
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:

        async def one(number: int) -> None:
            sent = time.monotonic()
            status, _ = await ask(client, server.url, number, TOKENS)
            answers.append(Answered(sent - start, time.monotonic() - sent, status))

        async def kill() -> float:
            await asyncio.sleep(BEFORE_S)
            os.kill(victim, signal.SIGKILL)
            return time.monotonic() - start

        killing = asyncio.create_task(kill())
        tasks = []
        for number in range(round(RATE * (BEFORE_S + RECOVERY_S + AFTER_S))):
            await asyncio.sleep(max(0.0, start + number / RATE - time.monotonic()))
            tasks.append(asyncio.create_task(one(number)))
        await asyncio.gather(*tasks)
        return answers, await killing


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_p99_is_back_within_ten_seconds(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    options = ["--model", str(checkpoint[0]), "--served-name", "tiny", "--port", "0", *QUICK]
    with serving(tmp_path / "log", [*options, "--prefill", "TP1", "--decode", "2xTP1"]) as server:
        pids = dict(re.findall(r"instance (\S+) has process (\d+)", server.log.read_text()))
        answers, killed = asyncio.run(load(server, int(pids["decode-1"])))
        server.wait_empty()
    assert len(answers) == round(RATE * (BEFORE_S + RECOVERY_S + AFTER_S))
    assert {answer.status for answer in answers} == {200}

    def p99(first: float, last: float) -> float:
        return float(np.percentile([a.took for a in answers if first <= a.sent < last], 99))

    before, during = p99(2.0, killed - 1), p99(killed - 1, killed + RECOVERY_S)
    after = p99(killed + RECOVERY_S, killed + RECOVERY_S + AFTER_S)
    print(f"p99 of a request: {before:.2f} s before, {during:.2f} s meanwhile, {after:.2f} s from 10 s on")
    assert after < 2 * before + 0.2
