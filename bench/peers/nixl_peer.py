"""NIXL: one descriptor per block, READ and WRITE, its defaults (UCX backend, progress thread)."""

from __future__ import annotations

import importlib
from importlib.metadata import version

from common import DeviceMemory, Memory, best, main, receive


def load():
    """The package of the CUDA 13 wheel, or of another; and its distribution's name."""
    for module, wheel in (("nixl_cu13", "nixl-cu13"), ("nixl_cu12", "nixl-cu12"), ("nixl._api", "nixl")):
        try:
            found = importlib.import_module(module if "." in module else module + "._api")
        except ImportError:
            continue
        return found, wheel
    raise ImportError("nixl")


def descriptors(addresses, size, device):
    return [(address, size, device) for address in addresses]


def make_memory(shape, seed, filled, device):
    return DeviceMemory(shape, seed, filled, device) if shape.device else Memory(shape, seed, filled)


def make_agent(api, name, memory, device):
    kind = "VRAM" if memory.shape.device else "DRAM"
    agent = api.nixl_agent(name, api.nixl_agent_config(num_threads=memory.shape.threads))
    agent.register_memory([(base, memory.shape.layer_bytes, device, "") for base in memory.bases()], kind)
    return agent


def target(pipe, shape):
    api, _ = load()
    here = int(shape.device)
    memory = make_memory(shape, 2, False, here)
    agent = make_agent(api, "target", memory, here)
    pipe.send((agent.get_agent_metadata(), memory.addresses()))
    agent.add_remote_agent(receive(pipe))
    pipe.send("ready")
    while (command := pipe.recv()) != "end":
        getattr(memory, command)()
        pipe.send("done")


def initiator(pipe, shape, reps):
    api, wheel = load()
    kind, there = ("VRAM", 1) if shape.device else ("DRAM", 0)
    memory = make_memory(shape, 1, True, 0)
    agent = make_agent(api, "initiator", memory, 0)
    metadata, remote_addresses = receive(pipe)
    peer = agent.add_remote_agent(metadata)
    pipe.send(agent.get_agent_metadata())
    receive(pipe)
    handles = {"READ": [], "WRITE": []}
    kept = []
    indices = list(range(shape.blocks))
    for mine, theirs in zip(memory.addresses(), remote_addresses, strict=True):
        local = agent.prep_xfer_dlist("NIXL_INIT_AGENT", descriptors(mine, shape.block_bytes, 0), kind)
        remote = agent.prep_xfer_dlist(peer, descriptors(theirs, shape.block_bytes, there), kind)
        kept.append((local, remote))
        for operation, made in handles.items():
            made.append(agent.make_prepped_xfer(operation, local, indices, remote, indices))

    def wait(handle, state):
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        if state != "DONE":
            raise RuntimeError(f"NIXL transfer ended in state {state}")

    def at_once(operation):
        states = [(handle, agent.transfer(handle)) for handle in handles[operation]]
        for handle, state in states:
            wait(handle, state)

    def in_turn(operation):
        for handle in handles[operation]:
            wait(handle, agent.transfer(handle))

    variants = {
        f"{operation}, {name}": lambda operation=operation, send=send: send(operation)
        for operation in handles
        for name, send in (("all layers posted at once", at_once), ("a layer at a time", in_turn))
    }
    for operation, source in (("WRITE", "initiator"), ("READ", "target")):
        command(pipe, "clear" if source == "initiator" else "fill")
        (memory.fill if source == "initiator" else memory.clear)()
        at_once(operation)
        if source == "initiator":
            command(pipe, "check")
        else:
            memory.check()
    return {
        **best(variants, shape, reps),
        "version": version(wheel),
        "how": f"UCX backend, {shape.threads} more threads; a descriptor per {shape.block_bytes // 1024} KiB block, "
        f"prepared once; same layout on both sides, blocks shuffled; {shape.layers} layers, fastest of READ and WRITE",
    }


def command(pipe, name):
    pipe.send(name)
    receive(pipe)


if __name__ == "__main__":
    main(initiator, target)
