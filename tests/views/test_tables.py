"""Tables in a terminal, and the lines that stand for them where it is too narrow."""

import io
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from headscope.views.terminal.console import console_for
from headscope.views.terminal.tables import print_table


def printed(table: Table, width: int, **options: Any) -> list[str]:
    file = io.StringIO()
    print_table(Console(file=file, width=width), table, **options)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def links_table() -> Table:
    table = Table("word", "looks at", "share", title="Links", caption="That was all.")
    table.add_row(
        "她", "苹果", "3.8\N{NO-BREAK SPACE}75\N{NO-BREAK SPACE}%  13.8\N{NO-BREAK SPACE}68\N{NO-BREAK SPACE}%"
    )
    table.add_row("", "不 [b]", "")
    table.add_row("it", "not listed:", "the rest")
    return table


def test_a_narrow_table_becomes_lines() -> None:
    assert printed(links_table(), 28, unnamed=["share"]) == [
        "Links",
        "她",
        "  · looks at 苹果, 3.8\N{NO-BREAK SPACE}75\N{NO-BREAK SPACE}%",
        "    13.8\N{NO-BREAK SPACE}68\N{NO-BREAK SPACE}%",
        "  · looks at 不 [b]",
        "it",
        "  · not listed: the rest",
        "That was all.",
    ]
    assert any("─" in line or "━" in line for line in printed(links_table(), 60))


@pytest.mark.parametrize("width", [50, 80, 110])
def test_a_table_that_would_be_cut_becomes_lines_at_any_width(width: int) -> None:
    table = Table("layer")
    for head in range(30):
        table.add_column(str(head), justify="right")
    table.add_row("decoder.layers.11", *[f"{head + 60}\N{NO-BREAK SPACE}%" for head in range(30)])
    lines = printed(table, width)
    assert "…" not in "".join(lines)
    words = " ".join(" ".join(lines).split())
    assert all(f"{head} {head + 60} %" in words for head in range(30))
    assert max(map(cell_len, lines)) <= width


@pytest.mark.parametrize(("columns", "width"), [("0", 80), ("1", 20), ("40", 40), ("", 80), ("500", 110), ("-5", 80)])
def test_a_console_is_never_without_width(columns: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert console_for(io.StringIO()).width == width
