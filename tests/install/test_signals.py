"""The signals of a process stay its own: UCX takes none, and `faulthandler` and other handlers go on working."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

NODES = """
import numpy, os, signal, sys, faulthandler
from hetkv import KVPool, KVSpec, Receiver, Sender

def run():
    spec = KVSpec.uniform(num_layers=2, num_kv_heads=1, head_dim=8)
    pools = [KVPool.allocate(spec, 4, layout="nhd", block_size=4, dtype="bf16") for _ in range(2)]
    sender = Sender(pools[0], secret=b"0123456789abcdef", instance="prefill")
    receiver = Receiver(pools[1], secret=b"0123456789abcdef", instance="decode")
    receiver.connect(sender.listen("127.0.0.1:0"))
    got = receiver.receive("r", [0, 1], 8)
    sent = sender.send("r", [2, 3], 8)
    sent.send_layers()
    sent.wait(20), got.wait(20)
    return sender, receiver
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("UCX_")}
    return subprocess.run([sys.executable, "-c", NODES + code], env=clean, capture_output=True, text=True, timeout=60)


def test_nodes_change_no_disposition() -> None:
    code = """
def caught():
    # by the kernel's own account; 32 and 33 are the C library's, for threads
    lines = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return [int(lines[name], 16) & ~(0b11 << 31) for name in ("SigCgt", "SigIgn")]

before = caught()
nodes = run()
assert caught() == before, (before, caught())
[node.close() for node in nodes]
assert caught() == before, (before, caught())
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT", "SIGTERM"])
@pytest.mark.parametrize("first", [True, False], ids=["handler-first", "nodes-first"])
def test_a_handler_of_the_process_is_called(name: str, first: bool) -> None:
    install = f"signal.signal(signal.{name}, lambda *_: print('handled', flush=True))"
    steps = [install, "nodes = run()"] if first else ["nodes = run()", install]
    end = [f"os.kill(os.getpid(), signal.{name})", "[node.close() for node in nodes]", "print('goes on')"]
    done = python("\n".join([*steps, *end]))
    assert done.stdout.split() == ["handled", "goes", "on"], done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM", "SIGSEGV", "SIGBUS"])
def test_without_a_handler_the_default_holds(name: str) -> None:
    done = python(f"nodes = run()\nos.kill(os.getpid(), signal.{name})")
    assert done.returncode == -signal.Signals[name]
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT"])
@pytest.mark.parametrize("first", [True, False], ids=["enabled-first", "nodes-first"])
def test_faulthandler_prints_its_traceback(name: str, first: bool) -> None:
    steps = ["faulthandler.enable()", "nodes = run()"]
    done = python("\n".join([*(steps if first else steps[::-1]), f"os.kill(os.getpid(), signal.{name})"]))
    assert done.returncode == -signal.Signals[name]
    assert "Fatal Python error" in done.stderr
    assert 'File "<string>"' in done.stderr
    assert "UCX" not in done.stderr
