"""Links and the effects of a link as JSON data; docs/json.md describes each entry."""

from __future__ import annotations

import json
import sys
from typing import Any

from torch import Tensor

from headscope.heads.effects import LinkEffects
from headscope.models.tokens import Word
from headscope.views.links import Link, TextLinks
from headscope.views.words import label

VERSION = 2


def links_as_data(view: TextLinks, *, model: str, source: str) -> dict[str, Any]:
    """The links of a text as JSON data.

    Args:
        view: The links.
        model: The model's name.
        source: Where it was read from.
    """
    tokens = view.tokens
    index = {word.start: i for i, word in enumerate(tokens.words)}

    def word_data(word: Word) -> dict[str, Any]:
        return {"text": word.text, "word": index[word.start], "name": label(tokens, word)}

    def link_data(link: Link) -> dict[str, Any]:
        return {
            "layer": link.layer,
            "head": link.head,
            "weight": _number(link.weight),
            "from": word_data(link.source),
            "to": word_data(link.target),
            "distance": {"words": link.word_distance, "tokens": link.token_distance},
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
        "selection": {
            "from": [word_data(word) for word in view.sources],
            "to": None if view.target is None else word_data(view.target),
            "head": None if view.head is None else str(view.head),
        },
        "links": [link_data(link) for link in view.links],
        "unlisted": [
            {
                "from": word_data(part.source),
                "special": _table(part.special),
                "itself": _table(part.itself),
                "blank": _table(part.blank),
            }
            for part in view.unlisted
        ],
        "proof": view.proof,
        "notes": list(view.notes),
    }


def effects_as_data(
    effects: LinkEffects, pieces: dict[int, str], text: str, *, source: str, target: str
) -> dict[str, Any]:
    """The effects of stopping a link, as JSON data.

    Args:
        effects: The effects.
        pieces: The text of each token whose probabilities are compared.
        text: The text.
        source: The word that is stopped from looking.
        target: The word that it cannot look at.
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
