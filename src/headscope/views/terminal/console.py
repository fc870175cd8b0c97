"""The terminal itself: its width, lines, errors and progress bars."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from headscope.views.terminal.tables import print_table

_WIDEST = 110
_NARROWEST = 20


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError where the reader has gone, as in ``headscope heads | head``: the command then ends."""
        raise BrokenPipeError


def console_for(file: Any = None) -> Console:
    """A console no wider than can be read; a character that the terminal cannot show becomes "?"."""
    file = file or sys.stdout
    if hasattr(file, "reconfigure"):
        file.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    console = Console(file=file, highlight=False, soft_wrap=False)
    columns = console.width or shutil.get_terminal_size().columns  # COLUMNS=0, as in shells of Emacs, says nothing
    return _Console(file=file, highlight=False, width=max(_NARROWEST, min(columns, _WIDEST)))


def width() -> int:
    """The widest line that may be printed, in characters."""
    return console_for().width


def print_renderable(what: Any, unnamed: Collection[str] = ()) -> None:
    """A table or a text, as wide as the terminal but no wider than can be read.

    ``unnamed``: columns of a table whose name is left out where the table becomes lines.
    """
    if isinstance(what, Table):
        print_table(console_for(), what, unnamed)
    else:
        console_for().print(what)


def print_line(line: str, *, error: bool = False) -> None:
    """One line, not wrapped: a path stays whole."""
    file = sys.stderr if error else sys.stdout
    console_for(file).print(Text(line), soft_wrap=True)


def print_error(message: str) -> None:
    """An error message, on the error stream."""
    console = console_for(sys.stderr)
    console.print(Text.assemble(("Error: ", "bold red"), message), soft_wrap=not console.is_terminal)


@dataclass
class Stages:
    """The stages of a command, each with a progress bar, and how long each took."""

    shown: bool = True
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """A stage; gives its block a function to call with how much is done, and of how much."""
        console = console_for(sys.stderr)
        began = time.monotonic()
        progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not (self.shown and console.is_terminal),
        )
        with progress:
            task = progress.add_task(name, total=None)

            def on_progress(done: int, of: int) -> None:
                progress.update(task, completed=done, total=of, description=f"{name} {done}/{of}")

            yield on_progress
        self.seconds[name] = time.monotonic() - began


@contextmanager
def running(name: str, *, shown: bool = True) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on the error stream for what takes minutes; where that is no terminal, a line for each tenth.

    Gives its block a function to call with how much is done, of how much, and a few words about it.
    """
    console = console_for(sys.stderr)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total} {task.fields[word]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (shown and console.is_terminal),
    )
    with progress:
        task = progress.add_task(name, total=None, word="")

        def on_progress(done: int, of: int, word: str) -> None:
            progress.update(task, completed=done, total=of, word=word)
            if shown and not console.is_terminal and done * 10 // of > (done - 1) * 10 // of:
                print_line(f"{name}: {done}/{of} {word}", error=True)

        yield on_progress


def print_stages(stages: Stages, facts: dict[str, str]) -> None:
    """Times, memory and counts, on the error stream."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, value in facts.items():
        table.add_row(Text(name, style="dim"), Text(value))
    for name, seconds in stages.seconds.items():
        table.add_row(Text(name, style="dim"), Text(f"{seconds:.2f} s"))
    console_for(sys.stderr).print(table)
