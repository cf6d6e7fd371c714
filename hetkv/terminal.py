"""What commands print and write: a console that cuts no table, and `--json FILE`, where `-` is standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetkv.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

PICTURES = (".png", ".svg", ".pdf")
"""Formats of pictures, by the ending of the file's name."""

WIDTH = 140
"""Columns of what is printed to anything but a terminal."""


def console(json_file: object = None) -> Console:
    """Where tables go: standard output, or standard error where the JSON goes to standard output."""
    from rich.console import Console

    from hetkv.whole_tables import WholeTables

    stderr = str(json_file) == "-"
    found = Console(stderr=stderr, highlight=False)
    if not found.is_terminal:
        found = Console(stderr=stderr, highlight=False, width=WIDTH)
    found.push_render_hook(WholeTables())
    return found


def progress(text: str) -> AbstractContextManager[object]:
    """What is going on, on standard error: a spinner on a terminal, one line elsewhere."""
    from rich.console import Console

    errors = Console(stderr=True, highlight=False)
    if errors.is_terminal:
        return errors.status(text)
    errors.print(f"{text} ...")
    return nullcontext()


def write_json(file: str | Path, facts: Any) -> None:
    """Write `facts` as JSON to `file`, or to standard output for `-`. An infinite number is an error, not JSON."""
    write_text(file, json.dumps(facts, indent=2, allow_nan=False) + "\n")


def write_text(file: str | Path, text: str) -> None:
    """Write to `file`, or to standard output for `-`."""
    if str(file) == "-":
        sys.stdout.write(text)
    else:
        Path(file).write_text(text, encoding="utf-8")


def check_outputs(files: Mapping[str, str | Path | None]) -> None:
    """Raise `InputError` for an output (by option name) that cannot be written: before the work, not after it."""
    for name, file in files.items():
        if file is None:
            continue
        if str(file) == "-":
            if name != "json":
                raise InputError(f"--{name} -: give a file; only --json writes to standard output")
            continue
        if Path(file).is_dir():
            raise InputError(f"--{name} {file}: a folder, where a file is written")
        if not Path(file).absolute().parent.is_dir():
            raise InputError(f"--{name} {file}: there is no folder {Path(file).parent}")
        if name in ("plot", "trace-plot") and Path(file).suffix.lower() not in PICTURES:
            raise InputError(f"--{name} {file}: the file name must end in {', '.join(PICTURES)}")
