"""`hetkv bench overlap`: what sending costs a prefill, and how much of the transfer is exposed after it.

The compute is the runtime's own prefill of a named shape with random weights, on one GPU; its KV goes, layer by layer,
to a pool of another layout on another GPU (or on the host's CPU) in another process. Prefills with and without sending
take turns. All times are of one clock; that of the last byte is the progress thread's own (`engine.take_trace`).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

from hetkv.bench.child import REPLY_S, Child
from hetkv.bench.pair import TICKET_S, synchronize, use_device
from hetkv.errors import InputError
from hetkv.transport.config import TransferConfig

TARGETS = {"exposed_layers": 1.5, "slowdown": 0.03, "ttft_ratio": 1.03}
"""Most that is allowed: exposed time in times of one layer's transfer, prefill slowed, TTFT over that of one GPU."""
WAYS: dict[str, dict[str, Any]] = {
    "copy": {},
    "copy-high-priority": {"high_priority": True},
    "copy-32-blocks": {"max_blocks": 32},
    "store": {"copy_engine": False},
    "store-24-blocks": {"copy_engine": False, "max_blocks": 24},
    "stream": {"direct": False},
}
"""Settings: packed and copied by the copy engine, stored across by the pack, or sent through host memory."""


class Run(NamedTuple):
    """One prefill. Times in ns of CLOCK_MONOTONIC."""

    start: int
    kv_ready: int
    """The last layer's KV was in the prefill's pool, by the device's clock."""
    stop: int
    """The compute was over, its first token known."""


