"""Which of the backends' files is used: of CUDA's the newest that the driver runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tests" / "cpp" / "old_driver.cpp"
ASK = "from hetkv.transport.backends import backends; print(*backends()['cuda'][1:], sep='|')"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    if shutil.which("g++") is None:
        pytest.skip("g++ is needed")
    folder = tmp_path_factory.mktemp("built")
    for name, flags in (("old", []), ("good", ["-DDEVICES=3"])):
        target = folder / f"{name}.so"
        subprocess.run(["g++", "-std=c++17", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", *flags, str(SOURCE),
                        "-o", str(target)], check=True)  # fmt: skip
    (folder / "broken.so").write_text("not a library")
    return {name: folder / f"{name}.so" for name in ("old", "good", "broken")}


@pytest.mark.parametrize(("files", "devices", "why"), [
    ({}, 0, "this build has no cuda backend in"),
    ({"cuda13": "good"}, 3, ""),
    ({"cuda12": "good"}, 3, ""),
    ({"cuda13": "old", "cuda12": "good"}, 3, ""),
    ({"cuda13": "broken", "cuda12": "good"}, 3, ""),
    ({"cuda13": "old"}, 0, "cuda13: CUDA driver version is insufficient"),
    ({"cuda13": "old", "cuda12": "broken"}, 0, "version; cuda12: "),
])  # fmt: skip
def test_the_newest_that_works_is_used(
    files: dict[str, str], devices: int, why: str, built: dict[str, Path], tmp_path: Path
) -> None:
    for name, kind in files.items():
        shutil.copy(built[kind], tmp_path / f"libhetkv_{name}.so")
    environment = {**os.environ, "HETKV_BACKENDS": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=True)
    found = done.stdout.strip().split("|", 1)
    assert int(found[0]) == devices
    assert why in found[1]
    assert bool(found[1]) == (devices == 0)


def test_a_driver_that_takes_its_time_holds_up_no_other_thread(tmp_path: Path) -> None:
    """It may wait for the very thread that gives an event back."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is needed")
    sources = ["csrc/backend/gpu/status.cu", "tests/cpp/stock.cpp"]
    subprocess.run(["g++", "-std=c++17", "-pthread", "-DHETKV_EMULATED", "-Icsrc", "-Itests/cpp/emulated", "-x", "c++",
                    *sources, "-o", str(tmp_path / "stock")], cwd=ROOT, check=True)  # fmt: skip
    subprocess.run([tmp_path / "stock"], check=True, timeout=60)
