"""Documents name only what exists, and say what the code says."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

import hetkv
from hetkv import errors

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(  # a change log names what was there
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    if name != "CHANGELOG.md"
)
FOLDERS = r"hetkv|csrc|bindings|bench|tests|docs|examples|cmake|include|\.ci|\.github"
PATH = re.compile(rf"`((?:{FOLDERS})/[A-Za-z0-9_./-]+)`")
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_and_links_exist(document: Path) -> None:
    text = document.read_text()
    missing = [name for name in PATH.findall(text) if not (ROOT / name).exists()]
    missing += [name for name in LINK.findall(text) if not (document.parent / name).exists()]
    assert not missing


def test_every_error_has_its_advice() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    names = [n for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, errors.HetkvError)]
    assert not [name for name in names if f"`{name}`" not in text]


def test_every_public_name_is_in_the_api_reference() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    names = [name for name in hetkv.__all__ if not name.startswith("_") and name != "HetkvError"]
    assert not [name for name in names if f"::: hetkv.{name}\n" not in text]


def test_every_exception_is_in_errors() -> None:
    """What a module catches itself may be its own, under a name with `_`."""
    elsewhere = []
    for file in sorted((ROOT / "hetkv").rglob("*.py")):
        classes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ClassDef)]
        bases = {node.name: [ast.unparse(base).rpartition(".")[2] for base in node.bases] for node in classes}
        elsewhere += [
            f"{file.relative_to(ROOT)}: {name}"
            for name, above in bases.items()
            if any(re.search(r"(Error|Exception)$", base) for base in above)
            and not name.startswith("_")
            and file != ROOT / "hetkv" / "errors.py"
        ]
    assert not elsewhere


def test_every_environment_variable_is_listed() -> None:
    text = (ROOT / "docs" / "environment.md").read_text()
    used: set[str] = set()
    for folder in ("hetkv", "cmake", "csrc"):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".cpp", ".h", ".cu"):
                used |= set(re.findall(r'(?:environ|getenv|get)[^"\n]*"(HETKV_[A-Z_]+)"', file.read_text()))
    assert used
    assert not [name for name in sorted(used) if f"`{name}`" not in text]


@pytest.mark.parametrize(
    ("name", "where_it_ends"),
    [("data-path.md", "hetkv/transport/receiver.py"), ("capacity-path.md", "hetkv/planner/columns.py")],
)
def test_a_tour_is_seven_files_with_the_functions_it_names(name: str, where_it_ends: str) -> None:
    text = (ROOT / "docs" / name).read_text()
    tour = text[text.index("## Seven files") :]
    steps = re.findall(r"^\d+\. `([^`]+)`:(.*?)(?=^\d+\. |\Z|^$)", tour, re.S | re.M)
    assert len(steps) == 7
    assert len({file for file, _ in steps}) == 7
    sources = {file: (ROOT / file).read_text() for file, _ in steps}
    also = {file for _, body in steps for file in PATH.findall(body) if file.endswith((".py", ".cpp", ".h"))}
    also.add(where_it_ends)
    every = [*sources.values(), *((ROOT / file).read_text() for file in also)]
    for file, body in steps:
        for function in re.findall(r"`(?:\w+\.)?(\w+)\(\)`", body):
            assert any(f"{function}(" in source for source in every), (file, function)
        first = re.search(r"`(?:\w+\.)?(\w+)\(\)`", body)
        assert first is not None
        assert f"{first[1]}(" in sources[file]
