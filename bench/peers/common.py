"""What the peer adapters share: two processes, paged memory with shuffled blocks, the check, and the one line of JSON.

An adapter is a script. It runs `initiator` and `target` in two processes, with the same block size and the same layout
on both sides, and prints one JSON object: `gb_s`, `version`, `how` and `variants`, or `error`. 10^9 bytes a second;
every byte of payload counts once; time runs from the first post until the initiator sees all layers complete.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import time
import traceback

import numpy as np

REPLY_S = 60.0


class Shape:
    """Layers of `layer_bytes`, in `blocks` blocks of `block_bytes`."""

    def __init__(self, layers: int, layer_mib: float, block_kib: float) -> None:
        self.layers = layers
        self.block_bytes = int(block_kib * 1024)
        self.blocks = int(layer_mib * (1 << 20)) // self.block_bytes
        self.layer_bytes = self.blocks * self.block_bytes
        self.total = layers * self.layer_bytes
        self.device = False
        self.threads = 0


class Memory:
    """One side's layers, and for each the order in which its blocks are sent. Sources hold their own numbers."""

    def __init__(self, shape: Shape, seed: int, filled: bool) -> None:
        self.shape = shape
        generator = np.random.default_rng(seed)
        self.layers = [np.zeros((shape.blocks, shape.block_bytes // 8), np.uint64) for _ in range(shape.layers)]
        self.orders = [generator.permutation(shape.blocks) for _ in range(shape.layers)]
        if filled:
            self.fill()

    def fill(self) -> None:
        """Every word of the n-th block sent says which layer and which n."""
        for index, (layer, order) in enumerate(zip(self.layers, self.orders, strict=True)):
            layer[order] = (index * self.shape.blocks + np.arange(self.shape.blocks, dtype=np.uint64) + 1)[:, None]

    def clear(self) -> None:
        for layer in self.layers:
            layer[:] = 0

    def check(self) -> None:
        """Raise unless the n-th block of each layer holds what the source's n-th block does."""
        for index, (layer, order) in enumerate(zip(self.layers, self.orders, strict=True)):
            wanted = (index * self.shape.blocks + np.arange(self.shape.blocks, dtype=np.uint64) + 1)[:, None]
            if not (layer[order] == wanted).all():
                raise RuntimeError(f"layer {index} arrived wrong")

    def bases(self) -> list[int]:
        return [layer.ctypes.data for layer in self.layers]

    def addresses(self) -> list[list[int]]:
        """Block addresses of each layer in the order in which they are sent."""
        return [
            (base + order * self.shape.block_bytes).tolist()
            for base, order in zip(self.bases(), self.orders, strict=True)
        ]


class DeviceMemory(Memory):
    """The same on a GPU."""

    def __init__(self, shape: Shape, seed: int, filled: bool, device: int) -> None:
        import torch

        torch.cuda.set_device(device)
        self.shape, self.torch, self.device = shape, torch, device
        generator = np.random.default_rng(seed)
        size = (shape.blocks, shape.block_bytes // 8)
        self.layers = [torch.zeros(size, dtype=torch.int64, device=f"cuda:{device}") for _ in range(shape.layers)]
        self.orders = [generator.permutation(shape.blocks) for _ in range(shape.layers)]
        if filled:
            self.fill()

    def _wanted(self, index):
        numbers = self.torch.arange(self.shape.blocks, device=f"cuda:{self.device}")
        return (index * self.shape.blocks + numbers + 1)[:, None]

    def fill(self) -> None:
        for index, (layer, order) in enumerate(zip(self.layers, self.orders, strict=True)):
            layer[self.torch.from_numpy(order).to(layer.device)] = self._wanted(index)
        self.torch.cuda.synchronize()

    def clear(self) -> None:
        for layer in self.layers:
            layer.zero_()
        self.torch.cuda.synchronize()

    def check(self) -> None:
        for index, (layer, order) in enumerate(zip(self.layers, self.orders, strict=True)):
            if not (layer[self.torch.from_numpy(order).to(layer.device)] == self._wanted(index)).all():
                raise RuntimeError(f"layer {index} arrived wrong")

    def bases(self) -> list[int]:
        return [layer.data_ptr() for layer in self.layers]


def receive(pipe):
    """The next message of the other process, or an error where it is gone or silent."""
    if not pipe.poll(REPLY_S):
        raise RuntimeError(f"the other process was silent for {REPLY_S:.0f} s")
    message = pipe.recv()
    if isinstance(message, dict) and "error" in message:
        raise RuntimeError(message["error"])
    return message


def best(variants, shape, reps):
    """Run each of `{name: callable}` `reps` times after one warm-up; the fastest median, and all medians in GB/s."""
    medians = {}
    for name, send in variants.items():
        send()
        times = []
        for _ in range(reps):
            began = time.perf_counter()
            send()
            times.append(time.perf_counter() - began)
        medians[name] = round(shape.total / statistics.median(times) / 1e9, 3)
    name = max(medians, key=medians.get)
    return {"gb_s": medians[name], "variant": name, "variants": medians}


def _target(pipe, target, shape):
    try:
        target(pipe, shape)
    except Exception as error:
        with contextlib.suppress(OSError):
            pipe.send({"error": f"target: {type(error).__name__}: {error}"})


def main(initiator, target) -> None:
    """Parse the options, run both processes, print the object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--layer-mib", type=float, default=16)
    parser.add_argument("--block-kib", type=float, default=32)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--device", action="store_true", help="from GPU 0 to GPU 1, where the peer can")
    parser.add_argument("--threads", type=int, default=0, help="of the peer, where it takes a number")
    options = parser.parse_args()
    shape = Shape(options.layers, options.layer_mib, options.block_kib)
    shape.device, shape.threads = options.device, options.threads
    # What the peer's own libraries print must not mix with the answer.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    pipe, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_target, args=(theirs, target, shape), daemon=True)
    process.start()
    theirs.close()
    try:
        result = initiator(pipe, shape, options.reps)
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"}
    json.dump(result, answer)
    answer.write("\n")
    answer.flush()
    with contextlib.suppress(OSError):
        pipe.send("end")
    process.join(5)
    if process.is_alive():
        process.kill()
    sys.stderr.flush()
    os._exit(1 if "error" in result else 0)  # a library whose shutdown hangs must not hold the benchmark up
