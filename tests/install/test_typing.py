"""`py.typed` works for users: mypy reads hetkv's own annotations, accepts right programs and rejects wrong ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hetkv

RIGHT = """
from hetkv import Exchange, KVPool, KVSpec, Receiver, Sender

spec: KVSpec = KVSpec.uniform(num_layers=2, num_kv_heads=1, head_dim=8)
pool: KVPool = KVPool.allocate(spec, 4, layout="nhd", block_size=4, dtype="bf16")
with Sender(pool, secret=b"0" * 16, instance="prefill-0") as sender:
    address: str = sender.listen("127.0.0.1:0")
with Receiver(pool, secret=b"0" * 16, instance="decode-0") as receiver:
    receiver.connect(address)
with Exchange(pool, instance="both-0", tp=1) as exchange:
    sender_at: str = exchange.listen().sender
"""
WRONG = """
from hetkv import Exchange, KVPool, KVSpec

spec: int = KVSpec.uniform(num_layers="two", num_kv_heads=1, head_dim=8)


def both(pool: KVPool) -> Exchange:
    return Exchange(pool, instance=0)
"""


def mypy(tmp_path: Path, program: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "user.py").write_text(program)
    environment = {**os.environ, "MYPYPATH": str(Path(hetkv.__file__).parents[1])}
    command = [sys.executable, "-m", "mypy", "--strict", "--python-version", "3.10", "--follow-imports=silent",
               "--ignore-missing-imports", "--cache-dir", str(tmp_path / "cache"), "user.py"]  # fmt: skip
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_a_right_program_passes(tmp_path: Path) -> None:
    assert (Path(hetkv.__file__).parent / "py.typed").is_file()
    done = mypy(tmp_path, RIGHT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_wrong_program_does_not(tmp_path: Path) -> None:
    done = mypy(tmp_path, WRONG)
    assert 'incompatible type "str"; expected "int"' in done.stdout
    assert 'incompatible type "int"; expected "str"' in done.stdout, done.stdout
    assert 'Incompatible types in assignment (expression has type "KVSpec"' in done.stdout
