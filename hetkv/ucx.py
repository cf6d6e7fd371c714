"""Finds the UCX library of this host and loads it, where a node asks for RDMA: nothing else needs it.

The first of these that is there and new enough is used (`docs/environment.md`):
the one that `HETKV_UCX_LIBRARY` names; one that the process has loaded already; on a host with RDMA devices, a system
UCX that has verbs; the `libucx` wheel; any system UCX. A system UCX is what the dynamic linker finds (`ldconfig`,
`LD_LIBRARY_PATH`), or one under `SYSTEM_PREFIXES`.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from hetkv.errors import BuildError

MINIMUM = (1, 18)
"""Oldest UCX that is used; a newer minor version of the same major one suffices."""

SYSTEM_PREFIXES = ("/opt/ucx", "/opt/rocm", "/opt/rocm/ucx", "/opt/hpcx/ucx", "/usr/local")

RDMA_DEVICES = Path("/sys/class/infiniband")

SONAME = "libucp.so.0"
_PARTS = ("libucs.so.0", "libucs_signal.so.0", "libuct.so.0")
"""What `libucp` needs, in the order of loading; not every version has each."""

# UCX reads these once, when it is loaded. Its errors reach the caller as exceptions, so it does not have to print
# them. SIGHUP and the error signals, which it would take, belong to the process that imports hetkv.
_DEFAULTS = {
    "UCX_LOG_LEVEL": "fatal",
    "UCX_HANDLE_ERRORS": "none",
    "UCX_ERROR_SIGNALS": "",
    "UCX_DEBUG_SIGNO": "0",
}

# Run in a process of its own: a library whose version is too low cannot be unloaded again.
_INSPECT = """
import ctypes, sys
lib = ctypes.CDLL(sys.argv[1])
numbers = [ctypes.c_uint() for _ in range(3)]
lib.ucp_get_version(*map(ctypes.byref, numbers))
with open("/proc/self/maps") as maps:
    path = next(line.split(maxsplit=5)[5].strip() for line in maps if "/libucp.so" in line)
print(*(n.value for n in numbers), path)
"""


class Ucx(NamedTuple):
    """The UCX of this process."""

    path: Path
    """Its `libucp`."""
    version: tuple[int, int, int]
    origin: str
    """`HETKV_UCX_LIBRARY`, `process`, `wheel` or `system`."""

    @property
    def has_verbs(self) -> bool:
        """Whether it has the transports of RDMA devices."""
        return has_verbs(self.path)

    def tool(self, name: str) -> Path | None:
        """A program of this UCX, such as `ucx_info`, where it is installed with it."""
        program = self.path.parent.parent / "bin" / name
        return program if program.is_file() else None


def has_verbs(path: Path) -> bool:
    """Whether the UCX of this `libucp` has modules for RDMA devices."""
    folder = path.resolve().parent
    return any((folder / "ucx").glob("libuct_ib*.so*"))


@contextmanager
def defaults() -> Iterator[None]:
    """hetkv's settings where the user has set none, for as long as UCX is loaded; the environment is then as before."""
    added = {name: value for name, value in _DEFAULTS.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@cache
def load() -> Ucx:
    """Load UCX into this process. Raises `BuildError`, which says what was tried and what to do."""
    with defaults():
        if given := os.environ.get("HETKV_UCX_LIBRARY"):
            return _load(_named(given), "HETKV_UCX_LIBRARY")
        if loaded := _loaded():
            return _load(loaded, "process")
        rejected: list[str] = []
        for path, origin in _candidates(rejected):
            return _load(path, origin)
    tried = f" ({'; '.join(rejected)})" if rejected else ""
    raise BuildError(
        f"no UCX {'.'.join(map(str, MINIMUM))} or newer is installed{tried}: `pip install libucx-cu13` (also for "
        "hosts without a GPU) or libucx-cu12, or set HETKV_UCX_LIBRARY to the libucp.so.0 of another UCX"
    )


def _named(given: str) -> Path:
    """The `libucp` that the user names: the file, its folder, or the prefix of an installation."""
    for path in (Path(given), Path(given) / SONAME, Path(given) / "lib" / SONAME):
        if path.is_file():
            return path
    raise BuildError(f"HETKV_UCX_LIBRARY={given}: there is no {SONAME}")


def _loaded() -> Path | None:
    """The `libucp` that another package loaded before hetkv: the dynamic linker gives that one to whoever asks."""
    try:
        ctypes.CDLL(SONAME, mode=os.RTLD_NOLOAD)
    except OSError:
        return None
    return _mapped()


def _mapped() -> Path | None:
    with open("/proc/self/maps") as maps:
        paths = (line.split(maxsplit=5)[5].strip() for line in maps if "/libucp.so" in line)
        return next((Path(path) for path in paths), None)


def has_rdma_devices() -> bool:
    """Whether this host has RDMA devices."""
    return RDMA_DEVICES.is_dir() and any(RDMA_DEVICES.iterdir())


def _candidates(rejected: list[str]) -> Iterator[tuple[Path, str]]:
    """What can be loaded, best first. Systems that do not qualify are explained in `rejected`."""
    system: list[Path] = []
    rdma = has_rdma_devices()
    if rdma:
        system = system_installations(rejected)
        yield from ((path, "system") for path in system if has_verbs(path))
    if wheel := _wheel():
        yield wheel, "wheel"
    yield from ((path, "system") for path in (system if rdma else system_installations(rejected)))


def _wheel() -> Path | None:
    spec = find_spec("libucx")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / "lib" / SONAME).is_file():
            return path
    return None


def system_installations(rejected: list[str]) -> list[Path]:
    """`libucp` of the system installations that are new enough, best first; the others are explained in `rejected`."""
    found: list[Path] = []
    for name in (SONAME, *(f"{prefix}/lib/{SONAME}" for prefix in SYSTEM_PREFIXES)):
        if "/" in name and not Path(name).is_file():
            continue
        command = [sys.executable, "-I", "-S", "-c", _INSPECT, name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.SubprocessError) as error:
            rejected.append(f"{name}: {error}")
            continue
        if done.returncode != 0:  # the linker's own name is not found: that is the usual case, and no news
            if "/" in name:
                rejected.append(f"{name}: {done.stderr.strip().splitlines()[-1]}")
            continue
        major, minor, release, path = done.stdout.strip().split(maxsplit=3)
        version = (int(major), int(minor), int(release))
        if _suffices(version):
            found.append(Path(path))
        else:
            rejected.append(f"{path} is {_text(version)}")
    return found


def _load(path: Path, origin: str) -> Ucx:
    try:
        for part in _PARTS:
            if (path.parent / part).is_file():
                ctypes.CDLL(str(path.parent / part))
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the UCX of {origin}, {path}, cannot be loaded: {error}") from None
    numbers = [ctypes.c_uint() for _ in range(3)]
    library.ucp_get_version(*map(ctypes.byref, numbers))
    version = (numbers[0].value, numbers[1].value, numbers[2].value)
    if not _suffices(version):
        raise BuildError(
            f"the UCX of {origin}, {path}, is {_text(version)}; hetkv needs {_text(MINIMUM)} or a newer {MINIMUM[0]}.x"
        )
    return Ucx(_mapped() or path, version, origin)


def _suffices(version: tuple[int, int, int]) -> bool:
    return version[0] == MINIMUM[0] and version[1] >= MINIMUM[1]


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
