"""One tiny checkpoint and one server for all tests that do not end it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.serving import QUICK, Serving, save_checkpoint, serving


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Its directory, and the model in `transformers`."""
    path = tmp_path_factory.mktemp("checkpoint")
    return path, save_checkpoint(path)


@pytest.fixture(scope="session")
def server(checkpoint: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """One prefill and two decode instances."""
    options = ["--model", str(checkpoint[0]), "--served-name", "tiny", "--port", "0", "--decode", "2xTP1", *QUICK]
    log = tmp_path_factory.mktemp("server") / "log"
    options += ["--prefill", "TP1", "--max-requests", "40", "--max-body", "200000", "--steps", str(log.parent)]
    with serving(log, options) as server:
        yield server
