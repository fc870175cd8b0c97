"""Answers as data."""

from __future__ import annotations

import json
import sys
from typing import Any

from torch import Tensor

from headscope.heads.effects import LinkEffects
from headscope.models.tokens import Word
from headscope.views.links import Link, View
from headscope.views.words import label

__all__ = ["as_data", "forbidden_as_data", "print_json"]

VERSION = 1


def as_data(view: View, *, model: str, source: str) -> dict[str, Any]:
    """An answer as JSON data; docs/json.md describes each entry.

    Args:
        view: The answer.
        model: The model's name.
        source: Where it was read from.
    """
    tokens = view.tokens
    index = {word.start: i for i, word in enumerate(tokens.words)}

    def word(given: Word) -> dict[str, Any]:
        return {"text": given.text, "word": index[given.start], "name": label(tokens, given)}

    def link(given: Link) -> dict[str, Any]:
        return {
            "layer": given.layer,
            "head": given.head,
            "weight": _number(given.weight),
            "from": word(given.source),
            "to": word(given.target),
            "distance": {"words": given.words, "tokens": given.tokens},
        }

    return {
        "version": VERSION,
        "model": {"name": model, "source": source, "layers": len(view.heads), "heads": list(view.heads)},
        "text": tokens.text,
        "tokens": [
            {"id": i, "piece": piece, "special": special, "start": start, "end": end}
            for i, piece, special, (start, end) in zip(
                tokens.ids, tokens.pieces, tokens.special, tokens.offsets, strict=True
            )
        ],
        "words": [{"text": w.text, "start": w.start, "end": w.end, "tokens": list(w.tokens)} for w in tokens.words],
        "asked": {
            "from": [word(w) for w in view.sources],
            "to": None if view.target is None else word(view.target),
            "head": None if view.head is None else str(view.head),
        },
        "links": [link(one) for one in view.links],
        "rest": [
            {"from": word(r.source), "special": _table(r.special), "itself": _table(r.itself), "blank": _table(r.blank)}
            for r in view.rest
        ],
        "proof": view.proof,
        "notes": list(view.notes),
    }


def forbidden_as_data(
    effects: LinkEffects, pieces: dict[int, str], text: str, *, source: str, target: str
) -> dict[str, Any]:
    """What forbidding a link does, as JSON data; docs/json.md describes each entry.

    Args:
        effects: Of forbidding it.
        pieces: How the tokens whose probabilities are compared are written.
        text: The text.
        source: The word that may not look.
        target: The word that it may not look at.
    """
    return {
        "version": VERSION,
        "text": text,
        "from": source,
        "to": target,
        "next": [
            {"id": change.token_id, "token": pieces[change.token_id], "with": change.clean, "without": change.edited}
            for change in effects.everywhere.changes
        ],
        "kl": {
            "everywhere": effects.everywhere.kl,
            "layers": effects.layers.tolist(),
            "heads": _table(effects.heads),
        },
        "notes": list(effects.notes),
    }


def _number(value: float) -> float | None:
    return None if value != value else float(f"{value:.6g}")


def _table(values: Tensor) -> list[list[float | None]]:
    return [[_number(value) for value in row] for row in values.tolist()]


def print_json(data: dict[str, Any]) -> None:
    """JSON in UTF-8 on the standard output, whatever the terminal's encoding is."""
    sys.stdout.flush()
    sys.stdout.buffer.write(json.dumps(data, ensure_ascii=False, allow_nan=False, indent=1).encode() + b"\n")
    sys.stdout.buffer.flush()
