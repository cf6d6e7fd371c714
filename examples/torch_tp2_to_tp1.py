"""A prefill instance of two tensor-parallel ranks, each a process, and a decode instance of one rank."""

import multiprocessing

import torch

from hetkv import Instance, KVPool, KVSpec, Receiver, Sender, Shard

SPEC = KVSpec.uniform(num_layers=2, num_kv_heads=8, head_dim=64)


def prefill(rank: int, book: str) -> None:
    k, v = ([torch.zeros(100, 16, 4, 64, dtype=torch.bfloat16) for _ in range(2)] for _ in "kv")
    shard = Shard.ranks(SPEC, tp=2)[rank]  # heads 0 to 3, or 4 to 7
    pool = KVPool.from_tensors(SPEC, list(zip(k, v, strict=True)), "block token head channel", shard=shard)
    with Sender(pool, instance="prefill-0", tp=2, rank=rank) as sender:
        sender.listen(book=book)
        for layer in (*k, *v):
            layer[[7, 3]] = rank + 1.0  # the prefill of 30 tokens
        request = sender.send("request-1", [7, 3], num_tokens=30)
        request.send_layers()
        request.wait(timeout=60)


def decode(book: str) -> None:
    pool = KVPool.allocate(SPEC, num_blocks=25, layout="hnd", block_size=64, dtype=torch.bfloat16)
    with Receiver(pool, instance="decode-0") as receiver:
        receiver.connect(Instance.read(book))
        receiver.receive("request-1", [9], num_tokens=30).wait(timeout=60)
        heads = pool.view(1, "v")[9, :30].amin(dim=(0, 2))  # a view [block, token, head, channel] of any layout
        print("arrived:", heads.tolist())


if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=prefill, args=(rank, "prefill-0.book")) for rank in range(2)]
    for process in ranks:
        process.start()
    decode("prefill-0.book")
    for process in ranks:
        process.join()
