"""What forbidding a link does, as tables in the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from headscope.heads.effects import LinkEffects
from headscope.views.terminal.console import print_renderable

__all__ = ["print_forbidden"]


def print_forbidden(
    effects: LinkEffects, pieces: dict[int, str], *, model: str, source: str, target: str, top: int
) -> None:
    """The next token with the link and without it; where the link matters most.

    Args:
        effects: Of forbidding it.
        pieces: How the tokens whose probabilities are compared are written.
        model: Its name.
        source: The word that may not look.
        target: The word that it may not look at.
        top: How many layers and heads.
    """
    layers, heads = effects.heads.shape
    print_renderable(
        Text(f"{model}, {layers} layers with up to {heads} heads: “{source}” may not look at “{target}”.", style="bold")
    )
    table = Table(box=SIMPLE_HEAD, header_style="dim")
    table.add_column("what comes next")
    for name in ("with the link", "without it", "change"):
        table.add_column(name, justify="right")
    for change in effects.everywhere.changes:
        numbers = (f"{change.clean:.2%}", f"{change.edited:.2%}", f"{change.change:+.2%}")
        table.add_row(repr(pieces[change.token_id]), *numbers)
    print_renderable(table)
    print_renderable(Text(f"Forbidden in every head: the next token changes by {_nats(effects.everywhere.kl)}."))
    best = effects.layers.argsort(descending=True)[:top].tolist()
    print_renderable(_line("in one layer", [(f"{i}", float(effects.layers[i])) for i in best]))
    flat = effects.heads.nan_to_num(-1).flatten()
    found = [divmod(i, heads) for i in flat.argsort(descending=True)[:top].tolist()]
    print_renderable(_line("in one head", [(f"{i}.{j}", float(effects.heads[i, j])) for i, j in found]))
    for note in effects.notes:
        print_renderable(Text(note, style="yellow"))
    told = (
        "\nA change is KL(with ‖ without) of the next token, in nats: 0 where it stays as it was. The row is "
        "normalised anew, so what went to the link goes to the other words."
    )
    if effects.everywhere.kl < 0.01:
        told += " Here it hardly matters: a head may look where the model does not need it to."
    print_renderable(Text(told, style="dim"))


def _line(where: str, found: list[tuple[str, float]]) -> Text:
    return Text(f"Forbidden {where} alone, strongest first: " + "   ".join(f"{n} {_nats(kl)}" for n, kl in found))


def _nats(kl: float) -> str:
    return f"{kl:.4f}" if kl >= 1e-4 else "0" if kl < 1e-9 else f"{kl:.0e}"
