"""The front before vLLM servers, played by plain HTTP servers: choices, answers that are none, clients that leave."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from hetkv.errors import ApiError
from hetkv.serve.vllm import MODES, Asked, Passed, VllmEngines, drop, prompt_tokens

PATH, WAIT_S = "/v1/completions", 10.0


class Http(ThreadingHTTPServer):
    request_queue_size = 128  # all clients of a test may come at once


@contextmanager
def server(answer: bytes, seen: list[dict[str, Any]] | None = None) -> Iterator[str]:
    """An HTTP server that says the same to all; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if seen is not None:
                seen.append(body)
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    http = Http(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def test_the_server_with_the_least_to_do_is_chosen() -> None:
    """Prompts by their tokens, decoding by requests; a server that rests is left out while there is another one."""
    router = VllmEngines(["p0", "p1"], ["d0", "d1"], "concurrent", WAIT_S)
    (long, short), (first, second) = router.prefill, router.decode

    def chosen() -> tuple[str, str]:
        return router.choose(router._entry, Asked(10)).url, router.choose(router._exit, Asked(10)).url

    assert chosen() == ("p0", "d0")
    with long.busy(500), short.busy(20), short.busy(20), first.busy():
        assert chosen() == ("p1", "d1")
        second.rest()
        assert chosen() == ("p1", "d0")
        first.rest()
        assert chosen() == ("p1", "d1")
    assert chosen() == ("p0", "d0")


def test_prompts_are_measured() -> None:
    assert prompt_tokens({"prompt": [1, 2, 3]}) == 3
    assert prompt_tokens({"prompt": [[1, 2], [3]]}) == 3
    assert prompt_tokens({"prompt": "x" * 40}) == 11
    assert prompt_tokens({"messages": [{"role": "user", "content": "x" * 400}]}) > 100


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("garbage", [b"not JSON", b"[]", b"{}"])
def test_prefill_answer_that_is_none(mode: str, garbage: bytes) -> None:
    """Decode is asked alone, and its answer is passed on."""
    seen: list[dict[str, Any]] = []
    with server(garbage) as prefill, server(b'{"fine": 1}', seen) as decode:
        router = VllmEngines([prefill], [decode], mode, WAIT_S)

        async def ask() -> Any:
            answer = await router.answer(PATH, {"prompt": "x", "kv_transfer_params": {"a": 1}}, {})
            await router.client.aclose()
            return answer

        answer = asyncio.run(ask())
    assert (answer.status_code, answer.body) == (200, b'{"fine": 1}')
    assert "kv_transfer_params" not in seen[-1]


def test_prefill_server_is_known_before_the_first_request() -> None:
    """It is asked once, with a prompt of one token, and computes each client's prompt once."""
    params = {"do_remote_prefill": True, "remote_engine_id": "p", "remote_addresses": ["127.0.0.1:1"]}
    prefilled: list[dict[str, Any]] = []
    decoded: list[dict[str, Any]] = []
    answer = json.dumps({"kv_transfer_params": params}).encode()
    with server(answer, prefilled) as prefill, server(b'{"fine": 1}', decoded) as decode:
        router = VllmEngines([prefill], [decode], "concurrent", WAIT_S)

        async def ask() -> None:
            await router.introduce()
            for prompt in ("x", "y"):
                await router.answer(PATH, {"prompt": prompt}, {})
            await router.client.aclose()

        asyncio.run(ask())
    assert [body["prompt"] for body in prefilled] == [[0], "x", "y"]
    assert [body["kv_transfer_params"].get("describe") for body in prefilled] == [True, None, None]
    assert all(params.items() <= body["kv_transfer_params"].items() for body in decoded)


def test_stream_that_nobody_reads_lets_its_server_go() -> None:
    with server(b"data: 1\n\n") as decode:
        router = VllmEngines([decode], [decode], "concurrent", WAIT_S)

        async def leave() -> None:
            task = asyncio.create_task(router._decode(router.decode[0], PATH, {"stream": True}, None, {}))
            assert isinstance(await task, Passed)
            assert router.decode[0].requests == 1
            await drop(task)
            await router.client.aclose()

        asyncio.run(leave())
    assert router.decode[0].requests == 0


def ask(router: VllmEngines, count: int) -> list[Any]:
    """Answers to `count` requests at once."""

    async def all_of_them() -> list[Any]:
        answers = await asyncio.gather(*(router.answer(PATH, {"prompt": str(i)}, {}) for i in range(count)))
        await router.client.aclose()
        return list(answers)

    return asyncio.run(all_of_them())


PREFILLED = json.dumps(
    {"kv_transfer_params": {"do_remote_prefill": True, "remote_engine_id": "p", "remote_addresses": ["127.0.0.1:1"]}}
).encode()


@contextmanager
def dead() -> Iterator[str]:
    """A server that closes every connection without an answer."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        stop = threading.Event()

        def reject() -> None:
            while not stop.is_set():
                connection, _ = listening.accept()
                connection.close()

        thread = threading.Thread(target=reject)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            stop.set()
            socket.create_connection(listening.getsockname()).close()
            thread.join()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("listens", [True, False])
def test_one_of_two_decode_servers_is_dead(mode: str, listens: bool) -> None:
    """All requests are answered by the other one; the dead one is asked by those alone that were on their way."""
    with dead() as gone, server(PREFILLED) as prefill, server(b'{"fine": 1}') as decode:
        url = gone if listens else "http://127.0.0.1:9"
        router = VllmEngines([prefill], [url, decode], mode, WAIT_S)
        assert [answer.body for answer in ask(router, 40)] == [b'{"fine": 1}'] * 40
        assert [server.up for server in router.decode] == [False, True]
        assert {router.choose(router._exit, Asked(1)).url for _ in range(4)} == {decode}
    assert all(server.requests == server.prompt_tokens == 0 for server in (*router.prefill, *router.decode))


@pytest.mark.parametrize("mode", MODES)
def test_all_decode_servers_are_dead(mode: str) -> None:
    """Each is tried once; the client hears which."""
    with dead() as gone, server(PREFILLED) as prefill:
        router = VllmEngines([prefill], [gone, gone], mode, WAIT_S)
        with pytest.raises(ApiError, match=gone) as caught:
            ask(router, 1)
    assert caught.value.status == 502


@pytest.mark.parametrize("mode", MODES)
def test_dead_prefill_server_rests(mode: str) -> None:
    with dead() as gone, server(PREFILLED) as prefill, server(b'{"fine": 1}') as decode:
        router = VllmEngines([gone, prefill], [decode], mode, WAIT_S)
        assert [answer.status_code for answer in ask(router, 8)] == [200] * 8
        assert [server.up for server in router.prefill] == [False, True]
