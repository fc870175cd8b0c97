"""The answer to a question about a text as a table: which word looks at which, in which head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from headscope.views.links import Link, Rest, View
from headscope.views.terminal.console import console_for
from headscope.views.words import label

__all__ = ["print_view"]


def print_view(view: View, *, model: str, causal: bool, hints: bool = True) -> None:
    """The table of an answer, and how to read it.

    Args:
        view: The answer.
        model: The model's name.
        causal: Whether a word sees only those before it.
        hints: Whether to say what to try next.
    """
    console = console_for()
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
