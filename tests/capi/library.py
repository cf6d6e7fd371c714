"""The C library as the tests find it: next to the extension, as a build or a wheel has put it there."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from hetkv.core import core

ROOT = Path(__file__).parents[2]
PACKAGE = Path(core.__file__).parent
LIBRARY = PACKAGE / "lib" / "libhetkv.so.0"


@cache
def library() -> Any:
    """Loaded; skips where this build has none."""
    if not LIBRARY.exists():
        pytest.skip("this build has no C library: libsodium (libsodium-dev) or msgpack-cxx was missing")
    return ctypes.CDLL(str(LIBRARY))


@cache
def program(folder: Path) -> Path:
    """examples/c/transfer.c, compiled as C11 with warnings as errors."""
    library()
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    target = folder / "transfer"
    flags = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{PACKAGE / 'include'}"]
    source = ROOT / "examples" / "c" / "transfer.c"
    link = [str(LIBRARY), f"-Wl,-rpath,{LIBRARY.parent}", "-o", str(target)]
    subprocess.run(["cc", *flags, str(source), *link], check=True)
    return target


@cache
def rules() -> Any:
    """csrc/control without the rest of the library, and tests/cpp/agree.cpp, compiled once for these sources."""
    found = importlib.util.find_spec("msgpack_cxx")
    if found is None or found.origin is None:
        pytest.skip("the headers of msgpack-cxx are not installed")
    sources = [f"csrc/control/{name}.cpp" for name in ("agreement", "conversion", "messages", "messages_encode")]
    sources += ["csrc/control/model.cpp", "csrc/control/routes.cpp", "csrc/wire/utf8.cpp", "tests/cpp/agree.cpp"]
    used = [ROOT / "tests" / "cpp" / "agree.cpp", *ROOT.glob("csrc/control/*"), *ROOT.glob("csrc/*.h")]
    target = ROOT / "build" / "agree" / "libagree.so"
    if not target.exists() or target.stat().st_mtime < max(path.stat().st_mtime for path in used):
        target.parent.mkdir(parents=True, exist_ok=True)
        made = target.with_suffix(f".{os.getpid()}")
        flags = [
            "-std=c++17",
            "-O1",
            "-fPIC",
            "-shared",
            "-Icsrc",
            "-isystem",
            str(Path(found.origin).parent / "include"),
        ]
        subprocess.run([os.environ.get("CXX", "c++"), *flags, *sources, "-o", str(made)], cwd=ROOT, check=True)
        made.rename(target)
    return ctypes.CDLL(str(target))


def agree(mine: bytes, theirs: bytes) -> dict[str, Any]:
    """What the library's rules say of two encoded descriptions."""
    room = 1 << 20
    out = ctypes.create_string_buffer(room)
    function = rules().agree
    function.restype = ctypes.c_size_t
    size = function(mine, ctypes.c_size_t(len(mine)), theirs, ctypes.c_size_t(len(theirs)), out, ctypes.c_size_t(room))
    assert size <= room
    found: dict[str, Any] = json.loads(out.raw[:size], strict=False)
    return found


def environment(secret: Path) -> dict[str, str]:
    """With a secret of its own."""
    secret.write_text("a secret of the C library's tests")
    secret.chmod(0o600)
    return {**os.environ, "HETKV_SECRET_FILE": str(secret)}
