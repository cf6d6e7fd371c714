"""Pool to pool over request shapes and numbers of requests at once, two processes, with every byte compared.

Run as `python bench/gpu/traffic.py FROM TO OUT.json`, on `cuda:0 cuda:1` or `cpu cpu`.

Layers of a step go in one `SendBatch.send_layer`; `ready` rows send all layers in one call. Medians of the repetitions.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from hetkv.bench.environment import environment


class Case(NamedTuple):
    name: str
    layers: int
    heads: int
    dim: int
    tokens: int
    requests: int
    reps: int


DEVICE = [
    Case("80 x 8 heads, 4k", 80, 8, 128, 4096, 1, 15),
    Case("80 x 8 heads, 1k", 80, 8, 128, 1024, 1, 15),
    Case("80 x 1 head, 1k", 80, 1, 128, 1024, 1, 20),
    Case("80 x 1 head, 1k, 32 requests", 80, 1, 128, 1024, 32, 10),
    Case("80 x 1 head, 256, 64 requests", 80, 1, 128, 256, 64, 10),
    Case("32 x 8 heads, 128, 64 requests", 32, 8, 128, 128, 64, 10),
    Case("1 layer, 16 tokens", 1, 8, 128, 16, 1, 200),
    Case("32 layers, 1 token", 32, 8, 128, 1, 1, 100),
]
CPU = [
    Case("32 x 8 heads, 4k", 32, 8, 128, 4096, 1, 10),
    Case("32 x 8 heads, 128, 32 requests", 32, 8, 128, 128, 32, 10),
    Case("80 x 1 head, 1k, 8 requests", 80, 1, 128, 1024, 8, 10),
    Case("80 x 1 head, 16 tokens, 64 requests", 80, 1, 128, 16, 64, 10),
    Case("1 layer, 16 tokens", 1, 8, 128, 16, 1, 200),
    Case("32 layers, 1 token", 32, 8, 128, 1, 1, 100),
]


def make(side: int, case: Case, device: str) -> tuple[Any, list[list[int]]]:
    """A pool of NHD 16 or HND 64, and shuffled blocks of each request."""
    import torch

    from hetkv import KVPool, KVSpec

    if device != "cpu":
        torch.cuda.set_device(torch.device(device))
    size, layout = ((16, "nhd"), (64, "hnd"))[side]
    per = -(-case.tokens // size)
    spec = KVSpec.uniform(case.layers, case.heads, case.dim)
    pool = KVPool.allocate(spec, per * case.requests, layout=layout, block_size=size, dtype="bf16", device=device)
    order = torch.randperm(per * case.requests, generator=torch.Generator().manual_seed(side)).tolist()
    return pool, [order[i * per : (i + 1) * per] for i in range(case.requests)]


def value(layer: int, request: int, segment: str) -> float:
    """What all elements of a request's tokens are in one layer, exact in bfloat16."""
    return float((layer * 7 + request * 3 + (segment == "v")) % 251 + 1)


def send(pipe: Any, case: Case, device: str, secret: bytes) -> None:
    import torch

    from hetkv import Sender

    pool, blocks = make(0, case, device)
    for layer in range(case.layers):
        for segment in "kv":
            for request, ids in enumerate(blocks):
                pool.view(layer, segment)[torch.tensor(ids)] = value(layer, request, segment)
    sender = Sender(pool, secret=secret, instance="p")
    pipe.send(sender.listen())
    round_ = 0
    while (kind := pipe.recv()) is not None:
        if device != "cpu":
            torch.cuda.synchronize()
        handles = [sender.send(f"r{round_}-{i}", ids, case.tokens) for i, ids in enumerate(blocks)]
        batch = sender.batch(handles)
        time.sleep(0.01)
        began = time.monotonic()
        calls = []
        if kind == "ready":
            batch.send_layers()
        else:
            for layer in range(case.layers):
                at = time.perf_counter()
                batch.send_layer(layer)
                calls.append(time.perf_counter() - at)
        for handle in handles:
            handle.wait(60)
        pipe.send((began, statistics.median(calls) if calls else 0.0))
        round_ += 1
    pipe.send(dict(sender.stats()))
    sender.close()


def receive(pipe: Any, case: Case, device: str, secret: bytes) -> None:
    import torch

    from hetkv import Receiver

    pool, blocks = make(1, case, device)
    receiver = Receiver(pool, secret=secret, instance="d")
    receiver.connect(pipe.recv())
    pipe.send(True)
    round_ = 0
    while pipe.recv():
        handles = [receiver.receive(f"r{round_}-{i}", ids, case.tokens) for i, ids in enumerate(blocks)]
        pipe.send(True)
        for handle in handles:
            handle.wait(60)
        pipe.send(time.monotonic())
        round_ += 1
    wrong = 0
    for layer in range(case.layers):
        for segment in "kv":
            for request, ids in enumerate(blocks):
                view = pool.view(layer, segment)[torch.tensor(ids)]
                # `view` is [block, token, head, channel] whatever the layout.
                got = view.reshape(-1, *view.shape[2:])[: case.tokens]
                wrong += int((got != value(layer, request, segment)).sum())
    pipe.send(wrong)
    receiver.close()


def run(case: Case, devices: list[str], kind: str) -> dict[str, Any]:
    context, secret = mp.get_context("spawn"), os.urandom(32)
    (source, theirs), (target, others) = context.Pipe(), context.Pipe()
    workers = [
        context.Process(target=send, args=(theirs, case, devices[0], secret), daemon=True),
        context.Process(target=receive, args=(others, case, devices[1], secret), daemon=True),
    ]
    for worker in workers:
        worker.start()
    target.send(source.recv())
    target.recv()
    visible, calls = [], []
    for repetition in range(case.reps + 2):
        target.send(True)
        target.recv()
        source.send(kind)
        began, call = source.recv()
        ended = target.recv()
        if repetition >= 2:
            visible.append(ended - began)
            calls.append(call)
    source.send(None)
    stats = source.recv()
    target.send(False)
    wrong = target.recv()
    for worker in workers:
        worker.join(10)
    size = case.layers * case.heads * case.dim * 4 * case.tokens * case.requests
    middle = statistics.median(visible)
    return {
        **case._asdict(),
        "kind": kind,
        "bytes": size,
        "wrong_elements": wrong,
        "visible_us": round(middle * 1e6, 1),
        "gb_s": round(size / middle / 1e9, 2),
        "send_layer_us": round(statistics.median(calls) * 1e6, 2),
        "frames_per_bundle": round(stats["frames"] / max(1, stats["bundles"]), 1),
    }


def main() -> None:
    devices, out = sys.argv[1:3], Path(sys.argv[3])
    facts, rows = environment(), []
    for case in CPU if devices[0] == "cpu" else DEVICE:
        for kind in ("layers", "ready"):
            try:
                row = run(case, devices, kind)
            except Exception as error:
                row = {"name": case.name, "kind": kind, "error": repr(error)}
            rows.append(row)
            print(json.dumps(row), flush=True)
            out.write_text(json.dumps({**facts, "results": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
