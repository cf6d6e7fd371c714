"""Names that a package imports when they are first used: each is there, and none is hidden by a module of its name."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec

import pytest

LAZY = ("hetkv", "hetkv.runtime")


@pytest.mark.parametrize("package", LAZY)
def test_no_module_has_the_name(package: str) -> None:
    """Importing `package.name` as a module would put the module where the name belongs."""
    names = [name for name in import_module(package).__all__ if not name.startswith("_")]
    hidden = [name for name in names if find_spec(f"{package}.{name}") is not None]
    assert not hidden


@pytest.mark.parametrize("package", LAZY)
def test_every_name_is_there(package: str) -> None:
    pytest.importorskip("torch", reason="the runtime's names need PyTorch")
    code = f"import {package} as p; [getattr(p, name) for name in p.__all__]; print(len(p.__all__))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) > 10
