"""The links of a text as a table: which word looks at which, in which head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from headscope.views.links import Link, TextLinks, Unlisted
from headscope.views.terminal.console import console_for
from headscope.views.terminal.tables import print_table
from headscope.views.words import label, percent, quote, shown_name, start_token

_HEADS = "heads (layer.head) and their share"


def print_links(
    view: TextLinks, *, model: str, causal: bool, command: Callable[[str], str] = "headscope see {}".format
) -> None:
    """The table of a text's links, and how to read it.

    Args:
        view: The links.
        model: The model's name.
        causal: Whether a word sees only those before it.
        command: Gives the whole command that shows the same text with these options, for the hints.
    """
    console = console_for()
    console.print(_heading(view, model, causal))
    for note in view.notes:
        console.print(Text(note, style="yellow"))
    if view.links:
        print_table(console, _table(view, console.width), unnamed=("words away", "share", _HEADS))
    console.print()
    console.print(_how_to_read(view))
    console.print(_check_line(view))
    for number, options in enumerate(_hints(view)):
        start = Text("     " if number else "Try: ", style="bold")
        console.print(start.append(command(options), style="not bold cyan"), soft_wrap=True)


def _heading(view: TextLinks, model: str, causal: bool) -> Text:
    count = sum(view.heads)
    size = f"{len(view.heads)} layers × {view.heads[0]}" if len(set(view.heads)) == 1 else f"{len(view.heads)} layers"
    sees = "each word sees those before it" if causal else "each word sees all others"
    selection = ""
    if view.target is not None:
        sources = " or ".join(shown_name(view.tokens, word) for word in view.sources)
        selection = f" Which heads link {sources or 'any word'} to {shown_name(view.tokens, view.target)}?"
    if view.head is not None:
        selection += f" Head {view.head} only."
    text = Text.assemble((model, "bold"), f": {size} = {count} heads; {sees}; {start_token(view.tokens)}.", selection)
    if len(view.sources) == 1 and view.head is None and view.links and view.target is not None:
        text.append(f" {view.heads_above_tenth} heads give it more than {percent(0.1)}, the strongest first:")
    return text


def _table(view: TextLinks, width: int) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), expand=False)
    table.add_column("word", style="bold", overflow="ellipsis", no_wrap=True, max_width=max(8, width // 5))
    table.add_column("looks at", style="bold cyan", overflow="ellipsis", no_wrap=True, max_width=max(8, width // 5))
    table.add_column("words away", no_wrap=True)
    table.add_column("share" if view.head else _HEADS, ratio=None)
    if view.head is not None:
        table.add_column("special", justify="right")
        table.add_column("itself", justify="right")
    unlisted = {part.source.start: part for part in view.unlisted}
    for start, links in groupby(view.links, key=lambda link: link.source.start):
        first = True
        for row in _by_pair(links):
            name = shown_name(view.tokens, row[0].source) if first else ""
            cells: list[Any] = [Text(name), Text(shown_name(view.tokens, row[0].target)), _away(row[0].word_distance)]
            cells.append(_shares(row, view))
            if view.head is not None:
                cells += _unlisted_cells(unlisted.get(start), view) if first else ["", ""]
            table.add_row(*cells)
            first = False
        if view.head is None:
            if view.target is None and start in unlisted:
                line = Text(_unlisted_line(view, unlisted[start]), style="dim")
                table.add_row("", Text("not listed:", style="not bold dim"), "", line)
            table.add_section()
    return table


def _by_pair(links: Iterable[Link]) -> list[list[Link]]:
    """The links of one word, grouped by their target, the strongest first."""
    pairs: dict[int, list[Link]] = {}
    for link in links:
        pairs.setdefault(link.target.start, []).append(link)
    return list(pairs.values())


def _away(words: int) -> Text:
    return Text(f"{-words} back" if words < 0 else f"{words} ahead" if words else "itself", style="dim")


def _shares(row: Sequence[Link], view: TextLinks) -> Text:
    if view.head is not None:
        return Text(_share(row[0].weight))
    text = Text()
    for i, link in enumerate(row):
        text.append("  " if i else "")
        text.append(f"{link.layer}.{link.head}\N{NO-BREAK SPACE}", style="green")
        text.append(_share(link.weight))
    return text


def _unlisted_cells(part: Unlisted | None, view: TextLinks) -> list[Any]:
    if part is None or view.head is None:
        return ["", ""]
    at = (view.head.layer, view.head.head)
    return [Text(_share(float(shares[at])), style="dim") for shares in (part.special, part.itself)]


def _share(weight: float) -> str:
    return percent(weight) if weight >= 0.01 else f"<{percent(0.01)}"


def _unlisted_line(view: TextLinks, part: Unlisted) -> str:
    names = [piece for piece, special in zip(view.tokens.pieces, view.tokens.special, strict=True) if special]
    alone = len(names) == 1 and view.tokens.special[0]
    special = f"{'start token' if alone else ' '.join(dict.fromkeys(names))} {percent(part.special.nanmean().item())}, "
    itself = f"the word itself {percent(part.itself.nanmean().item())}"
    return f"{special if names else ''}{itself} (mean of all {sum(view.heads)} heads)"


def _how_to_read(view: TextLinks) -> Text:
    if not view.links:
        return Text("No such link: every head gives it 0.")
    link = view.links[0]
    share = _share(link.weight)
    cell = f"{link.layer}.{link.head} {share}" if view.head is None else share
    source, target = shown_name(view.tokens, link.source), shown_name(view.tokens, link.target)
    return Text.assemble(
        ("How to read it: ", "bold"),
        f"“{source} … {target} … {cell}” is about layer {link.layer}, head {link.head} (both counted from 0). For "
        f"“{source}”, this head puts {share} of its attention on “{target}”. A head's shares for a word add up to "
        f"{percent(1)}, together with the shares that are not listed.",
    )


def _check_line(view: TextLinks) -> Text:
    if view.proof is None:
        return Text(
            "Not checked: these weights × values could not be compared with the model's own attention output.",
            style="yellow",
        )
    return Text.assemble(
        ("Checked: ", "bold"),
        f"these weights × values give the model's own attention output (error {view.proof:.0e}).",
    )


def _hints(view: TextLinks) -> list[str]:
    """Options that show more about the first word's links."""
    if not view.links:
        return []
    first = [link for link in view.links if link.source == view.links[0].source]
    far = max(first, key=lambda link: (abs(link.word_distance) > 1, link.weight))
    source, target = quote(label(view.tokens, far.source)), quote(label(view.tokens, far.target))
    hints = []
    if view.head is None:
        hints.append(f"--head {far.layer}.{far.head}")
    if view.target is None and view.head is None:
        hints.append(f"--from {source} --to {target}")
    if view.target is not None or view.head is not None:
        hints.append(f"--from {source}")
    return hints
