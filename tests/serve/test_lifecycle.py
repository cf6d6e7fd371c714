"""The running system under loss: aborts, killed instances, a killed scheduler, an orderly end. Nothing is lost."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from hetkv.runtime.tokenizer import TextTokenizer
from tests.runtime.instances import reference
from tests.serve.serving import QUICK, Serving, serving

ASK: dict[str, Any] = {"model": "tiny", "temperature": 0, "ignore_eos": True, "logprobs": 0}


def prompt(number: int) -> list[int]:
    rng = random.Random(number)
    return [rng.randrange(2, 3000) for _ in range(rng.randrange(4, 90))]


async def ask(client: httpx.AsyncClient, url: str, number: int, tokens: int) -> tuple[int, str]:
    """Status and text of one streamed completion."""
    body = {**ASK, "prompt": prompt(number), "max_tokens": tokens, "stream": True}
    async with client.stream("POST", url + "/v1/completions", json=body) as answer:
        text = ""
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    return 500, chunk["error"]["message"]
                text += chunk["choices"][0]["text"]
        return answer.status_code, text


async def storm(server: Serving, requests: int, concurrency: int, seed: int) -> dict[str, int]:
    """Requests of which a third leave at some moment; how many were answered, rejected and left."""
    rng, counts = random.Random(seed), {"answered": 0, "left": 0}
    gate = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:

        async def one(number: int) -> None:
            patience = rng.random() * 0.4 if rng.random() < 0.35 else 120
            async with gate:
                try:
                    status, _ = await asyncio.wait_for(ask(client, server.url, number, rng.randrange(1, 24)), patience)
                    assert status == 200
                    counts["answered"] += 1
                except (TimeoutError, asyncio.TimeoutError):
                    counts["left"] += 1

        await asyncio.gather(*(one(number) for number in range(requests)))
    return counts


def test_clients_that_leave_leave_nothing(server: Serving) -> None:
    counts = asyncio.run(storm(server, 120, 24, 1))
    assert counts["left"] > 10
    assert counts["answered"] > 60
    server.wait_empty()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_thousand_requests_leave_nothing(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    """1,000 requests at concurrency 64 with random aborts: blocks, descriptors, threads and memory are as before."""
    options = ["--model", str(checkpoint[0]), "--served-name", "tiny", "--port", "0", *QUICK]
    with serving(tmp_path / "log", [*options, "--prefill", "TP1", "--decode", "2xTP1"]) as server:
        asyncio.run(storm(server, 400, 64, 2))
        server.wait_empty()
        before = resources(server)
        counts = asyncio.run(storm(server, 1000, 64, 3))
        server.wait_empty()
        time.sleep(1)
        after = resources(server)
    assert counts["answered"] + counts["left"] == 1000
    assert set(before) == set(after)
    for pid, (descriptors, threads, memory) in before.items():
        assert after[pid][0] <= descriptors + 2
        assert after[pid][1] <= threads + 1
        assert after[pid][2] < memory * 1.05 + (8 << 20)


def resources(server: Serving) -> dict[int, tuple[int, int, int]]:
    """Descriptors, threads and resident bytes of the server's processes."""
    import psutil

    parent = psutil.Process(server.process.pid)
    found = [parent, *parent.children(recursive=True)]
    return {p.pid: (p.num_fds(), p.num_threads(), p.memory_info().rss) for p in found}


def test_a_killed_decoder_loses_no_request(checkpoint: tuple[Path, Any], server: Serving) -> None:
    """One of two is killed while it decodes: all answers are those of `transformers`; it comes back, and serves."""
    numbers, tokens = range(24), 40

    async def run() -> list[tuple[int, str]]:
        async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:

            async def health() -> dict[str, Any]:
                found: dict[str, Any] = (await client.get(f"{server.url}/health")).json()["instances"]
                return found

            asking = [asyncio.create_task(ask(client, server.url, number, tokens)) for number in numbers]
            while not any("decode-1" in name and at["requests"] > 1 for name, at in (await health()).items()):
                await asyncio.sleep(0.001)
            os.kill(victim, signal.SIGKILL)  # at once: at rest the machine answers all within a tenth of a second
            return list(await asyncio.gather(*asking))

    pids = dict(re.findall(r"instance (\S+) has process (\d+)", server.log.read_text()))
    victim = int(pids["decode-1"])
    answers = asyncio.run(run())
    tokenizer = TextTokenizer.load(checkpoint[0])
    for number, (status, text) in zip(numbers, answers, strict=True):
        assert (status, text) == (200, tokenizer.decode(reference(checkpoint[1], prompt(number), tokens)))
    deadline = time.monotonic() + 60
    while sum(instance["up"] for instance in server.health()["instances"].values()) < 3:
        assert time.monotonic() < deadline, server.health()
        time.sleep(0.1)
    assert server.metrics()["hetkv_restarts_total"] > 0
    server.wait_empty()


def test_an_orderly_end_answers_what_was_accepted(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    options = ["--model", str(checkpoint[0]), "--served-name", "tiny", "--port", "0", *QUICK]
    with serving(tmp_path / "log", [*options, "--aggregated", "TP1"]) as server:

        async def run() -> list[Any]:
            async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as client:
                asking = [asyncio.create_task(ask(client, server.url, number, 60)) for number in range(16)]
                while not accepted():
                    await asyncio.sleep(0.01)
                server.process.send_signal(signal.SIGTERM)
                return list(await asyncio.gather(*asking, return_exceptions=True))

        def accepted() -> bool:
            return sum(instance["requests"] for instance in server.health()["instances"].values()) == 16

        answers = asyncio.run(run())
        assert [answer[0] for answer in answers] == [200] * 16
        assert server.process.wait(60) == 0


@pytest.mark.slow
def test_a_server_that_is_killed_and_started_again_gets_its_instances(
    checkpoint: tuple[Path, Any], tmp_path: Path
) -> None:
    """The scheduler is killed under load; its successor gets the same instances, weights loaded, and answers alike."""
    model = ["--model", str(checkpoint[0])]
    front = [*model, "--served-name", "tiny", "--none", "--port", "0"]
    with serving(tmp_path / "first", [*front, "--gate", "127.0.0.1:0"], wait=False) as first:
        gate = first.wait_for(r"gate for instances at (\S+)")[1]
        with (
            serving(tmp_path / "p", [*model, "--join", gate, "--prefill", "TP1", *QUICK], wait=False) as prefill,
            serving(tmp_path / "d", [*model, "--join", gate, "--decode", "TP1", *QUICK], wait=False) as decode,
        ):
            first.ready()
            deadline = time.monotonic() + 60
            while len(first.health()["instances"]) < 2 or first.health()["status"] != "ok":
                assert time.monotonic() < deadline
                time.sleep(0.05)
            names = set(first.health()["instances"])
            before = httpx.post(first.url + "/v1/completions", json=body(7), timeout=60).json()
            first.end(signal.SIGKILL)
            with serving(tmp_path / "second", [*front, "--gate", gate], wait=False) as second:
                second.ready()
                deadline = time.monotonic() + 30
                while second.health()["status"] != "ok":
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
                assert set(second.health()["instances"]) == names
                after = httpx.post(second.url + "/v1/completions", json=body(7), timeout=60).json()
                assert after["choices"] == before["choices"]
                second.wait_empty()
                assert decode.end() == 0  # it leaves in order
                deadline = time.monotonic() + 10
                while len(second.health()["instances"]) > 1:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            assert prefill.process.poll() is None


def body(number: int) -> dict[str, Any]:
    return {**ASK, "prompt": prompt(number), "max_tokens": 10}
