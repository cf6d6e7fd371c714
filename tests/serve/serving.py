"""`hetkv serve` as a process of its own, for tests, and a tiny checkpoint that it serves."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

DEMO = Path(__file__).parents[2] / "hetkv" / "runtime" / "data" / "demo"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
START_S = 120.0
QUICK = ("--kv-tokens", "8192", "--max-num-seqs", "64", "--max-num-batched-tokens", "256")


def save_checkpoint(path: Path) -> Any:
    """A random Llama of two layers with the demo's tokenizer and a chat template; the model of `transformers`."""
    import json

    from tests.runtime.instances import save_tiny

    model = save_tiny(path, vocabulary=3072, context=1024)
    shutil.copy(DEMO / "tokenizer.json", path)
    config = {"bos_token": "<|endoftext|>", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(
        json.dumps({**json.loads((DEMO / "tokenizer_config.json").read_text()), **config})
    )
    return model


class Serving:
    """One `hetkv serve`."""

    def __init__(self, log: Path, *options: str) -> None:
        self.log = log
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "hetkv", "serve", *options], stdout=out, stderr=out, env=environment
            )
        self.url = ""

    def wait_for(self, text: str, seconds: float = START_S) -> re.Match[str]:
        """Until the log has a line of that pattern."""
        deadline = time.monotonic() + seconds
        while True:
            found = re.search(text, self.log.read_text())
            if found:
                return found
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def ready(self) -> Serving:
        """Until requests are answered."""
        self.url = self.wait_for(r"(http://\S+)/v1 serves")[1]
        return self

    @property
    def gate(self) -> str:
        """Where instances join."""
        return self.wait_for(r"instances join at (\S+)")[1]

    def health(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(self.url + "/health").json()
        return found

    def metrics(self) -> dict[str, float]:
        """By name and labels."""
        lines = httpx.get(self.url + "/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def is_empty(self) -> bool:
        """No request is left anywhere, and all blocks are free."""
        metrics = self.metrics()
        blocks = {
            name: [v for k, v in metrics.items() if k.startswith(f"hetkv_instance_{name}{{")]
            for name in ("requests", "prompt_tokens_in_line", "kv_blocks", "kv_blocks_free")
        }
        rest = sum(blocks["requests"]) + sum(blocks["prompt_tokens_in_line"]) + metrics["hetkv_waiting_requests"]
        return rest == 0 and blocks["kv_blocks"] == blocks["kv_blocks_free"]

    def wait_empty(self, seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not self.is_empty():
            assert time.monotonic() < deadline, self.metrics()
            time.sleep(0.05)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@contextmanager
def serving(log: Path, options: Sequence[str], wait: bool = True) -> Iterator[Serving]:
    """Ended at the end of the block."""
    server = Serving(log, *options)
    try:
        yield server.ready() if wait else server
    finally:
        server.end()
