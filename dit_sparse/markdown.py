"""Markdown: what a command prints for a person, as a page."""

from collections.abc import Iterable

from rich.table import Table


def page(title: str, printed: Iterable[object]) -> str:
    """A page of tables and lines; lines are paragraphs."""
    parts = (x if isinstance(x, str) else _table(x) for x in printed)
    return "\n\n".join((f"# {title}", *parts)) + "\n"


def _table(table: object) -> str:
    if not isinstance(table, Table):
        raise TypeError(f"expected a table or a line, got {type(table).__name__}")
    columns = table.columns
    lines = [
        [str(column.header) for column in columns],
        ["---:" if column.justify == "right" else "---" for column in columns],
        *zip(*(map(str, column.cells) for column in columns), strict=True),
    ]
    return "\n".join(map(_line, lines))


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
