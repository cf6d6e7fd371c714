"""What a pair of hosts, or of processes of one host, would get: `probe`, and `listen` and `connect` between two hosts.

Nothing is inferred that can be tried: two processes move a small request over each path and count how its frames went.
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetkv import ucx as library
from hetkv.bench.pair import Pair, Shape, make_pool
from hetkv.errors import HetkvError, InputError
from hetkv.transport.backends import folder
from hetkv.transport.config import TransferConfig

if TYPE_CHECKING:
    from hetkv.control.tls import TlsConfig

MIB = 1 << 20
LAYERS = 4
REPEATS = 5


def probe(mib: float = 64) -> dict[str, Any]:
    """Everything about this host, with a request of `mib` MiB moved between two of its processes; JSON types."""
    from hetkv.bench.environment import environment

    found: dict[str, Any] = {**environment(), "cpu": cpu(), "gpu": gpus(), "ucx": ucx_facts(), "limits": limits()}
    found["devices"] = {
        f"{source} to {destination}": attempt(partial(local, mib, True, (source, destination)))
        for source, destination in device_pairs(found["gpu"])
    }
    found["local"] = {"auto": attempt(lambda: local(mib, True)), "stream": attempt(lambda: local(mib, False))}
    found["warnings"] = warnings(found)
    return found


def cpu() -> dict[str, Any]:
    """Instruction sets that remap can use, narrowest first, and the one that it does."""
    from hetkv.core import core

    return {
        "available_isas": core.available_isas(),
        "isa": core.isa(),
        "default_window_bytes": TransferConfig().engine().window_bytes,
    }


def gpus() -> dict[str, dict[str, Any]]:
    """By vendor: its devices as hetkv's backend sees them, or why there are none."""
    from hetkv.core import core

    found: dict[str, dict[str, Any]] = {}
    for name, count, why in core.load_backends(folder()):
        devices = [core.device_info(name, index) for index in range(count)]
        found[name] = {"present": count > 0, "why_not": why, "devices": devices}
    for name, node in (("cuda", "/dev/nvidiactl"), ("hip", "/dev/kfd")):
        found.setdefault(name, {"present": False, "why_not": "no backend was built", "devices": []})
        if not Path(node).exists() and not found[name]["present"]:
            found[name]["why_not"] = f"no {node}"
    return found


