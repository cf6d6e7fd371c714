"""examples/c/transfer.c against Python and against itself: as sender, as receiver, and where it cannot be."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import hetkv
from hetkv import KVPool, KVSpec, Receiver, Sender
from hetkv.errors import AuthenticationError, IncompatibleError, PeerLostError
from tests.capi.library import PACKAGE, ROOT, environment, program

SPEC = KVSpec.uniform(num_layers=4, num_kv_heads=2, head_dim=64)
TOKENS, WAIT_S = 50, 60
AXES = "layer segment block head token channel"


@pytest.fixture
def transfer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return program(tmp_path_factory.getbasetemp())


def values() -> np.ndarray:
    """`[layer, kv, token, head, channel]`, as the program has them."""
    layer, token, head, channel = np.ogrid[:4, :TOKENS, :2, :64]
    key = (layer + token / 128 + head / 4 + channel / 64).astype(np.float32)
    return np.stack((key, -key), axis=1)


@contextmanager
def running(program: Path, *words: str, **options: object) -> Iterator[subprocess.Popen[str]]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([str(program), *words], **pipes, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def secret(env: dict[str, str]) -> bytes:
    return Path(env["HETKV_SECRET_FILE"]).read_bytes()


def received(program: Path, address: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The program as receiver, until it ends."""
    command = [str(program), "receive", address]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=WAIT_S)


def test_c_sends_to_python(transfer: Path, tmp_path: Path) -> None:
    """To another block size, order of axes and dtype."""
    env = environment(tmp_path / "secret")
    memory = np.zeros((4, 2, 6, 2, 32, 64), np.float16)
    pool = KVPool.from_tensors(SPEC, memory, AXES)
    with running(transfer, "send", env=env) as process, Receiver(pool, instance="d", secret=secret(env)) as receiver:
        receiver.connect(process.stdout.readline().strip())
        receiver.receive("request-1", [4, 1], TOKENS).wait(WAIT_S)
        assert process.wait(WAIT_S) == 0, process.stderr.read()
    found = memory[:, :, [4, 1]].transpose(0, 1, 2, 4, 3, 5).reshape(4, 2, 64, 2, 64)[:, :, :TOKENS]
    assert np.array_equal(found, values().astype(np.float16))


def test_python_sends_to_c(transfer: Path, tmp_path: Path) -> None:
    env = environment(tmp_path / "secret")
    memory = np.zeros((4, 2, 9, 2, 8, 64), np.float32)
    blocks = [8, 0, 3, 5, 1, 7, 2]
    padded = np.zeros((4, 2, 56, 2, 64), np.float32)
    padded[:, :, :TOKENS] = values()
    memory[:, :, blocks] = padded.reshape(4, 2, 7, 8, 2, 64).transpose(0, 1, 2, 4, 3, 5)
    pool = KVPool.from_tensors(SPEC, memory, AXES)
    with Sender(pool, instance="p", secret=secret(env)) as sender:
        request = sender.send("request-1", blocks, TOKENS)
        request.send_layers()
        done = subprocess.run(
            [transfer, "receive", sender.listen()], env=env, capture_output=True, text=True, timeout=60
        )
        assert (done.stdout, done.returncode) == ("arrived\n", 0), done.stderr
        request.wait(WAIT_S)


def test_c_sends_to_c(transfer: Path, tmp_path: Path) -> None:
    env = environment(tmp_path / "secret")
    with running(transfer, "send", env=env) as sender:
        address = sender.stdout.readline().strip()
        done = received(transfer, address, env)
        assert (done.stdout, done.returncode) == ("arrived\n", 0), done.stderr
        assert sender.wait(WAIT_S) == 0


