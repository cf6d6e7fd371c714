"""Every command without the extras: its help, and one line that says what to install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hetkv.cli import COMMANDS, EXTRAS

BENCHES = ("remap", "overlap", "transfer")
BROUGHT = sorted({module for command in COMMANDS.values() for module in command.modules} | set(EXTRAS))

# The finder that stands for an environment without the extras: `find_spec` and `import` see none of their modules.
WITHOUT = f"""
import sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {BROUGHT!r} else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
from hetkv.cli import main
sys.exit(main(sys.argv[1:]))
"""


def hetkv(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, *arguments], capture_output=True, text=True, timeout=120, cwd=cwd
    )


@pytest.mark.parametrize("words", [(), *((name,) for name in COMMANDS), *(("bench", name) for name in BENCHES)])
def test_help(words: tuple[str, ...]) -> None:
    done = hetkv(*words, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: hetkv")


@pytest.mark.parametrize("words", [
    ("demo",), ("probe",), ("bench", "remap"), ("bench", "transfer"), ("bench", "overlap"), ("plan", "--problem", "x"),
    ("simulate", "--plan", "x"), ("calibrate", "--csv", "x"), ("proxy", "--prefill", "x", "--decode", "y"),
    ("serve",), ("loadtest", "--rate", "1"),
], ids=" ".join)  # fmt: skip
def test_one_line_names_the_extra(words: tuple[str, ...]) -> None:
    done = hetkv(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    extra = COMMANDS[words[0]].extra
    assert line.startswith(f"hetkv {words[0]}: ")
    assert line.endswith(f'not installed: pip install "hetkv[{extra}]"')


def test_import_takes_no_extra_no_numpy_and_no_time() -> None:
    code = """
import sys, time
began = time.process_time()
import hetkv
took = time.process_time() - began
assert not {"numpy", "torch", "hetkv._core", "msgspec"} & set(sys.modules), "imported too much"
print(took)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.05
