"""UCX's own program `ucx_perftest`, as the yardstick of a transfer."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping

from hetkv.errors import BuildError, UcxToolError
from hetkv.ucx import Ucx, load

SETTINGS = {"UCX_POSIX_ERROR_HANDLING": "y", "UCX_SYSV_ERROR_HANDLING": "y"}
"""With which UCX is at its best (docs/decisions/0001-ucx-through-its-c-api.md)."""

CONNECT_S = 10.0
RUN_S = 120.0


def loaded() -> Ucx:
    """The UCX that hetkv would use. Raises `UcxToolError`."""
    try:
        return load()
    except BuildError as error:
        raise UcxToolError(str(error)) from None


def tool(name: str) -> tuple[str, dict[str, str]]:
    """Path of a program of the UCX in use and the environment it runs in; else the one of that name in PATH."""
    ucx = loaded()
    environment = dict(os.environ)
    if program := ucx.tool(name):
        paths = [str(ucx.path.parent), environment.get("LD_LIBRARY_PATH", "")]
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
        return str(program), environment
    found = shutil.which(name)
    if found is None:
        raise UcxToolError(f"{name} is neither next to the UCX in use ({ucx.path}) nor in PATH")
    return found, environment


def version() -> str:
    """Version of the UCX that is in use."""
    ucx = loaded()
    return ".".join(map(str, ucx.version))


def put_gb_s(
    num_bytes: int,
    iterations: int = 32,
    *,
    settings: Mapping[str, str] = SETTINGS,
    error_handling: bool = True,
    cuda: bool = False,
) -> float:
    """Bandwidth of `ucp_put` of one contiguous buffer between two processes of this host, in 10^9 bytes a second.

    In host memory, or with `cuda` from the first GPU that is visible to the second.

    `settings` are set where the user's environment does not. The mean over `iterations` after two to warm up: puts
    complete asynchronously, so the tool's percentiles are of posting, not of moving.
    """
    path, environment = tool("ucx_perftest")
    environment = {**settings, **environment}
    port = free_port()
    memory = ["-m", "cuda"] if cuda else []  # the tool gives each process a GPU of its own
    server = subprocess.Popen(
        [path, "-p", str(port), *memory], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    options = [
        "-t",
        "ucp_put_bw",
        "-s",
        str(num_bytes),
        "-n",
        str(iterations),
        "-w",
        "2",
        "-f",
        *memory,
        *(["-e"] if error_handling else []),
    ]
    deadline = time.monotonic() + CONNECT_S
    try:
        while True:
            done = subprocess.run(
                [path, "127.0.0.1", "-p", str(port), *options],
                env=environment,
                capture_output=True,
                text=True,
                timeout=RUN_S,
            )
            rows = [line.split() for line in done.stdout.splitlines() if re.match(r"[\d\s.]+$", line) and line.strip()]
            if done.returncode == 0 and rows and len(rows[-1]) == 8:
                return num_bytes / float(rows[-1][3]) / 1e3  # microseconds an iteration, over all iterations
            if time.monotonic() > deadline or server.poll() is not None:
                raise UcxToolError(f"ucx_perftest: exit code {done.returncode}: {last_line(done.stderr + done.stdout)}")
            time.sleep(0.05)  # the server does not listen yet
    finally:
        server.kill()
        server.wait()


def free_port() -> int:
    """A free TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def last_line(text: str) -> str:
    """The last line that says something."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")
