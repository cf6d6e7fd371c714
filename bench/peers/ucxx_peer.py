"""UCXX, the successor of ucx-py: tag messages from its asyncio API, one per block or one gathered per layer."""

from __future__ import annotations

import asyncio
from importlib.metadata import version

import numpy as np
from common import Memory, best, main, receive

WHEEL = "ucxx-cu13"
MODES = ("a message per block", "gather, a message per layer, scatter")


async def move(endpoint, memory, mode, sending):
    """One side of one repetition; the target answers when the last byte is in place."""
    operation = endpoint.send if sending else endpoint.recv
    for layer, order in zip(memory.layers, memory.orders, strict=True):
        if mode == MODES[0]:
            await asyncio.gather(*[operation(layer[block]) for block in order])
        elif sending:
            await endpoint.send(layer[order])
        else:
            packed = np.empty_like(layer)
            await endpoint.recv(packed)
            layer[order] = packed
    note = np.zeros(1, np.uint8)
    await (endpoint.recv(note) if sending else endpoint.send(note))


def target(pipe, shape):
    import ucxx

    memory = Memory(shape, 2, filled=False)

    async def serve():
        connected = asyncio.get_running_loop().create_future()
        listener = ucxx.create_listener(connected.set_result, port=0)
        pipe.send(listener.port)
        endpoint = await connected
        while (command := await asyncio.to_thread(pipe.recv)) != "end":
            if command == "check":
                memory.check()
                pipe.send("done")
            else:
                await move(endpoint, memory, command, sending=False)

    asyncio.run(serve())


def initiator(pipe, shape, reps):
    import ucxx

    memory = Memory(shape, 1, filled=True)
    port = receive(pipe)

    async def connect():
        return await ucxx.create_endpoint("127.0.0.1", port)

    loop = asyncio.new_event_loop()
    endpoint = loop.run_until_complete(connect())

    def send(mode):
        pipe.send(mode)
        loop.run_until_complete(asyncio.wait_for(move(endpoint, memory, mode, sending=True), 60))

    result = best({mode: lambda mode=mode: send(mode) for mode in MODES}, shape, reps)
    pipe.send("check")
    receive(pipe)
    return {
        **result,
        "version": version(WHEEL),
        "how": f"asyncio API, tag messages; {shape.block_bytes // 1024} KiB blocks, same layout on both sides, "
        f"blocks shuffled; {shape.layers} layers, faster of {MODES[0]!r} and {MODES[1]!r}",
    }


if __name__ == "__main__":
    main(initiator, target)