def device_pairs(found: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """Pairs of places to try on this host: PyTorch calls the devices of either vendor `cuda`."""
    count = max((len(gpu["devices"]) for gpu in found.values()), default=0)
    if count == 0:
        return []
    return [("cuda:0", f"cuda:{min(1, count - 1)}"), ("cuda:0", "cpu"), ("cpu", "cuda:0")]


def ucx_facts() -> dict[str, Any]:
    """The UCX that RDMA would use, or why there is none."""
    try:
        found = library.load()
    except HetkvError as error:
        return {"error": str(error)}
    return {
        "version": ".".join(map(str, found.version)),
        "origin": found.origin,
        "path": str(found.path),
        "has_verbs": found.has_verbs,
    }


def limits() -> dict[str, Any]:
    """What bounds registered and shared memory. `None`: no limit."""
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    shared: dict[str, int] | None = None
    try:
        stat = os.statvfs("/dev/shm")
        shared = {"bytes": stat.f_frsize * stat.f_blocks, "free_bytes": stat.f_frsize * stat.f_bavail}
    except OSError:
        pass
    return {
        "memlock_bytes": None if locked == resource.RLIM_INFINITY else locked,
        "dev_shm": shared,
        "rdma_devices": rdma_devices(),
    }


def rdma_devices() -> list[str]:
    """Names of the host's RDMA devices."""
    try:
        return sorted(entry.name for entry in Path("/sys/class/infiniband").iterdir())
    except OSError:
        return []


def shape(mib: float) -> Shape:
    """A request of about `mib` MiB, at least a token a layer."""
    return Shape(LAYERS, max(1, round(mib * MIB / Shape(LAYERS, 1).payload_bytes)))


def local(mib: float, direct: bool, devices: tuple[str, str] = ("cpu", "cpu")) -> dict[str, Any]:
    """Two processes of this host, NHD 16 to HND 64: how payloads travel, how fast, and whether they arrive whole."""
    with Pair(shape(mib)._replace(devices=devices), TransferConfig(direct=direct)) as pair:
        pair.send()
        seconds = [pair.send().seconds for _ in range(REPEATS)]
        verified = pair.verify()
        return {"path": pair.path(), "gb_s": rate(mib, seconds), "verified_bytes": verified}


def rate(mib: float, seconds: list[float]) -> float:
    """10^9 payload bytes a second at the median."""
    return round(shape(mib).payload_bytes / statistics.median(seconds) / 1e9, 3)


def attempt(what: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A result, or the error in its place: a probe continues."""
    try:
        return what()
    except HetkvError as error:
        return {"error": str(error)}


def _end(role: str, mib: float) -> str:
    """Name of one end of a probe between two hosts: it says what the end will move."""
    return f"probe-{role}:{mib:g}"


def _check_size(instance: str, mib: float) -> None:
    """Raise `InputError` where the other end moves another size."""
    _, _, theirs = instance.partition(":")
    if theirs != f"{mib:g}":
        raise InputError(f"--mib is {mib:g} here and {theirs or 'unknown'} at the other end: give both the same")


def listen(
    address: str,
    secret: bytes,
    mib: float,
    timeout: float,
    report: Callable[[str], None],
    tls: TlsConfig | None = None,
) -> dict[str, Any]:
    """The receiving end: waits for one `connect` and takes what it sends. `report` gets the address once it listens."""
    from hetkv.transport.receiver import Receiver

    pool, blocks = make_pool(shape(mib), shape(mib).destination, 2)
    with Receiver(pool, secret=secret, instance=_end("receiver", mib), tls=tls) as receiver:
        report(receiver.listen(address))
        deadline = time.monotonic() + timeout
        while not receiver.peers:
            if time.monotonic() > deadline:
                raise HetkvError(f"no peer connected to {address} within {timeout:g} s")
            time.sleep(0.05)
        peer, seconds = receiver.peers[0], []
        _check_size(peer.description.instance, mib)
        for turn in range(REPEATS + 1):
            began = time.perf_counter()
            receiver.receive(f"probe-{turn}", blocks, shape(mib).tokens).wait(timeout)
            seconds.append(time.perf_counter() - began)
        deadline = time.monotonic() + timeout
        while not peer.lost and time.monotonic() < deadline:  # it ends first, when it has heard of the last
            time.sleep(0.01)
        return {"peer": peer.description.host, "same_host": peer.same_host, "gb_s": rate(mib, seconds[1:])}


def connect(address: str, secret: bytes, mib: float, timeout: float, tls: TlsConfig | None = None) -> dict[str, Any]:
    """The sending end: what this host reaches at `address`, where `listen` runs with the same secret and size."""
    from hetkv.transport.sender import Sender

    pool, blocks = make_pool(shape(mib), shape(mib).source, 1)
    with Sender(pool, secret=secret, instance=_end("sender", mib), tls=tls) as sender:
        peer = sender.connect(address)
        _check_size(peer.description.instance, mib)
        seconds = []
        for turn in range(REPEATS + 1):
            began = time.perf_counter()
            handle = sender.send(f"probe-{turn}", blocks, shape(mib).tokens)
            handle.send_layers()
            handle.wait(timeout)
            seconds.append(time.perf_counter() - began)
        path = sender.path(peer)
        found: dict[str, Any] = {"peer": peer.description.host, "same_host": peer.same_host, "path": path}
        found |= {"streams": peer.kind, "tried": list(peer.tried), "gb_s": rate(mib, seconds[1:])}
    slow = path == "stream" and peer.same_host
    found["warnings"] = [f"one host, but payloads go through {peer.kind} sockets: {why}" for why in peer.tried if slow]
    return found


def warnings(found: dict[str, Any]) -> list[str]:
    """What an operator should know: slow lanes where fast ones were due, limits that will hurt."""
    said: list[str] = []
    facts, bounds = found["ucx"], found["limits"]
    if bounds["rdma_devices"] and not facts.get("has_verbs"):
        why = facts.get("error") or f"the UCX of {facts['origin']} has no verbs"
        said.append(f"RDMA devices {', '.join(bounds['rdma_devices'])} are here, but cannot be used: {why}")
    for path, result in found["local"].items():
        if "error" in result:
            said.append(f"two processes of this host, {path}: {result['error']}")
    if found["local"]["auto"].get("path", "shm") != "shm":
        said.append("two processes of this host do not share memory: payloads are staged and sent")
    for pair, result in found.get("devices", {}).items():
        if "error" in result:
            said.append(f"{pair}: {result['error']}")
        elif "cpu" not in pair and result["path"] != "device":
            said.append(f"{pair}: the two GPUs do not reach each other's memory: payloads pass through the host")
        elif result["path"] == "stream":
            said.append(f"{pair}: payloads are staged and sent, as the GPU does not map the other side's memory")
    window, locked = found["cpu"]["default_window_bytes"], bounds["memlock_bytes"]
    if bounds["rdma_devices"] and locked is not None and locked < 2 * window:
        said.append(
            f"at most {locked // 1024} KiB of memory can be locked (ulimit -l), a window takes {window // MIB} MiB"
        )
    return said
