"""Many requests at once with `await`; one of them is aborted."""

import asyncio

import numpy as np

from hetkv import HetkvError, KVPool, KVSpec, Receiver, Sender

SPEC = KVSpec.uniform(num_layers=2, num_kv_heads=4, head_dim=64)


async def prefill(sender: Sender, name: str, block: int) -> None:
    request = sender.send(name, [block], num_tokens=16)
    await asyncio.sleep(0.01 * block)  # the prefill
    request.send_layers()
    await request


async def decode(receiver: Receiver, name: str, block: int) -> str:
    request = receiver.receive(name, [block], num_tokens=16)
    if name == "request-3":
        await asyncio.sleep(0.01)
        request.abort("the client went away")
    await asyncio.wait_for(request, timeout=60)
    return f"{name} arrived"


async def main() -> None:
    ours, theirs = (np.zeros((2, 2, 10, 16, 4, 64), np.float16) for _ in range(2))
    axes = "layer segment block token head channel"
    with (
        Sender(KVPool.from_tensors(SPEC, ours, axes), instance="prefill-0") as sender,
        Receiver(KVPool.from_tensors(SPEC, theirs, axes), instance="decode-0") as receiver,
    ):
        receiver.connect(sender.listen())
        names = [f"request-{number}" for number in range(5)]
        both = [decode(receiver, name, block) for block, name in enumerate(names)]
        both += [prefill(sender, name, block) for block, name in enumerate(names)]
        for result in await asyncio.gather(*both, return_exceptions=True):
            if isinstance(result, HetkvError):
                print(f"{type(result).__name__}: {result}")
            elif result is not None:
                print(result)


if __name__ == "__main__":
    asyncio.run(main())
