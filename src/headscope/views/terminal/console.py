"""Answers as tables in the terminal, and what is being done at the moment."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from headscope.models.loading import ModelEntry
from headscope.views.links import Link, Rest, View
from headscope.views.words import label
from headscope.watching.monitoring import HeadStats

__all__ = [
    "Stages",
    "print_error",
    "print_head_stats",
    "print_line",
    "print_models",
    "print_renderable",
    "print_stages",
    "print_view",
    "running",
    "width",
]

_WIDEST = 110


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Its reader has gone, as in ``headscope heads | head``: said to the command, which ends without a word."""
        raise BrokenPipeError


def _console(file: Any = None) -> Console:
    file = file or sys.stdout
    if hasattr(file, "reconfigure"):
        file.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    console = Console(file=file, highlight=False, soft_wrap=False)
    return _Console(file=file, highlight=False, width=min(console.width, _WIDEST))


def width() -> int:
    """How wide what is printed may be."""
    return _console().width


def print_renderable(what: Any) -> None:
    """A table or a text, as wide as the terminal but no wider than can be read."""
    _console().print(what)


def print_line(line: str, *, error: bool = False) -> None:
    """One line, not wrapped: a path stays whole."""
    file = sys.stderr if error else sys.stdout
    _console(file).print(Text(line), soft_wrap=True)


def print_error(message: str) -> None:
    """What went wrong, on the error stream."""
    console = _console(sys.stderr)
    console.print(Text.assemble(("Error: ", "bold red"), message), soft_wrap=not console.is_terminal)


def print_view(view: View, *, model: str, causal: bool, hints: bool = True) -> None:
    """The table of an answer, and how to read it.

    Args:
        view: The answer.
        model: The model's name.
        causal: Whether a word sees only those before it.
        hints: Whether to say what to try next.
    """
    console = _console()
    console.print(_heading(view, model, causal))
    if view.links:
        console.print(_table(view, console.width))
    for note in view.notes:
        console.print(Text(note, style="yellow"))
    console.print()
    console.print(_how_to_read(view))
    console.print(_proof_line(view))
    if hints and (tries := _hints(view, causal)):
        console.print(Text("Try, with the same text: ", style="bold").append(tries, style="not bold cyan"))


def _heading(view: View, model: str, causal: bool) -> Text:
    count = sum(view.heads)
    size = f"{len(view.heads)} layers × {view.heads[0]}" if len(set(view.heads)) == 1 else f"{len(view.heads)} layers"
    sees = "each word sees those before it" if causal else "each word sees all others"
    asked = ""
    if view.target is not None:
        sources = " or ".join(label(view.tokens, w) for w in view.sources)
        asked = f" Which heads link {sources or 'any word'} to {label(view.tokens, view.target)}?"
    if view.head is not None:
        asked += f" Head {view.head} alone."
    text = Text.assemble((model, "bold"), f": {size} = {count} heads; {sees}.", asked)
    if len(view.sources) == 1 and view.head is None and view.links and view.target is not None:
        text.append(f" {view.over} heads give it more than 10%, the strongest first:")
    return text