def test_c_tp_2_by_python_sends_to_c(transfer: Path, tmp_path: Path) -> None:
    """The program needs both ranks, and one alone is named."""
    env = environment(tmp_path / "secret")
    pool = KVPool.allocate(SPEC, 8, dtype="float32", shard=hetkv.Shard.ranks(SPEC, tp=2)[0])
    with Sender(pool, instance="p", tp=2, rank=0, secret=secret(env)) as sender:
        done = subprocess.run(
            [transfer, "receive", sender.listen()], env=env, capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 1
    assert done.stderr == "PEER_LOST: rank 1 of instance 'p' is not connected\n"


def test_other_secrets(transfer: Path, tmp_path: Path) -> None:
    env = environment(tmp_path / "secret")
    pool = KVPool.allocate(SPEC, 8, dtype="float32")
    with Sender(pool, instance="p", secret=b"another secret than theirs") as sender:
        done = subprocess.run(
            [transfer, "receive", sender.listen()], env=env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 1
        assert done.stderr.startswith("AUTHENTICATION: ")
    with running(transfer, "send", env=env) as process:
        with Receiver(pool, instance="d", secret=b"another secret than theirs") as receiver:
            with pytest.raises(AuthenticationError):
                receiver.connect(process.stdout.readline().strip())


def test_another_model_is_named_on_both_sides(transfer: Path, tmp_path: Path) -> None:
    env = environment(tmp_path / "secret")
    pool = KVPool.allocate(KVSpec.uniform(5, 2, 64), 8, dtype="float32")
    with Sender(pool, instance="p", secret=secret(env)) as sender:
        done = subprocess.run(
            [transfer, "receive", sender.listen()], env=env, capture_output=True, text=True, timeout=60
        )
        assert "INCOMPATIBLE: " in done.stderr
        assert "len(spec.layers): this side has 4, the peer has 5" in done.stderr
    with running(transfer, "send", env=env) as process, Receiver(pool, instance="d", secret=secret(env)) as receiver:
        with pytest.raises(IncompatibleError, match=r"len\(spec\.layers\): this side has 5, the peer has 4"):
            receiver.connect(process.stdout.readline().strip())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_c_sender_that_dies_is_lost(number: int, transfer: Path, tmp_path: Path) -> None:
    env = environment(tmp_path / "secret")
    pool = KVPool.allocate(SPEC, 8, dtype="float32")
    with running(transfer, "send", env=env) as process, Receiver(pool, instance="d", secret=secret(env)) as receiver:
        receiver.connect(process.stdout.readline().strip())
        request = receiver.receive("another request", [1], 16)
        process.send_signal(number)
        with pytest.raises(PeerLostError):
            request.wait(WAIT_S)


def test_a_python_sender_that_ends_is_lost(transfer: Path, tmp_path: Path) -> None:
    env = environment(tmp_path / "secret")
    pool = KVPool.allocate(SPEC, 8, dtype="float32")
    with Sender(pool, instance="p", secret=secret(env)) as sender:
        with running(transfer, "receive", sender.listen(), env=env) as process:
            for _ in range(600):
                if sender.stats()["pending_tickets"]:
                    break
                process.poll()
                signal.sigtimedwait([], 0.05)
            sender.close()
            assert process.wait(WAIT_S) == 1
            assert process.stderr.read().startswith("PEER_LOST: ")


def test_the_cmake_package(tmp_path: Path, transfer: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("no cmake")
    source = ROOT / "examples" / "c"
    quiet = {"check": True, "capture_output": True, "text": True}
    subprocess.run(["cmake", "-S", source, "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={PACKAGE}"], **quiet)
    subprocess.run(["cmake", "--build", tmp_path], **quiet)
    done = subprocess.run([tmp_path / "transfer"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")


def test_the_header_is_also_cpp(tmp_path: Path, transfer: Path) -> None:
    source = tmp_path / "one.cpp"
    source.write_text("#include <hetkv.h>\nint main() { return hetkv_version() == nullptr; }\n")
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{PACKAGE / 'include'}", "-fsyntax-only"]
    subprocess.run(["c++", *flags, str(source)], check=True)
