"""The models that can be pulled, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from headscope.models.loading import ModelEntry
from headscope.views.terminal.console import console_for
from headscope.views.terminal.tables import print_table


def print_models(entries: Sequence[ModelEntry]) -> None:
    """The models that can be pulled, and which of them are here."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("name", "here", "size", "layers × heads", "licence"):
        table.add_column(name, no_wrap=name != "licence")
    for entry in entries:
        here = Text("yes", style="green") if entry.path else Text("no", style="dim")
        grid = f"{entry.layers} × {entry.heads}"
        table.add_row(entry.name, here, f"{entry.size / 1e6:.0f} MB", grid, entry.licence)
    console = console_for()
    print_table(console, table)
    for entry in entries:
        console.print(Text.assemble((entry.name, "bold"), f": {entry.description}."))
        console.print(Text(f"  from {entry.source}" + (f", in {entry.path}" if entry.path else "")), soft_wrap=True)
    if away := [entry.name for entry in entries if not entry.path]:
        console.print(Text(f"To fetch one: headscope pull {away[0]}"))
