"""The command `headscope forbid`: what the model loses when a word is stopped from looking at another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from headscope.commands.models import DEFAULT_MODEL, pull_default
from headscope.commands.pipe import is_piped, text_of
from headscope.commands.words import StartToken, command_for, load_with_words
from headscope.errors import TextError
from headscope.heads.effects import link_effects
from headscope.views.data import effects_as_data, print_json
from headscope.views.terminal import console as terminal
from headscope.views.terminal.link_effects import print_link_effects
from headscope.views.words import label, quote, shown_name
from headscope.views.words import start_token as start_token_of

# The same sentence as elsewhere, up to where the model has to know what "it" is.
DEFAULT_TEXT = "The animal didn't cross the street because it was too"

app = typer.Typer(rich_markup_mode=None)

_HELP = """Stop a word from looking at another, and see what the model then expects next.

`headscope see` says which heads look where. This says whether it matters: the link is taken away in every head, in each
layer alone, and in each head alone, and the next token's probabilities are compared.

\b
Examples:
  headscope forbid                                 "it" is stopped from looking at "animal"
  headscope forbid "The cup fell because it was" --from it --to cup
  headscope forbid --file story.txt --from she --to girl
  cat story.txt | headscope forbid - --from she --to girl --json
"""

TextArgument = Annotated[
    str | None,
    typer.Argument(help="The text, up to the token to predict; - reads it from a pipe.", show_default=DEFAULT_TEXT),
]
Model = Annotated[str, typer.Option("--model", metavar="NAME", help="smollm2, a folder, a .gguf file or a hub name.")]
From = Annotated[
    str,
    typer.Option(
        "--from", metavar="WORD", help="The word or phrase that is stopped from looking; it#2 is the second it."
    ),
]
To = Annotated[str, typer.Option("--to", metavar="WORD", help="The word or phrase that it cannot look at.")]
File = Annotated[Path | None, typer.Option("--file", metavar="FILE", help="Read the text from a UTF-8 file.")]
Top = Annotated[
    int,
    typer.Option(
        "--top",
        metavar="N",
        min=1,
        help="How many next tokens, layers and heads to show, those that change most first.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="The whole answer as JSON, on the standard output.")]


@app.command("forbid", help=_HELP)
@app.command("knock-out", help=_HELP)
def forbid(
    text: TextArgument = None,
    model: Model = DEFAULT_MODEL,
    from_: From = "it",
    to: To = "animal",
    top: Top = 5,
    file: File = None,
    start_token: StartToken = "auto",
    as_json: AsJson = False,
) -> None:
    """Stop a word from looking at another; the help text is above."""
    if text is not None and file is not None:
        raise typer.BadParameter("give a text or --file, not both.")
    argument = "-" if text is None and file is None and is_piped() else text
    text = text_of(argument, file, DEFAULT_TEXT)
    pull_default(model)
    stages = terminal.Stages(shown=not as_json)
    with stages.stage("loading the model"):
        loaded, found = load_with_words(model, text, [from_, to], start_token)
    tokens, (source, target) = found.tokens, found.words
    if loaded.causal and target.tokens[0] > source.tokens[-1]:
        other_way = f"--from {quote(label(tokens, target))} --to {quote(label(tokens, source))}"
        raise TextError(
            f"{label(tokens, target)!r} comes after {label(tokens, source)!r}, and {loaded.name} sees only "
            "what comes before: there is no link to stop. "
            f"Try: {command_for('forbid', argument, file, model, start_token)(other_way)}"
        )
    ids = torch.tensor([tokens.ids], device=loaded.model.device)
    with stages.stage("stopping the link in each head"):
        effects = link_effects(loaded.model, ids, source.tokens, target.tokens, top=top)
    ids_shown = [change.token_id for change in effects.everywhere.changes]
    pieces = {i: str(loaded.tokenizer.decode([i])) for i in ids_shown}
    names = {"source": shown_name(tokens, source), "target": shown_name(tokens, target)}
    effects = replace(effects, notes=(*found.notes, *effects.notes))
    if as_json:
        data = effects_as_data(effects, pieces, tokens.text, **names)
        print_json({"model": {"name": loaded.name, "source": loaded.source}} | data)
    else:
        print_link_effects(effects, pieces, model=loaded.name, start=start_token_of(tokens), **names, top=top)
