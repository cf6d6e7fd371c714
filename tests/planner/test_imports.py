"""costmodel < simulator < planner: no package imports one above it, and no module imports itself by way of others."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = ("models", "costmodel", "simulator", "planner")


def imports() -> dict[str, set[str]]:
    """Each module of the floors to those that it imports anywhere, in functions and for type checkers too."""
    files = {}
    for floor in FLOORS:
        for file in (ROOT / "hetkv" / floor).rglob("*.py"):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            files[name.removesuffix(".__init__")] = file
    found: dict[str, set[str]] = {}
    for name, file in files.items():
        own = found[name] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                own |= {m for m in (node.module, *(f"{node.module}.{a.name}" for a in node.names)) if m in files}
            elif isinstance(node, ast.Import):
                own |= {a.name for a in node.names if a.name in files}
        if any(f"{name}." in m for m in own):  # a package that gathers names of its modules
            found[name] = {m for m in own if not m.startswith(f"{name}.")}
    return found


def test_no_floor_imports_one_above_it() -> None:
    level = {f"hetkv.{floor}": i for i, floor in enumerate(FLOORS)}
    for name, own in imports().items():
        for other in own:
            assert level[".".join(other.split(".")[:2])] <= level[".".join(name.split(".")[:2])], f"{name}: {other}"


@pytest.mark.parametrize("floor", ["simulator", "planner"])
def test_no_module_imports_itself_by_way_of_others(floor: str) -> None:
    graph = {k: v for k, v in imports().items() if k.startswith(f"hetkv.{floor}")}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(graph.get(name, ())):
                if other in graph:
                    visit(other, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())
