"""Tables that a narrow terminal wraps and does not cut: `WholeTables`."""

from __future__ import annotations

from rich.console import ConsoleRenderable, RenderHook
from rich.table import Table


class WholeTables(RenderHook):
    """A hook of a Rich console, whose tables by default end cells that do not fit with an ellipsis."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Called by Rich with what is about to be printed."""
        for table in renderables:
            if isinstance(table, Table):
                for column in table.columns:
                    column.no_wrap, column.overflow = False, "fold"
        return renderables
