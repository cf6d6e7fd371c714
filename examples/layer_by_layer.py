"""Layers leave while the next one computes, in chunks of the prompt; the decoder waits layer by layer."""

import torch

from hetkv import KVPool, KVSpec, Receiver, Sender

LAYERS, CHUNKS = 4, [(0, 32), (32, 50)]
SPEC = KVSpec.uniform(LAYERS, num_kv_heads=4, head_dim=64)


def attention(pool: KVPool, layer: int, blocks: list[int], chunk: tuple[int, int]) -> None:
    """In place of an engine's kernels: fill the chunk's K and V of a layer."""
    tokens = torch.arange(*chunk)
    rows = torch.tensor(blocks)[tokens // 16], tokens % 16
    for segment in "kv":
        pool.view(layer, segment)[rows] = (layer + 1) * tokens[:, None, None].to(torch.float16)


def main() -> None:
    ours = KVPool.allocate(SPEC, num_blocks=8, layout="nhd", block_size=16, dtype="float16")
    theirs = KVPool.allocate(SPEC, num_blocks=8, layout="packed_hnd", block_size=32, dtype="float16")
    with Sender(ours, instance="prefill-0") as sender, Receiver(theirs, instance="decode-0") as receiver:
        receiver.connect(sender.listen())
        getting = receiver.receive("request-1", [6, 2], num_tokens=50)

        sending = sender.send("request-1", [1, 4], num_tokens=50)  # blocks of the first chunk
        for chunk in CHUNKS:
            if chunk[0]:
                sending.extend([7, 0])  # chunked prefill: the next chunk's blocks
            for layer in range(LAYERS):
                attention(ours, layer, [1, 4, 7, 0], chunk)
                sending.send_layer(layer, chunk)  # with a GPU: after the work of the current stream
        sending.wait_packed(timeout=60)  # the blocks may be freed now

        for layer in range(LAYERS):
            getting.wait_layer(layer, timeout=60)
            print("layer", layer, "last token", theirs.view(layer, "v")[2, 17, 0, 0].item())
        sending.wait(timeout=60)


if __name__ == "__main__":
    main()
