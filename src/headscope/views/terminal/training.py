"""What the heads of a model in training do, as a table."""

from __future__ import annotations

import math
from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from headscope.views.terminal.console import console_for
from headscope.watching.monitoring import HeadStats

__all__ = ["print_head_stats"]


def print_head_stats(stats: HeadStats) -> None:
    """What the heads of a model in training did at the last look: a row a layer, a column a head."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=f"Heads at step {stats.step}", title_justify="left")
    table.add_column("layer")
    for head in range(max(stats.num_heads)):
        table.add_column(str(head), justify="right")
    for _, group in groupby(stats.table(), key=lambda row: row["layer"]):
        rows = list(group)
        table.add_row(Text(rows[0]["site"]), *(Text(_head_state(row)) for row in rows))
    console = console_for()
    console.print(table)
    console.print(
        Text("Entropy, as a share of what looking evenly would have: 0% looks at one place, 100% at all alike.")
    )


def _head_state(row: dict[str, Any]) -> str:
    """One head of HeadStats.table() in a word."""
    if not row["finite"]:
        return "not finite"
    if row["dead"]:
        return "dead"
    return "–" if math.isnan(row["entropy_share"]) else f"{row['entropy_share']:.0%}"
