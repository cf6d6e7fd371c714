"""Runs the adapters of `bench/peers/`: other projects' transports, optional, each a script of its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import hetkv
from hetkv.bench.ucx import last_line
from hetkv.errors import InputError

SCRIPTS = Path(hetkv.__file__).resolve().parent.parent / "bench" / "peers"
TIMEOUT_S = 180.0


class Peer(NamedTuple):
    """What an adapter needs to be there."""

    module: str
    install: str


PEERS = {
    "nixl": Peer("nixl_cu13", "pip install --no-deps nixl-cu13"),
    "mooncake": Peer(
        "mooncake.engine",
        "pip install --no-deps mooncake-transfer-engine-non-cuda, with Debian's libibverbs1 librdmacm1 libnuma1",
    ),
    "ucxx": Peer("ucxx", "pip install ucxx-cu13, in an environment of its own: it pins another libucx"),
}


def parse_peers(text: str) -> list[str]:
    """Names of `--peers`: a comma-separated list, or `none`."""
    names = [] if text == "none" else text.split(",")
    for name in names:
        if name not in PEERS:
            raise InputError(f"--peers {text}: {name!r} is not one of {', '.join(PEERS)}, or none")
    return names


def parse_pythons(texts: list[str]) -> dict[str, str]:
    """Interpreters of `--peer-python NAME=PYTHON`; the others run in this one."""
    pythons = dict.fromkeys(PEERS, sys.executable)
    for text in texts:
        name, _, path = text.partition("=")
        if name not in PEERS or not path:
            raise InputError(f"--peer-python {text}: give NAME=PYTHON, NAME one of {', '.join(PEERS)}")
        if not Path(path).exists():
            raise InputError(f"--peer-python {text}: {path} does not exist")
        pythons[name] = path
    return pythons


def absent(name: str, python: str) -> str | None:
    """Why a peer cannot be measured, with the line that brings it; `None` where it can."""
    peer = PEERS[name]
    if not (SCRIPTS / f"{name}_peer.py").exists():
        return f"{SCRIPTS} is not there: the adapters are part of the source tree, not of the wheel"
    done = subprocess.run([python, "-c", f"import {peer.module}"], capture_output=True, text=True, timeout=TIMEOUT_S)
    return None if done.returncode == 0 else f"absent ({last_line(done.stderr)}); install: {peer.install}"


def measure(
    name: str,
    python: str,
    *,
    layers: int,
    layer_mib: float,
    block_kib: float,
    reps: int,
    device: bool = False,
    threads: int = 0,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """One run of an adapter: `{gb_s, variant, variants, version, how}`, or `{error}`. `device`: from GPU 0 to GPU 1.
    `environment`: set for the adapter in addition to this process's own."""
    options = {"--layers": layers, "--layer-mib": layer_mib, "--block-kib": block_kib, "--reps": reps}
    options["--threads"] = threads
    command = [python, str(SCRIPTS / f"{name}_peer.py"), *(str(word) for pair in options.items() for word in pair)]
    command += ["--device"] if device else []
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, env={**os.environ, **(environment or {})}
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no result within {TIMEOUT_S:.0f} s"}
    try:
        found: dict[str, Any] = json.loads(last_line(done.stdout))
    except ValueError:
        return {"error": f"exit code {done.returncode}: {last_line(done.stderr)}"}
    return found
