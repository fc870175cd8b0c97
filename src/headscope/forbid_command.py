"""The command `headscope forbid`: what does the model lose when a word may not look at another?"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Annotated, Any

import torch
import typer

from headscope import models, terminal, terminal_links
from headscope.output import print_json
from headscope.tokens import Tokens, Word, tokenize
from headscope.words import label

__all__ = ["add_forbid"]

Reported = Callable[[], AbstractContextManager[None]]

# The same sentence as elsewhere, up to where the model has to know what "it" is.
_TEXT = "The animal didn't cross the street because it was too"

_FORBID = """Forbid a word to look at another, and see what the model then expects to come next.

`headscope see` says which heads look where. This says whether it matters: the link is taken away in every head, in each
layer alone, and in each head alone, and the next token's probabilities are compared.

\b
Examples:
  headscope forbid                                 "it" may not look at "animal"
  headscope forbid "The cup fell because it was" --from it --to cup
  headscope forbid --from too --to animal --json
"""

TextArgument = Annotated[
    str | None, typer.Argument(help="The text, up to where the model goes on.", show_default=_TEXT)
]
Model = Annotated[str, typer.Option("--model", metavar="NAME", help="smollm2, a folder, a .gguf file or a hub name.")]
From = Annotated[str, typer.Option("--from", metavar="WORD", help="The word that may not look; it#2 is the second it.")]
To = Annotated[str, typer.Option("--to", metavar="WORD", help="The word that it may not look at.")]
Top = Annotated[int, typer.Option("--top", metavar="N", min=1, help="How many tokens, layers and heads.")]
AsJson = Annotated[bool, typer.Option("--json", help="The whole answer as JSON, on the standard output.")]


def add_forbid(app: typer.Typer, reported: Reported, fetch: Callable[[str], None]) -> None:
    """Add `forbid` to the command; ``reported`` turns expected errors into messages, ``fetch`` pulls a model."""

    @app.command(name="forbid", help=_FORBID)
    def forbid(
        text: TextArgument = None,
        model: Model = "smollm2",
        from_: From = "it",
        to: To = "animal",
        top: Top = 5,
        as_json: AsJson = False,
    ) -> None:
        from headscope.effects import link_effect, link_effects

        with reported():
            fetch(model)
            stages = terminal.Stages(shown=not as_json)
            with stages.stage("loading the model"):
                loaded = models.load(model)
            given = _TEXT if text is None else text
            tokens = tokenize(given, loaded.tokenizer, start_token_id=loaded.start_token_id, limit=loaded.context)
            source, target = tokens.find(from_), tokens.find(to)
            if loaded.causal and target.tokens[0] > source.tokens[-1]:
                raise ValueError(
                    f"{label(tokens, target)!r} comes after {label(tokens, source)!r}, and {loaded.name} sees only "
                    f"what comes before: there is nothing to forbid. Try --from {to} --to {from_}."
                )
            ids = torch.tensor([tokens.ids], device=loaded.model.device)
            with stages.stage("forbidding the link in each head"):
                effect = link_effect(loaded.model, ids, source.tokens, target.tokens, top=top)
                parts = link_effects(loaded.model, ids, source.tokens, target.tokens)
            pieces = {change.token_id: str(loaded.tokenizer.decode([change.token_id])) for change in effect.changes}
            if as_json:
                print_json(_as_data(effect, parts, pieces, loaded, tokens, source, target))
                return
            names = label(tokens, source), label(tokens, target)
            terminal_links.print_forbidden(
                effect, parts, pieces, model=loaded.name, source=names[0], target=names[1], top=top
            )


def _as_data(
    effect: Any, parts: Any, pieces: dict[int, str], loaded: models.Loaded, tokens: Tokens, source: Word, target: Word
) -> dict[str, Any]:
    """The answer as JSON data; docs/json.md describes each entry."""
    heads = [[None if math.isnan(value) else value for value in row] for row in parts.heads.tolist()]
    return {
        "version": 1,
        "model": {"name": loaded.name, "source": loaded.source},
        "text": tokens.text,
        "from": label(tokens, source),
        "to": label(tokens, target),
        "next": [
            {"id": change.token_id, "token": pieces[change.token_id], "with": change.clean, "without": change.edited}
            for change in effect.changes
        ],
        "kl": {"everywhere": effect.kl, "layers": parts.layers.tolist(), "heads": heads},
        "notes": list(parts.notes),
    }
