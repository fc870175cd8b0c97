"""What the heads of a model in training do, as a table."""

from __future__ import annotations

import math
from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from headscope.views.terminal.console import console_for
from headscope.views.terminal.tables import print_table
from headscope.views.words import percent
from headscope.watching.monitoring import HeadStats


def print_head_stats(stats: HeadStats) -> None:
    """The heads of a model in training at the last measurement: a row per layer, a column per head."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=f"Heads at step {stats.step}", title_justify="left")
    table.add_column("layer")
    for head in range(max(stats.num_heads)):
        table.add_column(str(head), justify="right")
    for _, group in groupby(stats.table(), key=lambda row: row["layer"]):
        rows = list(group)
        table.add_row(Text(rows[0]["site"]), *(Text(_head_state(row)) for row in rows))
    console = console_for()
    print_table(console, table)
    console.print(
        Text(
            f"Entropy, as a share of that of uniform attention: {percent(0)} is all on one position, {percent(1)} is "
            "the same on every position."
        )
    )


def _head_state(row: dict[str, Any]) -> str:
    """One head of HeadStats.table() in a word."""
    if not row["finite"]:
        return "not finite"
    if row["dead"]:
        return "dead"
    return "–" if math.isnan(row["entropy_share"]) else percent(row["entropy_share"])
