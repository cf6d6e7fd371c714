"""Mooncake's transfer engine: one entry of a batch per block, reads and writes, its TCP transport."""

from __future__ import annotations

from importlib.metadata import version

from common import Memory, best, main, receive

WHEEL = "mooncake-transfer-engine-non-cuda"


def make_engine(memory):
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
        raise RuntimeError("TransferEngine.initialize failed")
    for base in memory.bases():
        if engine.register_memory(base, memory.shape.layer_bytes) != 0:
            raise RuntimeError("TransferEngine.register_memory failed")
    return engine


def target(pipe, shape):
    memory = Memory(shape, 2, filled=False)
    engine = make_engine(memory)
    pipe.send((f"127.0.0.1:{engine.get_rpc_port()}", memory.addresses()))
    while (command := pipe.recv()) != "end":
        getattr(memory, command)()
        pipe.send("done")


def initiator(pipe, shape, reps):
    memory = Memory(shape, 1, filled=True)
    engine = make_engine(memory)
    segment, remote = receive(pipe)
    sizes = [shape.block_bytes] * shape.blocks
    layers = list(zip(memory.addresses(), remote, strict=True))
    calls = {"READ": engine.batch_transfer_sync_read, "WRITE": engine.batch_transfer_sync_write}

    def send(operation):
        for mine, theirs in layers:
            if calls[operation](segment, mine, theirs, sizes) != 0:
                raise RuntimeError(f"batch {operation} failed")

    send("WRITE")
    pipe.send("check")
    receive(pipe)
    memory.clear()
    send("READ")
    memory.check()
    return {
        **best({name: lambda name=name: send(name) for name in calls}, shape, reps),
        "version": version(WHEEL),
        "how": f"TCP transport, defaults; a batch per layer, an entry per {shape.block_bytes // 1024} KiB block; "
        f"same layout on both sides, blocks shuffled; {shape.layers} layers, faster of READ and WRITE",
    }


if __name__ == "__main__":
    main(initiator, target)
