"""Two network namespaces of this host, joined by a veth pair: what two hosts, or two containers, are to hetkv.

Needs root, `ip` and, for a rate, `tc`. Where they are missing `why_not` says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hetkv.errors import BenchmarkError

ADDRESSES = "192.0.2.1", "192.0.2.2"
"""Of a network that is reserved for documents."""
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWNET = 0x00020000, 0x08000000, 0x20000000, 0x40000000
MS_REC, MS_PRIVATE, MS_RDONLY, MS_REMOUNT = 1 << 14, 1 << 18, 1, 32
PR_SET_PDEATHSIG = 1


class Place(NamedTuple):
    """Where a process is: what `enter` makes of it."""

    namespace: str = ""
    """Of the network; empty: as it is."""
    address: str = "127.0.0.1"
    """Where it listens."""
    private_shm: bool = False
    """A `/dev/shm` of its own, as containers have without `--ipc=host`."""
    private_pids: bool = False
    """A pid namespace of its own."""
    read_only_shm: bool = False
    no_system_v: bool = False
    """No System V shared memory: `kernel.shmmni` is 0."""

    def enter(self) -> None:
        """Move this process there, before it starts threads; with `private_pids` it goes on in a child of it.

        Raises `BenchmarkError` where the kernel does not let it.
        """
        if self.private_pids:
            _unshare(CLONE_NEWPID)
            if child := os.fork():
                with contextlib.suppress(KeyboardInterrupt):
                    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
            _call("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if self.namespace:
            with open(f"/run/netns/{self.namespace}") as namespace:
                _call("setns", namespace.fileno(), CLONE_NEWNET)
        if self.no_system_v:
            _unshare(CLONE_NEWIPC)
            Path("/proc/sys/kernel/shmmni").write_text("0")
        if self.private_shm or self.read_only_shm:
            _unshare(CLONE_NEWNS)
            _call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
            _call("mount", b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=64m")
            if self.read_only_shm:
                _call("mount", b"tmpfs", b"/dev/shm", b"tmpfs", MS_REMOUNT | MS_RDONLY, None)


Places = tuple[Place, Place]
HERE: Places = Place(), Place()
"""Two processes as they are."""


def why_not(rate: bool = False) -> str:
    """What is missing for `joined`; empty: nothing."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", *(("tc",) if rate else ())) if shutil.which(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed: they are of iproute2"
    try:
        with joined(rate_mbit=1000 if rate else 0):
            return ""
    except BenchmarkError as error:
        return str(error)


@contextlib.contextmanager
def joined(rate_mbit: float = 0) -> Iterator[Places]:
    """Two namespaces until the end of the block; `rate_mbit` limits each way by a token bucket (tbf)."""
    names = [f"hetkv-{os.getpid()}-{side}" for side in "ab"]
    ends = [f"hetkv{os.getpid() % 10**7}{side}" for side in "ab"]
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        _run("ip", "link", "add", ends[0], "netns", names[0], "type", "veth", "peer", ends[1], "netns", names[1])
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", end)
            _run("ip", "-n", name, "link", "set", "lo", "up")
            _run("ip", "-n", name, "link", "set", end, "up")
            if rate_mbit:
                burst = max(256, round(rate_mbit * 1e6 / 8 / 1000 / 1024))  # what a millisecond takes
                _run(
                    *("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", end, "root", "tbf"),
                    *("rate", f"{rate_mbit}mbit", "burst", f"{burst}kb", "latency", "50ms"),
                )
        yield Place(names[0], ADDRESSES[0]), Place(names[1], ADDRESSES[1])
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BenchmarkError(f"{' '.join(command)}: {done.stderr.strip()}")


def _unshare(flags: int) -> None:
    _call("unshare", flags)


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        error = ctypes.get_errno()
        raise BenchmarkError(f"{name}: {os.strerror(error)}")
