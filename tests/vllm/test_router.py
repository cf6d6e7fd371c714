"""The proxy's router before plain HTTP servers: turns, answers that are none, clients that leave."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from hetkv.integrations.vllm.proxy import MODES, Passed, Router, drop

PATH, WAIT_S = "/v1/completions", 10.0


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

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def test_idle_servers_of_both_kinds_take_turns() -> None:
    router = Router(["p0", "p1"], ["d0", "d1"], "concurrent", WAIT_S)
    chosen = [router.choose() for _ in range(4)]
    assert [(prefill.url, decode.url) for prefill, decode in chosen] == [("p0", "d0"), ("p1", "d1")] * 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("garbage", [b"not JSON", b"[]", b"{}"])
def test_prefill_answer_that_is_none(mode: str, garbage: bytes) -> None:
    """Decode is asked alone, and its answer is passed on."""
    seen: list[dict[str, Any]] = []
    with server(garbage) as prefill, server(b'{"fine": 1}', seen) as decode:
        router = Router([prefill], [decode], mode, WAIT_S)

        async def ask() -> Any:
            answer = await router.serve(PATH, {"prompt": "x", "kv_transfer_params": {"a": 1}}, {})
            await router.client.aclose()
            return answer

        answer = asyncio.run(ask())
    assert (answer.status_code, answer.body) == (200, b'{"fine": 1}')
    assert "kv_transfer_params" not in seen[-1]


def test_prefill_server_is_known_before_the_first_request() -> None:
    """It is asked once, with a prompt of one token, and computes each client's prompt once."""
    told = {"do_remote_prefill": True, "remote_engine_id": "p", "remote_addresses": ["127.0.0.1:1"]}
    prefilled: list[dict[str, Any]] = []
    decoded: list[dict[str, Any]] = []
    answer = json.dumps({"kv_transfer_params": told}).encode()
    with server(answer, prefilled) as prefill, server(b'{"fine": 1}', decoded) as decode:
        router = Router([prefill], [decode], "concurrent", WAIT_S)

        async def ask() -> None:
            await router.introduce()
            for prompt in ("x", "y"):
                await router.serve(PATH, {"prompt": prompt}, {})
            await router.client.aclose()

        asyncio.run(ask())
    assert [body["prompt"] for body in prefilled] == [[0], "x", "y"]
    assert [body["kv_transfer_params"].get("describe") for body in prefilled] == [True, None, None]
    assert all(told.items() <= body["kv_transfer_params"].items() for body in decoded)


def test_stream_that_nobody_reads_lets_its_server_go() -> None:
    with server(b"data: 1\n\n") as decode:
        router = Router([decode], [decode], "concurrent", WAIT_S)

        async def leave() -> None:
            task = asyncio.create_task(router._decode(router.decode[0], PATH, {"stream": True}, None, {}))
            assert isinstance(await task, Passed)
            assert router.decode[0].under_way == 1
            await drop(task)
            await router.client.aclose()

        asyncio.run(leave())
    assert router.decode[0].under_way == 0
