"""A table in the terminal; where the terminal is too narrow for it, the same as lines."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

_NARROW = 50  # columns, below which no table is readable
_LONGEST = 12  # a longer word may be cut


def print_table(console: Console, table: Table, unnamed: Collection[str] = ()) -> None:
    """Print a table, or if it does not fit its lines: the first column, and below it each row's other cells.

    Args:
        console: Where to.
        table: The table. An empty cell in its first column stands for the one above.
        unnamed: Columns whose name is left out of the lines.
    """
    if console.width >= _NARROW and _width_needed(table) <= console.width:
        console.print(table)
        return
    if table.title:
        console.print(_text(table.title))
    rows = zip(*([_text(cell) for cell in column.cells] for column in table.columns), strict=True)
    names = [_text(column.header).plain for column in table.columns]
    for first, *cells in rows:
        if first.plain:
            first.stylize("bold")
            console.print(first)
        parts = list(_named(zip(names[1:], cells, strict=True), unnamed))
        for number, line in enumerate(_wrapped(Text(" ").join(parts), console.width - 4)):
            console.print(Text("    " if number else "  · ").append_text(line))
    if table.caption:
        console.print(_text(table.caption))


def _named(cells: Any, unnamed: Collection[str]) -> Iterator[Text]:
    """Each cell that is not empty, after its column's name; a comma behind all but the last."""
    filled = [(name, text) for name, text in cells if text.plain.strip()]
    for number, (name, text) in enumerate(filled):
        names_itself = name in unnamed or text.plain.endswith(":")
        part = Text() if names_itself else Text(f"{name} ", style="dim")
        text.rstrip()
        part.append_text(text)
        if number + 1 < len(filled) and not text.plain.endswith(":"):
            part.append(",")
        yield part


def _wrapped(text: Text, width: int) -> Iterator[Text]:
    """The text in lines that end at spaces; rich would end them at no-break spaces, too."""
    line = Text()
    for word in text.split(" "):
        if line.plain and line.cell_len + 1 + word.cell_len > width:
            yield line
            line = Text()
        line.append(" " if line.plain else "").append_text(word)
    if line.plain:
        yield line


def _text(cell: Any) -> Text:
    return cell.copy() if isinstance(cell, Text) else Text(str(cell))


def _width_needed(table: Table) -> int:
    """The columns of the terminal that the table needs so that nothing is cut but what may be cut."""
    count = len(table.columns)
    edges = 2 if table.pad_edge else 0
    return sum(map(_column_width, table.columns)) + 2 * count + (count - 1) + edges


def _column_width(column: Column) -> int:
    if column.width is not None:
        return column.width
    texts = [_text(cell).plain for cell in column.cells]
    header = max(map(cell_len, _text(column.header).plain.split()), default=0)
    if column.no_wrap or column.justify == "right":
        needed = max(map(cell_len, [*texts, _text(column.header).plain] if column.no_wrap else texts), default=0)
    else:
        words = [cell_len(word) for text in texts for word in text.split(" ")]
        needed = min(_LONGEST, max(words, default=0))
    needed = max(needed, min(header, _LONGEST), column.min_width or 0)
    return needed if column.max_width is None else min(needed, column.max_width)
