"""Markdown: a page has every cell of the tables that a command prints, and nothing else."""

import pytest
from rich.table import Table

from dit_sparse.markdown import page


def test_tables_and_lines_come_in_their_order() -> None:
    table = Table("name", "a|b")
    table.add_column("ms", justify="right")
    table.add_row("one", "x|y", "1.5")
    table.add_row("two", "", "20")
    assert page("a result", ["before", table, "after"]) == (
        "# a result\n\nbefore\n\n"
        "| name | a\\|b | ms |\n| --- | --- | ---: |\n| one | x\\|y | 1.5 |\n| two |  | 20 |\n\n"
        "after\n"
    )


def test_anything_else_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a table or a line, got dict"):
        page("a result", [{}])