class _Prefill:
    def __init__(self, shape: str, prompt: int, batch: int, device: str, config: TransferConfig, secret: bytes) -> None:
        import torch

        from hetkv.kv.pool import KVPool
        from hetkv.runtime.paged import BlockAllocator, Pages
        from hetkv.runtime.synthetic import random_decoder
        from hetkv.runtime.synthetic import shape as named
        from hetkv.transport.sender import Sender

        self.device = use_device(device)
        self.model = random_decoder(named(shape), torch.bfloat16, device)
        spec = self.model.kv_spec
        self.pool = KVPool.allocate(spec, batch * -(-prompt // 16), layout="nhd", block_size=16, device=device)
        allocator = BlockAllocator(self.pool)
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.config.vocab_size
        self.prompts = [torch.randint(vocabulary, (prompt,), generator=generator).tolist() for _ in range(batch)]
        self.blocks = [allocator.allocate(prompt) for _ in range(batch)]
        self.pages = [Pages(self.pool, blocks) for blocks in self.blocks]
        self.node = Sender(self.pool, secret=secret, instance="prefill", config=config)

    def listen(self) -> str:
        return self.node.listen()

    def close(self) -> None:
        self.node.close()

    def run(self, request: str) -> Run:
        """One prefill of the whole batch; its KV is sent where `request` is given."""
        from hetkv.runtime.batch import Span
        from hetkv.runtime.clock import WorkClock

        sending = []
        if request:
            for index, blocks in enumerate(self.blocks):
                sending.append(self.node.send(f"{request}-{index}", blocks, len(self.prompts[index])))
            time.sleep(TICKET_S)
        batch = self.node.batch(sending) if sending else None
        synchronize(self.device)
        clock = WorkClock(self.model.device)

        def on_layer(layer: int) -> None:
            if batch is not None:
                batch.send_layer(layer)
            clock.mark()

        spans = [Span(pages, 0, prompt) for pages, prompt in zip(self.pages, self.prompts, strict=True)]
        logits = self.model.forward(spans, on_layer)
        assert logits is not None
        logits.argmax(-1).tolist()
        stop = time.monotonic_ns()
        for one in sending:
            one.wait(REPLY_S / 2)
        return Run(clock.start_ns, clock.times()[-1], stop)

    def send_alone(self, request: str) -> None:
        """The same KV without compute."""
        sending = [
            self.node.send(f"{request}-{i}", blocks, len(self.prompts[i])) for i, blocks in enumerate(self.blocks)
        ]
        time.sleep(TICKET_S)
        batch = self.node.batch(sending)
        for layer in range(len(self.model.layers)):
            batch.send_layer(layer)
        for one in sending:
            one.wait(REPLY_S / 2)


class _Decode:
    def __init__(self, shape: str, prompt: int, batch: int, device: str, config: TransferConfig, secret: bytes) -> None:
        from hetkv.kv.pool import KVPool
        from hetkv.runtime.paged import BlockAllocator
        from hetkv.runtime.synthetic import shape as named
        from hetkv.transport.receiver import Receiver

        use_device(device)
        spec = named(shape).kv_spec()
        self.pool = KVPool.allocate(spec, batch * -(-prompt // 64), layout="hnd", block_size=64, device=device)
        allocator = BlockAllocator(self.pool)
        self.prompt = prompt
        self.blocks = [allocator.allocate(prompt) for _ in range(batch)]
        self.node = Receiver(self.pool, secret=secret, instance="decode", config=config)
        self.handles: list[Any] = []

    def connect(self, address: str) -> None:
        self.node.connect(address)

    def close(self) -> None:
        self.node.close()

    def receive(self, request: str) -> None:
        self.node.engine.take_trace()
        self.handles = [self.node.receive(f"{request}-{i}", at, self.prompt) for i, at in enumerate(self.blocks)]

    def wait(self) -> list[tuple[int, int]]:
        """(layer, time) of every unpack of the request."""
        for one in self.handles:
            one.wait(REPLY_S / 2)
        return [(span[2], span[4]) for span in self.node.engine.take_trace() if span[0] == "unpack"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `hetkv bench overlap`."""
    from hetkv.bench.transfer_device import devices

    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument("--shape", default="llama-2-7b", metavar="NAME", help="llama-2-7b, llama-3-70b or qwen3-32b")
    parser.add_argument("--prompt", type=int, default=4096, metavar="N", help="tokens of each prompt (default 4096)")
    parser.add_argument("--batch", type=int, action="append", metavar="N", help="repeatable (default 1 and 4)")
    parser.add_argument("--device", type=devices, default=("cuda:0", "cuda:1"), metavar="FROM,TO")
    parser.add_argument("--reps", type=int, default=20, metavar="N", help="prefills of each kind (default 20)")
    parser.add_argument(
        "--way", action="append", choices=list(WAYS), help="how payloads cross; repeatable (default copy)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, write the JSON."""
    from rich.table import Table

    from hetkv import terminal
    from hetkv.bench.environment import environment

    if args.reps < 1 or args.prompt < 1:
        raise InputError("--reps and --prompt are at least 1")
    console, results = terminal.console(args.json), []
    for batch in args.batch or [1, 4]:
        for way in args.way or ["copy"]:
            with console.status(f"batch {batch}, {way}"):
                results.append(measure(args, batch, way))
    table = Table(
        "batch",
        "way",
        "prefill ms",
        "slowed",
        "a layer us",
        "exposed us",
        "in layers",
        "after KV us",
        "TTFT ratio",
        box=None,
    )
    for row in results:
        table.add_row(
            str(row["batch"]), row["way"], f"{row['prefill_ms']:.2f}", f"{100 * row['slowdown']:.2f} %",
            f"{row['layer_us']:.0f}", f"{row['exposed_us']:.0f}", f"{row['exposed_layers']:.2f}",
            f"{row['after_kv_us']:.0f}",
            f"{row['ttft_ratio']:.4f}",
        )  # fmt: skip
    console.print(table)
    console.print(f"targets, at most: {TARGETS}", highlight=False)
    if args.json:
        report = {
            **environment(), "shape": args.shape, "prompt": args.prompt, "device": list(args.device),
            "reps": args.reps, "targets": TARGETS, "results": results,
        }  # fmt: skip
        terminal.write_json(args.json, report)
    return 0


def measure(args: argparse.Namespace, batch: int, way: str) -> dict[str, Any]:
    """One batch size: medians over `reps` prefills with sending and as many without, in turns."""
    config = TransferConfig(trace=True, **WAYS[way])
    secret = os.urandom(32)
    prefill = Child("prefill", _Prefill, (args.shape, args.prompt, batch, args.device[0], config, secret))
    decode = Child("decode", _Decode, (args.shape, args.prompt, batch, args.device[1], config, secret))
    try:
        for child in (prefill, decode):
            child.answer()
        decode.ask("connect", prefill.ask("listen"))
        plain, sent, last, exposed, alone, ends = [], [], [], [], [], []
        for turn in range(args.reps + 2):
            runs: dict[bool, Run] = {}
            unpacked: list[int] = []
            # Each comes first as often as the other: the second finds a hotter chip.
            for sends in (False, True) if turn % 2 == 0 else (True, False):
                if sends:
                    decode.ask("receive", f"r{turn}")
                runs[sends] = prefill.ask("run", f"r{turn}" if sends else "")
                if sends:
                    unpacked = [at for _, at in decode.ask("wait")]
            if turn < 2:  # to warm up
                continue
            run, without = runs[True], runs[False]
            plain.append((without.stop - without.start) / 1e6)
            sent.append((run.stop - run.start) / 1e6)
            last.append((max(unpacked) - run.kv_ready) / 1e3)
            exposed.append(max(0, max(unpacked) - run.stop) / 1e3)
            ends.append((max(unpacked) - run.start) / 1e6)
        for turn in range(10):
            decode.ask("receive", f"a{turn}")
            prefill.ask("send_alone", f"a{turn}")
            times = sorted(decode.ask("wait"), key=lambda item: item[1])
            layers = times[-1][0] + 1
            # Steady rate of the transfer alone: from the end of the first layer to the end of the last.
            first = max(at for layer, at in times if layer == 0)
            alone.append((times[-1][1] - first) / 1e3 / max(layers - 1, 1))
    finally:
        for child in (decode, prefill):
            child.close()
    layer_us, exposed_us = statistics.median(alone), statistics.median(exposed)
    ttft = [max(a, b) for a, b in zip(sent, ends, strict=True)]
    plain_ms = statistics.median(plain)
    return {
        "batch": batch,
        "way": way,
        "prefill_ms": round(plain_ms, 3),
        "prefill_sending_ms": round(statistics.median(sent), 3),
        "slowdown": round(statistics.median(sent) / plain_ms - 1, 4),
        "layer_us": round(layer_us, 1),
        "exposed_us": round(exposed_us, 1),
        "exposed_layers": round(exposed_us / layer_us, 3),
        "after_kv_us": round(statistics.median(last), 1),
        "after_kv_layers": round(statistics.median(last) / layer_us, 3),
        "ttft_ms": round(statistics.median(ttft), 3),
        "ttft_ratio": round(statistics.median(ttft) / plain_ms, 4),
        "note": "exposed: from the end of the last layer's compute to the last byte in the decode's pool, 0 where that "
        "comes first; after_kv: from the last layer's KV being in the prefill's pool, which its attention follows",
    }
