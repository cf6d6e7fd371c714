"""What `hetkv doctor` finds: which lanes prove themselves on this host, what limits them, and what to change.

A lane counts where two processes have moved a few bytes over it and compared them; a deadline ends one that hangs.
"""

from __future__ import annotations

import os
import platform
import resource
import socket
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from hetkv.bench import probe
from hetkv.bench.environment import environment
from hetkv.bench.pair import Pair, Shape
from hetkv.control.local import FOLDER_ENV, NO_FOLDER
from hetkv.errors import HetkvError
from hetkv.transport.config import TransferConfig

MIB = 1 << 20
SHAPE = Shape(1, 16)
DEADLINE_S = 8.0
CONFIG = TransferConfig(
    slot_bytes=64 << 10, window_bytes=256 << 10, lease_s=DEADLINE_S, hold_s=DEADLINE_S, handshake_timeout_s=DEADLINE_S
)
ONLY_TCP = {FOLDER_ENV: NO_FOLDER}
LEAST_SHM_MIB = 64
LEAST_FILES = 4096


class Lane(NamedTuple):
    """One way for payloads, and how to try it."""

    name: str
    path: str
    """What `Sender.path` says where it works."""
    config: TransferConfig
    environment: dict[str, str]
    devices: tuple[str, str] = ("cpu", "cpu")


def lanes(gpus: int, rdma: bool) -> list[Lane]:
    """Those that this host could have."""
    found = [
        Lane("shm", "shm", CONFIG, {}),
        Lane("unix socket", "stream", _with(direct=False), {}),
        Lane("tcp", "stream", CONFIG, ONLY_TCP),
    ]
    if gpus:
        found.insert(0, Lane("device", "device", _with(window="device"), {}, ("cuda:0", f"cuda:{min(1, gpus - 1)}")))
    if rdma:
        found.append(Lane("rma", "rma", _with(rma="auto"), ONLY_TCP))
    return found


def _with(**settings: Any) -> TransferConfig:
    return TransferConfig(**{**{name: getattr(CONFIG, name) for name in CONFIG.__struct_fields__}, **settings})


def prove(lane: Lane) -> dict[str, Any]:
    """Map, signal, wake-up and put of one lane: two processes, a few bytes, compared; or why not."""
    try:
        with Pair(SHAPE._replace(devices=lane.devices), lane.config, lane.environment) as pair:
            pair.send()
            seconds = [pair.send().seconds for _ in range(5)]
            verified, path = pair.verify(), pair.path()
    except HetkvError as error:
        return {"works": False, "why_not": str(error)}
    if path != lane.path:
        return {"works": False, "why_not": f"payloads went by {path}"}
    return {"works": True, "us": round(1e6 * statistics.median(seconds)), "verified_bytes": verified}


def examine() -> dict[str, Any]:
    """Everything, as JSON types."""
    gpus = probe.gpus()
    bounds = probe.limits()
    count = max(len(gpu["devices"]) for gpu in gpus.values())
    found: dict[str, Any] = {
        **environment(),
        "lanes": {lane.name: prove(lane) for lane in lanes(count, bool(bounds["rdma_devices"]))},
        "ucx": probe.ucx_facts(),
        "gpu": gpus,
        "limits": {**bounds, "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0]},
        "namespaces": namespaces(),
        "ipv6": ipv6(),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
    }
    for name in ("device", "rma"):
        found["lanes"].setdefault(name, {"works": False, "why_not": absent(name, found), "due": False})
    found["advice"] = advice(found)
    return found


def absent(lane: str, found: dict[str, Any]) -> str:
    """Why a lane was not tried."""
    if lane == "rma":
        return "no RDMA device"
    return "; ".join(f"{name}: {gpu['why_not']}" for name, gpu in found["gpu"].items()) or "no GPU"


def namespaces() -> dict[str, Any]:
    """Which namespaces of the kernel this process is in, and whether they are a container's."""
    kinds = {}
    for kind in ("net", "pid", "ipc", "mnt", "user"):
        try:
            kinds[kind] = os.readlink(f"/proc/self/ns/{kind}")
        except OSError:
            continue
    inside = [name for name in ("/.dockerenv", "/run/.containerenv") if Path(name).exists()]
    return {**kinds, "container": bool(inside) or "KUBERNETES_SERVICE_HOST" in os.environ}


def ipv6() -> bool:
    """Whether this host has IPv6."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def advice(found: dict[str, Any]) -> list[str]:
    """What to change, most important first."""
    said: list[str] = []
    tried, bounds, ucx = found["lanes"], found["limits"], found["ucx"]
    for name, remedy in REMEDIES.items():
        if not tried[name]["works"] and tried[name].get("due", True):
            said.append(f"lane {name} does not work: {tried[name]['why_not']}. {remedy}")
    if bounds["rdma_devices"] and not ucx.get("has_verbs"):
        which = ucx.get("error") or f"the UCX of {ucx['origin']}, {ucx['path']}, has no verbs"
        said.append(
            f"RDMA devices {', '.join(bounds['rdma_devices'])} are idle: {which}. Install a UCX with verbs, or name it "
            "in HETKV_UCX_LIBRARY"
        )
    shm = bounds["dev_shm"]
    if shm is None or shm["bytes"] < LEAST_SHM_MIB * MIB:
        said.append(
            f"/dev/shm has less than {LEAST_SHM_MIB} MiB. hetkv itself keeps only sockets there; PyTorch and engines "
            "need more: docker run --shm-size, or --ipc=host"
        )
    if shm is not None and not os.access("/dev/shm", os.W_OK):
        said.append(
            "/dev/shm is not writable: containers of this host find each other's sockets only in a folder that both "
            f"mount, named in {FOLDER_ENV}"
        )
    locked = bounds["memlock_bytes"]
    if locked is not None and bounds["rdma_devices"]:
        said.append(f"at most {locked >> 10} KiB can be locked, RDMA registers windows: ulimit -l unlimited")
    if bounds["open_files"] < LEAST_FILES:
        said.append(f"at most {bounds['open_files']} open files, and a slot takes one: ulimit -n {LEAST_FILES}")
    if found["namespaces"]["container"]:
        said.append(
            "this is a container: payloads to another one of this host are stored straight only where both share "
            f"/dev/shm (--ipc=host) or a folder that {FOLDER_ENV} names; otherwise they take TCP, with a warning"
        )
    if not found["ipv6"]:
        said.append("no IPv6 here: give peers IPv4 addresses")
    if sys.platform != "linux":
        said.append("not Linux: shared memory by descriptor and GPU lanes are Linux's")
    return said


REMEDIES = {
    "device": "Do the GPUs have peer access (nvidia-smi topo -m; IOMMU, ACS), and may this process use both "
    "(CUDA_VISIBLE_DEVICES, --gpus)?",
    "shm": f"memfd and unix sockets are needed: look at seccomp profiles, ulimit -n, and {FOLDER_ENV}.",
    "unix socket": f"A sandbox that forbids unix sockets? {FOLDER_ENV} names a folder that can hold them.",
    "tcp": "Is the loopback interface up, and does a firewall drop its packets?",
    "rma": "Both sides need rma='auto', a UCX with verbs, and memory that can be locked: ulimit -l unlimited.",
}
"""By lane, what to look at where it fails."""


def failed(found: dict[str, Any]) -> bool:
    """Whether a lane that this host should have does not work."""
    return any(not lane["works"] and lane.get("due", True) for lane in found["lanes"].values())
