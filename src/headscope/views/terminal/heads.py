"""An atlas as tables in the terminal: roles with their evidence, heads by worth, and everything about one head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from headscope.heads.atlas.atlas import HeadAtlas
from headscope.heads.examples import PairExample, TokenExamples
from headscope.heads.relations.counts import with_arrow
from headscope.heads.relations.score import RelationScore
from headscope.heads.roles import ROLES, Evidence
from headscope.views.terminal.console import print_line, print_renderable, width
from headscope.views.words import percent

_TITLES = {"ablation_zero": "without it", "ablation_mean": "its mean", "gradient": "gradient"}
_MOST, _MOST_WORTH = 3, 8  # heads shown for a role, and by worth, unless all are wanted
_EVIDENCE = ("head", "picked", "score (95 %)", "null", "p", "examples")
_NARROW = 70  # columns, below which what a head was picked by is left out
_GUESSES = (
    ("reference", "what “it” stands for", "coreference"),
    ("cause", "what a consequence follows from", "cause"),
    ("structure", "which subject a verb has", "subject-verb"),
)


def print_atlas(atlas: HeadAtlas, *, all_heads: bool = False, command: str | None = None) -> None:
    """The roles with their evidence, the heads by worth, and how to read both.

    Args:
        atlas: The atlas.
        all_heads: Whether to show every head, not the first few.
        command: The command that shows this atlas again, for the hint; None if there is none.
    """
    roles = atlas.roles()
    print_renderable(_heading(atlas, roles))
    print_renderable(_roles_table(roles, all_heads))
    print_renderable(_worth(atlas, roles, len(atlas) if all_heads else _MOST_WORTH))
    print_renderable(_guesses(atlas))
    for note in atlas.notes:
        print_renderable(Text(note, style="yellow"))
    print_renderable(
        Text(
            "Heads are picked on one half of the texts and scored on the other (score, with its 95 % interval). null: "
            "uniform attention; for words, the most that chance reaches: a fixed distance, a word that "
            "other words look at, too, any word of the right class. A role says where a head looks, not what it is "
            "worth. ←: the other way round, such as from the verb to its subject.",
            style="dim",
        )
    )
    if roles and command is not None:
        best = roles[-1]
        print_line(f"Try: {command} --head {best.layer}.{best.head}")


def _heading(atlas: HeadAtlas, roles: Sequence[Evidence]) -> Text:
    texts = len(atlas.info.get("texts", {}))
    with_role = len({(row.layer, row.head) for row in roles})
    counts = (
        f": {len(atlas.heads)} layers, {len(atlas)} heads; {with_role} have a role, {len(atlas) - with_role} have none."
    )
    sources = (
        f" From {texts} texts, {atlas.relations.examples} sentences with known relations, and repeated random tokens; "
        f"{atlas.info['model']['start_token']}."
    )
    return Text.assemble((atlas.name, "bold"), counts, sources)


def _roles_table(roles: Sequence[Evidence], all_heads: bool) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("role", style="bold", min_width=9, overflow="fold")
    shown = [name for name in _EVIDENCE if width() >= _NARROW or name != "picked"]
    for name in shown:
        table.add_column(name, no_wrap=True, justify="right")
    for role in dict.fromkeys(row.role for row in roles):
        rows = [row for row in roles if row.role == role]
        for number, row in enumerate(rows if all_heads else rows[:_MOST]):
            table.add_row(
                Text(with_arrow(role) if number == 0 else ""), *(_evidence_cells(row)[name] for name in shown)
            )
        if len(rows) > _MOST and not all_heads:
            table.add_row("", Text(f"+{len(rows) - _MOST}", style="dim"))
    if not roles:
        table.add_row("(no head has a role)")
    return table


def _evidence_cells(row: Evidence) -> dict[str, Any]:
    return {
        "head": Text(f"{row.layer}.{row.head}", style="cyan"),
        "picked": percent(row.picked),
        "score (95 %)": Text.assemble((percent(row.score), "bold"), f" {row.low * 100:3.0f}–{row.high * 100:<3.0f}"),
        "null": percent(row.null),
        "p": "" if math.isnan(row.p) else f"{row.p:.0e}",
        "examples": f"{row.examples}",
    }


def _worth(atlas: HeadAtlas, roles: Sequence[Evidence], most: int) -> Any:
    if "ablation_zero" not in atlas.worth.values:
        return Text("What the heads are worth was not measured.", style="dim")
    columns = atlas.columns()
    zero = columns["ablation_zero"]
    order = [i for i in zero.flatten().argsort(descending=True).tolist() if not math.isnan(float(zero.flatten()[i]))]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("worth most", style="cyan", no_wrap=True)
    shown = [name for name in ("ablation_zero", "ablation_mean", "gradient") if name in columns]
    for name in shown:
        table.add_column(_TITLES[name], justify="right", no_wrap=True)
        if name == "ablation_zero":
            table.add_column("95 %", justify="right", min_width=8, no_wrap=width() >= _NARROW)
    table.add_column("roles", min_width=9, overflow="fold")
    for index in order[:most]:
        layer, head = divmod(index, zero.shape[1])
        names = [with_arrow(row.role) for row in roles if (row.layer, row.head) == (layer, head)]
        role_cell = ", ".join(names[:2]) + (f" +{len(names) - 2}" if len(names) > 2 else "")

        def number(name: str, at: tuple[int, int] = (layer, head), sign: str = "+") -> str:
            value = float(columns[name][at]) if name in columns else math.nan
            return "" if math.isnan(value) else f"{value:{sign}.3f}"

        cells = [number(name, sign="" if name == "gradient" else "+") for name in shown]
        cells.insert(1, f"{number('ablation_zero_low')} … {number('ablation_zero_high')}")
        table.add_row(f"{layer}.{head}", *cells, role_cell or Text("none", style="dim"))
    agreement = atlas.agreement()
    caption = (
        f"What the model loses, in {atlas.worth.unit}, without the head, or with its mean output instead of its own; "
        f"on {atlas.info['plan']['worth_tokens']} tokens from each of {len(atlas.worth.documents)} texts."
    )
    if not math.isnan(agreement):
        caption += f" Rank correlation of its size with the gradient over all heads: {agreement:.2f}."
    table.caption, table.caption_justify = caption, "left"
    return table


def _guesses(atlas: HeadAtlas) -> Text:
    """The article's guesses about its sentence: one head for reference, one for cause, one for structure."""
    text = Text("One head for reference, one for cause, one for structure?\n", style="bold")
    scored = atlas.relation_scores()
    for name, about, relation in _GUESSES:
        rows = [row for row in scored if row.relation == relation]
        found = [row for row in atlas.roles() if row.role.removesuffix(" (reverse)") == relation]
        if not rows:
            answer = "not measured."
        elif found:
            best = max(found, key=lambda row: row.score)
            several = f", and {len(found) - 1} more" if len(found) > 1 else ""
            answer = (
                f"found: {best.layer}.{best.head} is right in {percent(best.score)} of {best.examples} pairs "
                f"it was not picked on (null: {percent(best.null)}){several}."
            )
        else:
            row = max(rows, key=lambda row: row.accuracy - row.null)
            fixed = " the pairs stand at too fixed a distance;" if row.too_fixed else ""
            way = " (measured the other way round)" if row.direction != row.relation else ""
            answer = (
                f"not found:{fixed} the best head, {row.layer}.{row.head}, is right in {percent(row.accuracy)} of "
                f"{row.pairs} pairs{way} (null: {percent(row.null)}, p = {row.p_holm:.1g})."
            )
        text.append(f"  {name} ({about}): ", style="not bold bold").append(answer + "\n", style="not bold")
    return text


