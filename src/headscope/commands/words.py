"""A command's model, and the words of its text; words that are missing are refused before the weights are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from headscope import models
from headscope.commands.models import DEFAULT_MODEL
from headscope.commands.pipe import argument_text
from headscope.models.loading import Loaded
from headscope.models.tokens import Tokens, Word, tokenize
from headscope.views.words import quote

StartToken = Annotated[
    str,
    typer.Option(
        "--start-token",
        metavar="ID|none|TEXT",
        help="The token before the text, such as 0, none or '<|im_start|>'; auto: the model's own.",
    ),
]


@dataclass(frozen=True)
class TextAndWords:
    """The tokens of a text, each phrase that was asked for as one word; these words; and what to say about them."""

    tokens: Tokens
    words: tuple[Word, ...]
    notes: tuple[str, ...]


def load_with_words(model: str, text: str, words: Sequence[str], start_token: str) -> tuple[Loaded, TextAndWords]:
    """Load a model, and find words in a text.

    Args:
        model: The model's name.
        text: The text.
        words: Words or phrases, as a person writes them.
        start_token: As in `headscope.load`.

    Raises:
        HeadscopeError: There is no such model, token or word, or the text is too long.
    """
    words = [argument_text(word) for word in words]

    def find(tokenizer: Any, start_token_id: int | None, context: int | None) -> TextAndWords:
        tokens = tokenize(text, tokenizer, start_token_id=start_token_id, limit=context).joined(words)
        notes = list[str]()
        found = tuple(tokens.find(word, on_note=notes.append) for word in words)
        return TextAndWords(tokens, found, tuple(dict.fromkeys(notes)))

    def check(tokenizer: Any, start_token_id: int | None, context: int | None) -> None:
        find(tokenizer, start_token_id, context)

    loaded = models.load(model, start_token=start_token, on_tokenizer=check)
    return loaded, find(loaded.tokenizer, loaded.start_token_id, loaded.context)


def command_for(
    command: str, text: str | None, file: Path | None, model: str, start_token: str = "auto"
) -> Callable[[str], str]:
    """A function that puts options into the command that reads the same text with the same model."""
    start = f"headscope {command}"
    start += "" if model == DEFAULT_MODEL else f" --model {quote(model)}"
    start += "" if start_token == "auto" else f" --start-token {quote(start_token)}"
    if file is not None:
        return lambda options: f"{start} --file {quote(str(file))} {options}"
    if text is None:
        return lambda options: f"{start} {options}"
    dashes = "-- " if text.startswith("-") and text != "-" else ""
    return lambda options: f"{start} {options} {dashes}{quote(text)}"
