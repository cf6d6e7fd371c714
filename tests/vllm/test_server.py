"""Two OpenAI servers and the proxy, as a user starts them: both modes, streams, metrics, a prefill server that dies."""

from __future__ import annotations

import concurrent.futures
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.engines import checkpoint
from tests.vllm.lists import batches, check_counts, counted, wrong_choices
from tests.vllm.servers import HTTP, MODES, Process, body_of, choices_of, cluster, tokens_of


@pytest.fixture(scope="module")
def model(models: Path) -> str:
    return checkpoint(models)


@pytest.fixture(scope="module")
def servers(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Process]]:
    with cluster(model, tmp_path_factory.mktemp("servers")) as started:
        yield started


@pytest.mark.parametrize("mode", MODES)
def test_proxy(servers: dict[str, Process], model: str, prompts: list[list[int]], mode: str) -> None:
    """Token-identical through the proxy, several at once, and counted by vLLM's own metrics."""
    some, decode = prompts[::5], servers["decode"]
    alone = [tokens_of(decode.post(body_of(model, prompt))) for prompt in some]
    hits, loads = decode.metric("vllm:external_prefix_cache_hits_total"), decode.metric("vllm:hetkv_loads_total")
    local = decode.metric("vllm:prompt_tokens_by_source_total", source="local_compute")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda prompt: servers[mode].post(body_of(model, prompt)), some))
    assert [tokens_of(answer) for answer in answers] == alone
    assert decode.metric("vllm:hetkv_loads_total") - loads == len(some)
    moved = sum(len(prompt) - 1 for prompt in some)
    assert decode.metric("vllm:external_prefix_cache_hits_total") - hits == moved
    assert decode.metric("vllm:prompt_tokens_by_source_total", source="local_compute") - local == len(some)
    assert decode.metric("vllm:hetkv_load_seconds_count") >= len(some)
    assert servers["prefill"].metric("vllm:hetkv_exposed_seconds_count") >= len(some)
    assert servers["prefill"].metric("vllm:hetkv_bytes_total") == decode.metric("vllm:hetkv_bytes_total") > 0


@pytest.mark.parametrize("mode", MODES)
def test_stream(servers: dict[str, Process], model: str, prompts: list[list[int]], mode: str) -> None:
    prompt = prompts[11]
    alone = tokens_of(servers["decode"].post(body_of(model, prompt)))
    data = json.dumps(body_of(model, prompt, stream=True)).encode()
    request = urllib.request.Request(servers[mode].url + "/v1/completions", data, {"Content-Type": "application/json"})
    tokens: list[int] = []
    with HTTP.open(request, timeout=120) as response:
        for line in response:
            if line.startswith(b"data: {"):
                tokens += json.loads(line[6:])["choices"][0]["token_ids"]
    assert tokens == alone


@pytest.mark.parametrize("mode", MODES)
def test_lists_and_choices(servers: dict[str, Process], model: str, mode: str) -> None:
    """A cross-section of `test_lists.py`: each prompt of a list is loaded once, and answered from its own KV."""
    some = list(batches(20, seed=MODES.index(mode), longest=80))
    before = counted(servers)
    assert [wrong_choices(servers, model, mode, batch) for batch in some] == [0] * len(some)
    check_counts(servers, before, sum(len(batch.prompts) for batch in some))


def test_vllms_own_convention(servers: dict[str, Process], model: str) -> None:
    """What vLLM's `toy_proxy_server.py` does: it gives no transfer id, leaves `n` in the prefill's request, and hands
    the first prompt's parameters on for all. One request id for all requests, as clients may choose it."""
    order = {"do_remote_decode": True, "do_remote_prefill": False}
    order |= dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port"))
    prefill, decode, before, moved = servers["prefill"], servers["decode"], counted(servers), 0
    for batch in batches(16, seed=5, longest=80):
        body = body_of(model, batch.prompts, n=batch.n, temperature=1.0, top_k=1)
        alone = choices_of(decode.post(body))
        first = prefill.post({**body, "max_tokens": 1, "kv_transfer_params": order}, X_Request_Id="mine-7")
        params = first["kv_transfer_params"]
        assert choices_of(decode.post({**body, "kv_transfer_params": params}, X_Request_Id="mine-7")) == alone
        moved += len(batch.prompts)
    check_counts(servers, before, moved)


def test_wrong_requests_are_the_servers_to_reject(servers: dict[str, Process], model: str) -> None:
    for mode in MODES:
        with pytest.raises(urllib.error.HTTPError) as rejected:
            servers[mode].post(body_of(model, [7] * 3000))
        assert rejected.value.code == 400


def test_requests_that_nobody_fetches_leave_the_processor_to_others(servers: dict[str, Process], model: str) -> None:
    """The engine steps on while blocks are held, and sleeps between two steps: a small share of one core."""
    order = {"do_remote_decode": True, "do_remote_prefill": False}
    for first in range(6):
        servers["prefill"].post({**body_of(model, [first + 5] * 100), "max_tokens": 1, "kv_transfer_params": order})
    time.sleep(1)
    start, before = time.monotonic(), servers["prefill"].cpu_seconds()
    time.sleep(4)
    share = (servers["prefill"].cpu_seconds() - before) / (time.monotonic() - start)
    print(f"{share:.0%} of a core")
    assert share < 0.5, f"{share:.0%} of a core"


def test_prefill_server_killed(servers: dict[str, Process], model: str, prompts: list[list[int]]) -> None:
    """Without one the decode server computes; nothing waits for a lease."""
    prompt = prompts[10]
    alone = tokens_of(servers["decode"].post(body_of(model, prompt)))
    servers["prefill"].kill()
    for mode in MODES:
        start = time.monotonic()
        assert tokens_of(servers[mode].post(body_of(model, prompt))) == alone
        assert time.monotonic() - start < 30
