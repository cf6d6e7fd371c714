"""A transfer between two processes by an installed hetkv without torch: NumPy pools of different layouts."""

from __future__ import annotations

import multiprocessing
import platform
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

import hetkv
from hetkv import KVPool, KVSpec, Receiver, Sender

SECRET = b"a secret of this smoke test"
SPEC = KVSpec.uniform(num_layers=4, num_kv_heads=2, head_dim=64)
TOKENS = 100


def values(layer: int, segment: str) -> np.ndarray:
    """`[tokens, heads, channels]` of one layer's K or V."""
    seed = 2 * layer + (segment == "v")
    return np.random.default_rng(seed).standard_normal((TOKENS, 2, 64), dtype=np.float32).astype(np.float16)


def prefill(pipe: Connection) -> None:
    pool = KVPool.allocate(SPEC, 16, layout="nhd", block_size=16, dtype="float16")
    blocks = [3, 1, 9, 2, 15, 4, 8]
    for layer in range(4):
        for segment in "kv":
            view = np.asarray(pool.view(layer, segment))
            for token, row in enumerate(values(layer, segment)):
                view[blocks[token // 16], token % 16] = row.reshape(view.shape[2:])
    with Sender(pool, secret=SECRET, instance="prefill-0") as sender:
        pipe.send(sender.listen("127.0.0.1:0"))
        handle = sender.send("request", blocks, TOKENS)
        for layer in range(4):
            handle.send_layer(layer)
        handle.wait(60)
        pipe.recv()


def main() -> None:
    assert "torch" not in sys.modules
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=prefill, args=(theirs,))
    child.start()
    pool = KVPool.allocate(SPEC, 8, layout="hnd", block_size=64, dtype="float16")
    blocks = [5, 0]
    with Receiver(pool, secret=SECRET, instance="decode-0") as receiver:
        receiver.connect(ours.recv())
        receiver.receive("request", blocks, TOKENS).wait(60)
        ours.send("done")
    child.join(60)
    assert child.exitcode == 0
    for layer in range(4):
        for segment in "kv":
            view = np.asarray(pool.view(layer, segment))
            found = view[blocks].reshape(128, 2, 64)[:TOKENS]
            assert np.array_equal(found, values(layer, segment)), f"layer {layer}, {segment}"
    assert "torch" not in sys.modules
    assert "libuc" not in Path("/proc/self/maps").read_text(), "UCX is loaded"
    print(f"python {platform.python_version()}: hetkv {hetkv.__version__}, without UCX: transfer equal")


if __name__ == "__main__":
    main()
