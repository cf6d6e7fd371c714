"""Which UCX is loaded: by choice, from the wheel, from the system, and what is said where none will do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hetkv import ucx as library

ucx = library.load()
FOLDER = ucx.path.resolve().parent
PRINT = (
    "from hetkv import ucx as library; from hetkv.core import core; "
    "ucx = library.load(); core.load_ucx(str(ucx.path)); print(ucx.origin, ucx.path)"
)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HETKV_", "UCX_"))}
    return subprocess.run(
        [sys.executable, "-c", code], env={**clean, **environment}, capture_output=True, text=True, timeout=60
    )


def with_search(code: str, prefixes: list[Path] | None = None, rdma: Path | None = None, wheel: bool = True) -> str:
    """`code` where system installations, RDMA devices and the wheel are what the test says."""
    lines = ["from pathlib import Path", "from hetkv import ucx"]
    lines.append(f"ucx.SYSTEM_PREFIXES = {[str(p) for p in prefixes or []]!r}")
    if rdma is not None:
        lines.append(f"ucx.RDMA_DEVICES = Path({str(rdma)!r})")
    if not wheel:
        lines.append("ucx._wheel = lambda: None")
    return "\n".join([*lines, code])


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """An installation of the UCX under test in a folder of its own, with verbs by the name of a module."""
    target = tmp_path / "ucx"
    shutil.copytree(FOLDER, target / "lib", symlinks=True, ignore=shutil.ignore_patterns("*.a", "*.la", "cmake"))
    (target / "lib" / "ucx").mkdir(exist_ok=True)
    (target / "lib" / "ucx" / "libuct_ib.so.0").touch()
    return target


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A library that says it is UCX 1.13.1."""
    compiler = shutil.which("cc") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path / "old" / "lib"
    folder.mkdir(parents=True)
    source = folder / "old.c"
    source.write_text("void ucp_get_version(unsigned* a, unsigned* b, unsigned* c) { *a = 1; *b = 13; *c = 1; }\n")
    subprocess.run([compiler, "-x", "c", "-shared", "-fPIC", "-Wl,-soname,libucp.so.0", "-o", folder / "libucp.so.0",
                    source], check=True, timeout=60)  # fmt: skip
    return folder.parent


@pytest.mark.parametrize("tail", ["lib/libucp.so.0", "lib", ""])
def test_the_named_one_is_loaded(prefix: Path, tail: str) -> None:
    done = run(PRINT, HETKV_UCX_LIBRARY=str(prefix / tail))
    assert done.stdout.split()[:1] == ["HETKV_UCX_LIBRARY"], done.stderr
    assert str(prefix) in done.stdout


def test_a_named_one_that_is_not_there(tmp_path: Path) -> None:
    done = run(PRINT, HETKV_UCX_LIBRARY=str(tmp_path))
    assert f"BuildError: HETKV_UCX_LIBRARY={tmp_path}: there is no libucp.so.0" in done.stderr


def test_a_named_one_that_is_too_old(old: Path) -> None:
    done = run(PRINT, HETKV_UCX_LIBRARY=str(old))
    assert "is 1.13.1; hetkv needs 1.18 or a newer 1.x" in done.stderr
    assert str(old) in done.stderr


def test_the_wheel_goes_before_the_system(prefix: Path) -> None:
    if ucx.origin != "wheel":
        pytest.skip(f"this environment uses the UCX of {ucx.origin}")
    done = run(with_search(PRINT, [prefix], rdma=prefix / "no-devices"))
    assert done.stdout.split()[:1] == ["wheel"], done.stderr


def test_with_rdma_devices_a_system_with_verbs_goes_first(prefix: Path, tmp_path: Path) -> None:
    (tmp_path / "infiniband" / "mlx5_0").mkdir(parents=True)
    code = with_search(PRINT + "; assert ucx.has_verbs", [prefix], rdma=tmp_path / "infiniband")
    done = run(code)
    assert done.stdout.split() == ["system", str(prefix / "lib" / os.path.basename(ucx.path.resolve()))], done.stderr


def test_a_system_without_verbs_does_not(prefix: Path, tmp_path: Path) -> None:
    (tmp_path / "infiniband" / "mlx5_0").mkdir(parents=True)
    (prefix / "lib" / "ucx" / "libuct_ib.so.0").unlink()
    if ucx.origin == "wheel":
        done = run(with_search(PRINT, [prefix], rdma=tmp_path / "infiniband"))
        assert done.stdout.split()[:1] == ["wheel"], done.stderr


def test_without_a_wheel_the_system_is_used(prefix: Path, old: Path) -> None:
    done = run(with_search(PRINT, [old, prefix], wheel=False))
    assert done.stdout.split()[:1] == ["system"], done.stderr
    assert str(prefix) in done.stdout


def test_none_at_all_says_what_to_install(old: Path) -> None:
    done = run(with_search(PRINT, [old], wheel=False))
    last = done.stderr.strip().splitlines()[-1]
    assert "no UCX 1.18 or newer is installed" in last
    assert f"{old / 'lib' / 'libucp.so.0'} is 1.13.1" in last
    assert "pip install libucx-cu13" in last


def test_one_that_the_process_has_loaded_is_used(prefix: Path) -> None:
    first = f"import ctypes; [ctypes.CDLL('{prefix}/lib/' + n) for n in ('libucs.so.0', 'libuct.so.0', 'libucp.so.0')]"
    done = run(f"{first}\n{PRINT}")
    assert done.stdout.split()[:1] == ["process"], done.stderr
    assert str(prefix) in done.stdout


def test_the_environment_is_left_as_it_was() -> None:
    code = "import os; before = dict(os.environ); from hetkv import ucx; ucx.load(); assert dict(os.environ) == before"
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_nothing_needs_one_but_rdma() -> None:
    """A transfer without a UCX in the environment, and in the process."""
    code = """
from hetkv import KVPool, KVSpec, Receiver, Sender
spec = KVSpec.uniform(num_layers=2, num_kv_heads=1, head_dim=8)
pools = [KVPool.allocate(spec, 4, layout="nhd", block_size=4, dtype="bf16") for _ in range(2)]
with Sender(pools[0], secret=b"0123456789abcdef", instance="p") as tx, \
        Receiver(pools[1], secret=b"0123456789abcdef", instance="d") as rx:
    rx.connect(tx.listen())
    sent, got = tx.send("r", [2, 3], 8), rx.receive("r", [0, 1], 8)
    sent.send_layers()
    sent.wait(20), got.wait(20)
assert "libuc" not in open("/proc/self/maps").read()
"""
    done = run(with_search(code, wheel=False))
    assert done.returncode == 0, done.stderr
