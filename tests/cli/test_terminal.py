"""What commands print: no table loses anything, however narrow the terminal."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("rich")

from rich.table import Table

from hetkv import terminal


@pytest.mark.parametrize("columns", [80, 40])
def test_no_cell_is_cut(columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every character of every cell is there, in the order of its column, on a terminal of that width."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, as Rich sees it
    monkeypatch.delenv("NO_COLOR", raising=False)
    cells = ["prefill-0/0", "H100-SXM/vllm/0.32/bfloat16/" + "x" * 60, "layers 0-79", "1,234,567,890", "y" * 30]
    table = Table(*map(str, range(len(cells))))
    for column in table.columns:
        column.no_wrap = True
    table.add_row(*cells)
    console = terminal.console()
    assert console.is_terminal
    console.print(table)
    printed = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in capsys.readouterr().out.splitlines()]
    assert all(len(line) <= columns for line in printed)
    rows = [line.split("│")[1:-1] for line in printed if line.startswith("│")]
    assert ["".join(parts).replace(" ", "") for parts in zip(*rows, strict=True)] == [c.replace(" ", "") for c in cells]