def print_head(atlas: HeadAtlas, layer: int, head: int, *, measures: bool = False, command: str | None = None) -> None:
    """One head: its roles with their evidence, and its examples in words.

    Args:
        atlas: The atlas.
        layer: From 0.
        head: From 0.
        measures: Whether all measures are shown, too.
        command: The command that shows this atlas again, for the hint; None if there is none.
    """
    roles = [row for row in atlas.roles() if (row.layer, row.head) == (layer, head)]
    print_renderable(Text.assemble((f"{atlas.name} {layer}.{head}", "bold"), ": ", _named(roles)))
    if roles:
        print_renderable(_roles_table(roles, all_heads=True))
    _print_token_examples(atlas.measurements.token_examples, layer, head)
    _print_pair_examples(atlas, roles, layer, head)
    if measures:
        print_renderable(_measures_table(atlas, layer, head), unnamed=("what it is",))
    elif command is not None:
        print_line(f"All its measures: {command} --head {layer}.{head} --all")


def _measures_table(atlas: HeadAtlas, layer: int, head: int) -> Table:
    """All measures of one head, beside their nulls and ranks: columns of text, relations, worth."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), expand=True)
    table.add_column("measure", no_wrap=True, width=20)
    for name in ("value", "null", "rank"):
        table.add_column(name, justify="right", no_wrap=True, width=7)
    table.add_column("what it is", ratio=1, overflow="fold")
    relations = [row for row in atlas.relation_scores() if (row.layer, row.head) == (layer, head)]
    fixed = {f"relation:{row.direction}": row.null for row in relations}
    more = {f"relation:{row.direction}": _among(row) for row in relations}
    columns = atlas.columns()
    for name in [name for name in columns if f"{name}_low" in columns]:
        low, high = (float(columns[f"{name}_{end}"][layer, head]) for end in ("low", "high"))
        more[name] = f"; 95 %: {low:+.3f} to {high:+.3f}"
    for name, values in columns.items():
        value = float(values[layer, head])
        if math.isnan(value) or name.endswith(("_low", "_high")):
            continue
        known = values[~values.isnan()]
        rank = int((known > value).sum()) + 1
        null = atlas.measurements.null.values.get(name)
        null_cell = "" if null is None else f"{float(atlas.measurements.null.value(name)[layer, 0]):.3f}"
        null_cell = f"{fixed[name]:.3f}" if name in fixed else null_cell
        about = atlas.info["columns"].get(name, {})
        description = f"{about.get('about', _ABOUT.get(name.split(':')[0], ''))}{more.get(name, '')}"
        table.add_row(
            with_arrow(name.removeprefix("relation:")),
            f"{value:.3f}",
            null_cell,
            f"{rank}/{len(known)}",
            Text(description, style="dim"),
        )
    return table


_ABOUT = {
    "relation": "held-out pairs in which it is right",
    "ablation_zero": "loss without the head minus loss with it",
    "ablation_mean": "loss with the head's mean output instead, minus loss",
    "gradient": "gradient importance, ÷ the layer's norm (arXiv 1905.10650)",
}


def _among(row: RelationScore) -> str:
    """The pairs, interval and p-value of an accuracy."""
    return f": {row.pairs}; 95 %: {row.low:.3f} to {row.high:.3f}; p = {row.p_holm:.1g}"


def _named(roles: Sequence[Evidence]) -> str:
    about = {role.name: role.about for role in ROLES}
    named = [f"{row.role} ({about[row.role]})" if row.role in about else with_arrow(row.role) for row in roles]
    return "; ".join(named) or "no role."


def _print_token_examples(examples: TokenExamples, layer: int, head: int) -> None:
    """The tokens whose largest weight is largest, and those where it is smallest."""
    if (layer, head) not in examples.largest:
        print_renderable(Text("There are no examples from texts: none was measured.", style="dim"))
    for title, by_head in (
        ("Its largest weights", examples.largest),
        ("Where its largest weight is smallest", examples.smallest),
    ):
        if by_head.get((layer, head)):
            print_renderable(Text(title, style="bold"))
        for example in by_head.get((layer, head), []):
            text = Text(f"  {percent(example.weight):>6}  … {example.before} ")
            text.append(example.token or "␣", style="bold").append(" → ")
            text.append(example.target or "␣", style="bold cyan")
            print_renderable(text.append(f"  ({example.distance:+d} tokens; {example.document})", style="dim"))


def _print_pair_examples(atlas: HeadAtlas, roles: Sequence[Evidence], layer: int, head: int) -> None:
    """Pairs with the largest and the smallest margin: of the relations that are the head's roles, or of its best."""
    rows = [row for row in atlas.relation_scores() if (row.layer, row.head) == (layer, head)]
    rows = [row for row in rows if row.direction in atlas.relations.pair_examples.weights]
    named = {row.role for row in roles}
    best = sorted((row for row in rows if not row.too_fixed), key=lambda row: row.baseline - row.accuracy)[:1]
    for row in [row for row in rows if row.direction in named] or best:
        print_renderable(
            Text(
                f"{with_arrow(row.direction)}: right in {percent(row.accuracy)} of {row.pairs} pairs "
                f"(null: {percent(row.null)})",
                style="bold",
            )
        )
        for example in atlas.relations.pair_examples.of_head(row.direction, layer, head):
            print_renderable(_pair_line(example))


def _pair_line(example: PairExample) -> Text:
    mark = Text("  ✓ ", style="green") if example.hit else Text("  ✗ ", style="red")
    chosen = f"{example.gold} {percent(example.weight)}"
    if not example.hit:
        chosen = f"{example.other} {percent(example.other_weight)}, not {chosen}"
    return mark.append(f"{example.query} → {chosen}", style="bold").append(f"   {example.text}", style="not bold")
