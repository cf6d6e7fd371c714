"""The C library as the tests find it: next to the extension, as a build or a wheel has put it there."""

from __future__ import annotations

import ctypes
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


def agree(mine: bytes, theirs: bytes) -> dict[str, Any]:
    """What the library's rules say of two encoded descriptions."""
    room = 1 << 20
    out = ctypes.create_string_buffer(room)
    function = library().hetkv_test_agree
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
