"""A model split over two GPUs, through NCCL or RCCL, generates what one GPU generates."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from hetkv.kv.pool import KVPool
from hetkv.runtime import Decoder, ParallelGroup, TextTokenizer, generate
from hetkv.runtime.demo import MODEL, PROMPT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs, and PyTorch built for them"),
]


def rank(number: int, tp: int, pp: int, meeting: str, answers: Connection) -> None:
    """One rank: generate whole and in chunks, report the tokens."""
    device = torch.device("cuda", number)
    group = ParallelGroup.join(meeting, tp, pp, number, device)
    model = Decoder.load(MODEL, torch.float32, device, group=group)
    pool = KVPool.allocate(model.kv_spec, 20, layout="rocm", dtype="float32", shard=model.shard, device=device)
    prompt = TextTokenizer.load(MODEL).encode(PROMPT)
    answers.send([generate(model, prompt, 96, pool), generate(model, prompt, 96, pool, chunk=13)])
    group.leave()


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_two_gpus_equal_one(tp: int, pp: int, tmp_path: Path) -> None:
    model = Decoder.load(MODEL, torch.float32, "cuda")
    pool = KVPool.allocate(model.kv_spec, 20, dtype="float32", device="cuda")
    expected = generate(model, TextTokenizer.load(MODEL).encode(PROMPT), 96, pool)
    context = torch.multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for number in range(2):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=rank, args=(number, tp, pp, f"file://{tmp_path}/meeting", theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        for pipe in pipes:
            assert pipe.poll(200), "no answer"
            assert pipe.recv() == [expected, expected]
    finally:
        for process in processes:
            process.join(20)
            process.kill()
