"""The house: files of a readable size, packages that say what belongs in them, words of the field."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = (".py", ".pyi", ".cpp", ".h", ".cu", ".cuh", ".hip", ".c")
MOST_LINES = 420


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for name in listed.stdout.split() if (path := ROOT / name).is_file()]


def test_no_code_file_is_too_long() -> None:
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in tracked() if path.suffix in CODE}
    assert len(lines) > 400
    assert not {str(path.relative_to(ROOT)): count for path, count in lines.items() if count > MOST_LINES}


@pytest.mark.parametrize("path", tracked("hetkv/**/__init__.py"), ids=lambda path: path.parent.name)
def test_a_package_says_what_belongs_in_it_and_what_it_may_import(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert text
    assert len(text.splitlines()) <= 5
    assert re.search(r"\b(imports?|imported)\b", text, re.IGNORECASE)


REPLACED = {
    "apart": "separate",
    "behind": "after, past",
    "beside": "next to, in addition to, during",
    "lend|lends|lent": "grant",
    "lie|lies": "is, are",
    "programme|programmes": "program, milp",
    "reception|receptions": "RecvHandle, rx",
    "refuse|refused|refuses": "reject",
    "team|teams": "ParallelGroup, RankProcesses",
    "told": "reported, notified, known",
    "transmission|transmissions": "SendHandle, tx",
    "unlike": "different",
    "whence|thence|hence|thereof|wherein|whereby": "plain words",
}
"""Words that were replaced, or that a reader of this field's documents stumbles over, and what to write instead."""

ALLOWED = {
    "hetkv/kv/scale.py": ["apart"],  # the key of `separate` on the control channel
    "csrc/control/messages.cpp": ["apart"],
    "docs/control-channel.md": ["apart"],
}


def test_words_that_were_replaced_do_not_come_back() -> None:
    words = re.compile(rf"(?<![A-Za-z])(?<!Connection )({'|'.join(REPLACED)})(?![A-Za-z])", re.IGNORECASE)
    found = []
    for path in tracked(
        "*.py", "*.pyi", "*.md", "*.cpp", "*.h", "*.c", "*.cu", "*.toml", "*.yaml", "*.yml", "Makefile"
    ):
        name = str(path.relative_to(ROOT))
        if path != Path(__file__):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                hits = [word for word in words.findall(line) if word.lower() not in ALLOWED.get(name, [])]
                found += [f"{name}:{number}: {word}" for word in hits]
    assert not found, "\n" + "\n".join(found)


def test_options_of_pip_that_older_ones_do_not_have_are_not_used() -> None:
    """Debian 12 has pip 23.0, which knows `--config-settings` by its long name alone."""
    short = re.compile(r"[ \t\"=]-C ?(cmake|build|wheel|install|editable)\.")
    for path in tracked("Makefile", ".ci/*", "docker/*", "*.md", "*.yml"):
        found = short.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path.relative_to(ROOT)}: {found and found[0].strip()}"