def _table(view: View, width: int) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), expand=False)
    table.add_column("word", style="bold", overflow="ellipsis", no_wrap=True, max_width=max(8, width // 5))
    table.add_column("looks at", style="bold cyan", overflow="ellipsis", no_wrap=True, max_width=max(8, width // 5))
    table.add_column("words away", no_wrap=True)
    table.add_column("share" if view.head else "heads (layer.head) and their share", ratio=None)
    if view.head is not None:
        table.add_column("special", justify="right")
        table.add_column("itself", justify="right")
    rests = {rest.source.start: rest for rest in view.rest}
    for start, links in groupby(view.links, key=lambda link: link.source.start):
        first = True
        for row in _by_pair(links):
            name = label(view.tokens, row[0].source) if first else ""
            cells: list[Any] = [Text(name), Text(label(view.tokens, row[0].target)), _away(row[0].words)]
            cells.append(_shares(row, view))
            if view.head is not None:
                cells += _rest_cells(rests.get(start), view) if first else ["", ""]
            table.add_row(*cells)
            first = False
        if view.head is None:
            if view.target is None and start in rests:
                table.add_row("", Text("set apart", style="not bold dim"), "", _rest_line(view, rests[start]))
            table.add_section()
    return table


def _by_pair(links: Iterable[Link]) -> list[list[Link]]:
    """The links of one word by what they lead to, the strongest first."""
    pairs: dict[int, list[Link]] = {}
    for link in links:
        pairs.setdefault(link.target.start, []).append(link)
    return list(pairs.values())


def _away(words: int) -> Text:
    return Text(f"{-words} back" if words < 0 else f"{words} ahead" if words else "itself", style="dim")


def _shares(row: Sequence[Link], view: View) -> Text:
    if view.head is not None:
        return Text(_percent(row[0].weight))
    text = Text()
    for i, link in enumerate(row):
        text.append("  " if i else "")
        text.append(f"{link.layer}.{link.head}\N{NO-BREAK SPACE}", style="green")
        text.append(_percent(link.weight))
    return text


def _rest_cells(rest: Rest | None, view: View) -> list[Any]:
    if rest is None or view.head is None:
        return ["", ""]
    at = (view.head.layer, view.head.head)
    return [Text(_percent(float(part[at])), style="dim") for part in (rest.special, rest.itself)]


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "<1%"


def _rest_line(view: View, rest: Rest) -> Text:
    special, itself = rest.special.nanmean().item(), rest.itself.nanmean().item()
    names = [p for p, s in zip(view.tokens.pieces, view.tokens.special, strict=True) if s]
    text = Text(style="dim")
    if names:
        text.append(f"{' '.join(dict.fromkeys(names))} {special:.0%}, ")
    return text.append(f"itself {itself:.0%} on average")


def _how_to_read(view: View) -> Text:
    if not view.links:
        return Text("No such link: every head gives it 0.")
    one = view.links[0]
    says = f"{one.layer}.{one.head} {_percent(one.weight)}" if view.head is None else _percent(one.weight)
    source, target = label(view.tokens, one.source), label(view.tokens, one.target)
    return Text.assemble(
        ("How to read it: ", "bold"),
        f"“{source} … {target} … {says}” means that in layer {one.layer}, head {one.head} (both counted from 0), "
        f"“{source}” takes {_percent(one.weight)} of what this head passes on from “{target}”. A head's shares for a "
        "word add up to 100%, together with what rests on special tokens and on the word itself.",
    )


def _proof_line(view: View) -> Text:
    if view.proof is None:
        return Text("Unproved: the model's own output could not be rebuilt from these weights.", style="yellow")
    return Text.assemble(
        ("Proof: ", "bold"),
        f"rebuilt to {view.proof:.0e}. These weights times the model's values match what its own attention returned.",
    )


def _hints(view: View, causal: bool) -> str:
    if not view.links:
        return ""
    first = [link for link in view.links if link.source == view.links[0].source]
    far = max(first, key=lambda link: (abs(link.words) > 1, link.weight))
    source, target = label(view.tokens, far.source), label(view.tokens, far.target)
    tries = []
    if view.head is None:
        tries.append(f"--head {far.layer}.{far.head}")
    if view.target is None and view.head is None:
        tries.append(f"--from {source} --to {target}")
    if view.target is not None or view.head is not None:
        tries.append(f"--from {source}")
    return "   ".join(tries)


@dataclass
class Stages:
    """What is being done, with a bar once it takes longer than a second, and how long each took."""

    shown: bool = True
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """A stage; its block may call what it is given with how much is done, and of how much."""
        console = _console(sys.stderr)
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

            def tell(done: int, of: int) -> None:
                progress.update(task, completed=done, total=of, description=f"{name} {done}/{of}")

            yield tell
        self.seconds[name] = time.monotonic() - began


@contextmanager
def running(name: str, *, shown: bool = True) -> Iterator[Callable[[int, int, str], None]]:
    """A bar, on the error stream, for what takes minutes; where that is no terminal, a line for each tenth.

    The block calls what it is given with how much is done, of how much, and a word about it.
    """
    console = _console(sys.stderr)
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

        def tell(done: int, of: int, word: str) -> None:
            progress.update(task, completed=done, total=of, word=word)
            if shown and not console.is_terminal and done * 10 // of > (done - 1) * 10 // of:
                print_line(f"{name}: {done}/{of} {word}", error=True)

        yield tell


def print_stages(stages: Stages, facts: dict[str, str]) -> None:
    """Times, memory and counts, on the error stream."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, value in facts.items():
        table.add_row(Text(name, style="dim"), Text(value))
    for name, seconds in stages.seconds.items():
        table.add_row(Text(name, style="dim"), Text(f"{seconds:.2f} s"))
    _console(sys.stderr).print(table)


def print_head_stats(stats: HeadStats) -> None:
    """What the heads of a model in training did at the last look: a row a layer, a column a head."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=f"Heads at step {stats.step}", title_justify="left")
    table.add_column("layer")
    for head in range(max(stats.num_heads)):
        table.add_column(str(head), justify="right")
    for _, group in groupby(stats.table(), key=lambda row: row["layer"]):
        rows = list(group)
        table.add_row(Text(rows[0]["site"]), *(Text(_head_state(row)) for row in rows))
    console = _console()
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


def print_models(entries: Sequence[ModelEntry]) -> None:
    """The models that can be pulled, and which of them are here."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("name", "here", "size", "layers × heads", "licence"):
        table.add_column(name, no_wrap=name != "licence")
    for entry in entries:
        here = Text("yes", style="green") if entry.path else Text("no", style="dim")
        grid = f"{entry.layers} × {entry.heads}"
        table.add_row(entry.name, here, f"{entry.size / 1e6:.0f} MB", grid, entry.licence)
    console = _console()
    console.print(table)
    for entry in entries:
        console.print(Text.assemble((entry.name, "bold"), f": {entry.description}."))
        console.print(Text(f"  from {entry.source}" + (f", in {entry.path}" if entry.path else "")), soft_wrap=True)
    if away := [entry.name for entry in entries if not entry.path]:
        console.print(Text(f"To fetch one: headscope pull {away[0]}"))
