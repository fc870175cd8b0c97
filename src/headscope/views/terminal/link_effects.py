"""The effects of stopping a link between two words, as tables in the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from headscope.heads.effects import LinkEffects
from headscope.views.terminal.console import print_renderable
from headscope.views.words import percent


def print_link_effects(
    effects: LinkEffects, pieces: dict[int, str], *, model: str, start: str, source: str, target: str, top: int
) -> None:
    """The next token with the link and without it; where the link matters most.

    Args:
        effects: The effects.
        pieces: The text of each token whose probabilities are compared.
        model: The model's name.
        start: The start token, in words.
        source: The word that is stopped from looking.
        target: The word that it cannot look at.
        top: How many layers and heads.
    """
    layers, heads = effects.heads.shape
    print_renderable(
        Text(
            f"{model}, {layers} layers with up to {heads} heads; {start}: “{source}” is stopped from looking at "
            f"“{target}”.",
            style="bold",
        )
    )
    table = Table(box=SIMPLE_HEAD, header_style="dim")
    table.add_column("what comes next")
    for name in ("with the link", "without it", "change"):
        table.add_column(name, justify="right")
    for change in effects.everywhere.changes:
        sign = "+" if change.change >= 0 else ""
        numbers = (percent(change.clean, 2), percent(change.edited, 2), sign + percent(change.change, 2))
        table.add_row(repr(pieces[change.token_id]), *numbers)
    print_renderable(table)
    print_renderable(Text(f"Stopped in every head: the next token changes by {_nats(effects.everywhere.kl)} nats."))
    best = effects.layers.argsort(descending=True)[:top].tolist()
    print_renderable(_line("in one layer", [(f"{i}", float(effects.layers[i])) for i in best]))
    flat = effects.heads.nan_to_num(-1).flatten()
    best_heads = [divmod(i, heads) for i in flat.argsort(descending=True)[:top].tolist()]
    print_renderable(_line("in one head", [(f"{i}.{j}", float(effects.heads[i, j])) for i, j in best_heads]))
    for note in effects.notes:
        print_renderable(Text(note, style="yellow"))
    explanation = (
        "\nA change is KL(with ‖ without) of the next token's probabilities, in nats: 0 means no change. The weight of "
        "the link goes to the other words: the row is normalised again."
    )
    if effects.everywhere.kl < 0.01:
        explanation += " This link hardly matters: a head may look where the model does not need it to."
    print_renderable(Text(explanation, style="dim"))


def _line(where: str, changes: list[tuple[str, float]]) -> Text:
    return Text(f"Stopped {where} alone, strongest first: " + "   ".join(f"{n} {_nats(kl)}" for n, kl in changes))


def _nats(kl: float) -> str:
    return f"{kl:.4f}" if kl >= 1e-4 else "0" if kl < 1e-9 else f"{kl:.0e}"
