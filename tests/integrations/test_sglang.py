"""hetkv among SGLang's transfer backends, over its real classes; and a prefill and a decode server with it.

Runs where SGLang is installed, whose wheel brings CUDA's libraries: `pip install sglang==0.5.23` into an environment
that has hetkv. The two servers take minutes to start: `-m slow`.
"""

from __future__ import annotations

import inspect
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang.srt.disaggregation.base.conn", reason="SGLang is not installed")

from sglang.srt.arg_groups.choices import DISAGG_TRANSFER_BACKEND_CHOICES
from sglang.srt.disaggregation import utils
from sglang.srt.disaggregation.base import conn

from hetkv.integrations.sglang import plugin
from tests.integrations import test_sglang_sides

DEMO = Path(__file__).parents[2] / "hetkv" / "runtime" / "data" / "demo"
START_S, ANSWER_S = 600.0, 120.0
LENGTHS = (5, 16, 17, 31, 64, 100, 333, 700)
TOKENS = 24


def test_the_backend_is_one_of_sglangs() -> None:
    plugin()
    plugin()
    assert DISAGG_TRANSFER_BACKEND_CHOICES.count("hetkv") == 1
    backend = utils.TransferBackend("hetkv")
    assert backend is utils.TransferBackend["HETKV"]
    assert backend in list(utils.TransferBackend)
    assert utils.TransferBackend("nixl") is not backend
    classes = {kind: utils.get_kv_class(backend, kind) for kind in utils.KVClassType}
    assert classes.pop(utils.KVClassType.KVARGS) is conn.KVArgs
    assert utils.get_kv_class(utils.TransferBackend.FAKE, utils.KVClassType.SENDER).__name__ == "FakeKVSender"
    bases = {
        utils.KVClassType.MANAGER: conn.BaseKVManager,
        utils.KVClassType.SENDER: conn.BaseKVSender,
        utils.KVClassType.RECEIVER: conn.BaseKVReceiver,
        utils.KVClassType.BOOTSTRAP_SERVER: conn.BaseKVBootstrapServer,
    }
    assert set(classes) == set(bases)
    for kind, found in classes.items():
        assert issubclass(found, bases[kind])
        assert not inspect.isabstract(found)
        for name, method in inspect.getmembers(bases[kind], inspect.isfunction):
            ours = inspect.signature(getattr(found, name)).parameters
            free = any(each.kind is each.VAR_POSITIONAL for each in ours.values())
            assert free or set(inspect.signature(method).parameters) <= set(ours), name


def test_a_failure_is_reported_once_the_transfer_has_ended() -> None:
    from hetkv.integrations.sglang.transfer import HetkvKVReceiver, HetkvKVSender

    sides = test_sglang_sides.Pair()
    try:
        for room in range(1, 20):
            sides.expect(room, [2, 6])
            sides.prefill.send(room, [5], slice(0, 1), False)
            test_sglang_sides.wait(lambda room=room: sides.decode._in[room].rx is not None)
            handles = sides.prefill._out[room].tx, sides.decode._in[room].rx
            for kind, handle in zip((HetkvKVSender, HetkvKVReceiver), handles, strict=True):
                request = object.__new__(kind)
                request.kv_mgr = SimpleNamespace(prefill=sides.prefill, decode=sides.decode, check_status=None)
                request.bootstrap_room, request.conclude_state = room, conn.KVPoll.Failed
                while (status := request.poll()) != conn.KVPoll.Failed:
                    assert status == conn.KVPoll.Transferring
                assert handle is not None
                assert handle.done()
    finally:
        sides.close()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Pair:
    """A prefill and a decode server."""

    def __init__(self, folder: Path) -> None:
        self.bootstrap = free_port()
        self.ports = [free_port(), free_port()]
        self._draw = random.Random(7)
        # SGLang's rotary embedding imports vLLM's kernel on processors without AMX, but computes in PyTorch there.
        place = folder / "unused" / "vllm"
        place.mkdir(parents=True)
        (place / "__init__.py").touch()
        (place / "_custom_ops.py").write_text("rotary_embedding = None\n")
        path = os.pathsep.join([str(place.parent), *filter(None, sys.path)])
        secret = folder / "secret"  # SGLang's ranks listen at the host's address
        secret.write_text(os.urandom(32).hex())
        secret.chmod(0o600)
        environment = {
            **os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "HETKV_SECRET_FILE": str(secret),
        }  # fmt: skip
        self._logs = [folder / f"{role}.log" for role in ("prefill", "decode")]
        self._processes = []
        for role, port, log in zip(("prefill", "decode"), self.ports, self._logs, strict=True):
            command = [
                sys.executable, "-m", "sglang.launch_server", "--model-path", str(DEMO), "--device", "cpu", "--dtype",
                "float32", "--host", "127.0.0.1", "--port", str(port), "--disable-overlap-schedule",
                "--page-size", "16", "--max-total-tokens", "4096", "--max-running-requests", "16",
                "--attention-backend", "torch_native",
                "--skip-server-warmup", "--disaggregation-mode", role, "--disaggregation-transfer-backend", "hetkv",
                "--disaggregation-bootstrap-port", str(self.bootstrap),
                *(("--disaggregation-decode-retraction-backup", "cpu_tensor") if role == "decode" else ()),
            ]  # fmt: skip
            with log.open("w") as out:
                self._processes.append(subprocess.Popen(command, stdout=out, stderr=out, env=environment))

    def wait(self) -> None:
        deadline = time.monotonic() + START_S
        while not all("ready to roll" in log.read_text() for log in self._logs):
            texts = [log.read_text()[-3000:] for log in self._logs]
            assert all(process.poll() is None for process in self._processes), texts
            assert time.monotonic() < deadline, texts
            time.sleep(0.5)

    def run(self, prompt: list[int], count: int = TOKENS) -> list[int]:
        """Tokens of the decode server, as a router asks both."""
        body = {
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": count, "temperature": 0, "ignore_eos": True},
            "bootstrap_host": "127.0.0.1", "bootstrap_port": self.bootstrap,
            "bootstrap_room": self._draw.getrandbits(62),
        }  # fmt: skip
        with ThreadPoolExecutor(2) as pool:
            _, answer = pool.map(lambda port: post(port, body), self.ports)
        return list(answer["output_ids"])

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def post(port: int, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    made = Pair(tmp_path_factory.mktemp("sglang"))
    try:
        made.wait()
        yield made
    finally:
        made.close()


def expected(prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy tokens of `transformers`."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    found = []
    for prompt in prompts:
        made = model.generate(
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        found.append(made[0][len(prompt) :].tolist())
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_tokens_are_those_of_transformers(pair: Pair) -> None:
    """One by one, then all at once, which find the KV of the first time in the prefix cache of the prefill."""
    draw = random.Random(1)
    prompts = [[draw.randrange(5, 1000) for _ in range(length)] for length in LENGTHS]
    wanted = expected(prompts, TOKENS)
    assert [pair.run(prompt) for prompt in prompts] == wanted
    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(pair.run, prompts)) == wanted
