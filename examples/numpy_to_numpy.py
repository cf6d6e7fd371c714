"""Two processes: `python numpy_to_numpy.py prefill` and, at the same time, `... decode`."""

import sys

import numpy as np

from hetkv import Instance, KVPool, KVSpec, Receiver, Sender

spec = KVSpec.uniform(num_layers=2, num_kv_heads=4, head_dim=64)
if sys.argv[1] == "prefill":
    memory = np.zeros((2, 2, 100, 16, 4, 64), np.float16)  # blocks of 16 tokens, tokens before heads
    pool = KVPool.from_tensors(spec, memory, "layer segment block token head channel")
    with Sender(pool, instance="prefill-0") as sender:
        sender.listen(book="prefill-0.book")
        memory[:, :, [7, 3]] = 1.5  # the prefill of 30 tokens
        request = sender.send("request-1", [7, 3], num_tokens=30)
        request.send_layers()
        request.wait(timeout=60)
else:
    memory = np.zeros((2, 2, 25, 4, 64, 64), np.float32)  # blocks of 64 tokens, heads before tokens, another dtype
    pool = KVPool.from_tensors(spec, memory, "layer segment block head token channel")
    with Receiver(pool, instance="decode-0") as receiver:
        receiver.connect(Instance.read("prefill-0.book"))
        receiver.receive("request-1", [9], num_tokens=30).wait(timeout=60)
        print("arrived:", memory[:, :, 9, :, :30].min(), memory[:, :, 9, :, 30:].max())
