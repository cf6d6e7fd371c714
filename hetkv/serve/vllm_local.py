"""vLLM servers of a plan as processes of this machine: `VllmLocal`, for `hetkv serve --plan`."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import NamedTuple

import msgspec

from hetkv.control.tls import TlsConfig
from hetkv.errors import InputError
from hetkv.planner.output.launch import HOST, SECRET, Server, servers, visible_devices
from hetkv.simulator.deployment import Plan

LEAVE_S = 30.0
START_S = 1800.0
log = logging.getLogger("hetkv.serve.vllm")


class Started(NamedTuple):
    """One server."""

    role: str
    url: str
    process: subprocess.Popen[bytes]


class VllmLocal:
    """Starts the servers of a plan in the order of its pools, GPUs in turn. `close` ends them."""

    def __init__(
        self,
        plan: Plan,
        model: str,
        secret_file: str | None = None,
        more: Sequence[str] = (),
        tls: TlsConfig | None = None,
    ) -> None:
        """`more`: further arguments of every server. `tls`: for their connectors."""
        self._tls = tls
        if find_spec("vllm") is None:
            raise InputError(
                "the plan's engine is vllm, which is not installed here (docs/vllm.md); `--engine hetkv` takes the "
                "reference runtime in its place"
            )
        self.started: list[Started] = []
        first = 0
        for server in servers(plan, "vllm"):
            if server.nodes > 1:
                raise InputError(
                    f"pool {server.pool}: {server.nodes} nodes an instance: `hetkv serve` starts one machine"
                )
            for number in range(server.count):
                self.started.append(self._start(server, number, model, secret_file, first, more))
                first += server.gpus

    def urls(self, *roles: str) -> list[str]:
        """Of the servers of these roles."""
        return [one.url for one in self.started if one.role in roles]

    def wait(self) -> None:
        """Until all answer. Raises `InputError` where one ends or never does."""
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + START_S
        for one in self.started:
            while True:
                with suppress(OSError):
                    direct.open(one.url + "/health", timeout=2)
                    break
                if one.process.poll() is not None or time.monotonic() > deadline:
                    raise InputError(f"the vLLM server at {one.url} did not start: see its output")
                time.sleep(0.5)

    def close(self) -> None:
        """End all."""
        for one in self.started:
            one.process.terminate()
        deadline = time.monotonic() + LEAVE_S
        for one in self.started:
            try:
                one.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                one.process.kill()
                one.process.wait()

    def _start(
        self, server: Server, number: int, model: str, secret_file: str | None, first: int, more: Sequence[str]
    ) -> Started:
        port = _free_port()
        given = [argument.replace(HOST, "127.0.0.1") for argument in server.arguments]
        if secret_file is not None:
            given = [argument.replace(f'"{SECRET}"', f'"{secret_file}"') for argument in given]
        else:  # this user's own secret
            given = [argument.replace(f',"secret_file":"{SECRET}"', "") for argument in given]
        if self._tls is not None:
            key, tls = '"kv_connector_extra_config":{', msgspec.json.encode(self._tls).decode()
            given = [argument.replace(key, f'{key}"tls":{tls},') for argument in given]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *given]
        command += [*more, "--host", "127.0.0.1", "--port", str(port)]
        devices = ",".join(str(first + gpu) for gpu in range(server.gpus))
        process = subprocess.Popen(command, env={**os.environ, visible_devices(server): devices})
        log.info("vLLM %s %d at port %d has process %d", server.pool, number, port, process.pid)
        return Started(server.role, f"http://127.0.0.1:{port}", process)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
