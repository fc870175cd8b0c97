"""A head's best and worst examples in words: where it looks hardest, where it cannot choose, what it gets wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headscope.corpus import Batch, Document, Piece, batches, cut
from headscope.errors import TextError
from headscope.links import run as run_tokens
from headscope.measures import Visibility
from headscope.measures.questions import MaxAmong
from headscope.models import Loaded
from headscope.profiling import run
from headscope.relations import Example
from headscope.seam import AttentionCall
from headscope.tokens import tokenize
from headscope.words import Positions, all_words

__all__ = ["PairLook", "TokenLook", "pair_looks", "token_looks"]


@dataclass(frozen=True)
class TokenLook:
    """One token's strongest look at another: the text before it, the token, what it looks at, and how much."""

    before: str
    token: str
    target: str
    distance: int
    weight: float
    document: str


@dataclass(frozen=True)
class PairLook:
    """One pair of a relation: the sentence, the two words, what the head chose instead, and its weights."""

    text: str
    query: str
    gold: str
    chosen: str
    weight: float
    hit: bool


def token_looks(
    loaded: Loaded, documents: Sequence[Document], layer: int, head: int, *, most: int = 5, pieces: int = 4
) -> tuple[list[TokenLook], list[TokenLook]]:
    """The tokens whose strongest weight on text is largest, and those where it is smallest.

    Args:
        loaded: The model.
        documents: Texts; of the first few one piece each is read.
        layer: From 0.
        head: From 0.
        most: How many of each.
        pieces: How many pieces are read.
    """
    given = [piece for document in documents[:pieces] for piece in cut(loaded, document, 0, length=256, most=1)]
    found: list[TokenLook] = []
    for batch in batches(given, tokens=1024, pad=int(loaded.tokenizer.pad_token_id or 0), device=loaded.model.device):
        found += _looks(loaded, batch, layer, head)
    found.sort(key=lambda look: -look.weight)
    best, seen = [], set()
    for look in found:
        if (look.token, look.target) not in seen:
            seen.add((look.token, look.target))
            best.append(look)
    return best[:most], found[::-1][:most]


def _looks(loaded: Loaded, batch: Batch, layer: int, head: int) -> list[TokenLook]:
    number = -1
    answers: list[tuple[Tensor, Tensor, Tensor]] = []

    def on_call(call: AttentionCall) -> None:
        nonlocal number
        number += 1
        if number == layer:
            seen = Visibility(batch, call.scores.mask, call.shape[1])
            largest = call.matrix().reduce(MaxAmong(seen.text))[0]
            answers.append((largest.values[:, head], largest.indices[:, head], seen.rows))

    run(loaded, batch, on_call)
    values, keys, rows = answers[0]
    return [
        _look(batch.pieces[b], i, int(keys[b, i]), float(values[b, i]))
        for b, i in rows.nonzero().tolist()
        if keys[b, i] >= 0
    ]


def _look(piece: Piece, i: int, j: int, weight: float) -> TokenLook:
    before = "".join(_spaced(text) for text in piece.texts[max(0, i - 8) : i])
    return TokenLook(before, piece.texts[i].strip(), piece.texts[j].strip(), j - i, weight, piece.document)


def _spaced(text: str) -> str:
    return text if text[:1].isspace() else f" {text}" if text[:1].isalnum() else text


def pair_looks(
    loaded: Loaded, examples: Sequence[Example], relation: str, layer: int, head: int, *, reverse: bool = False
) -> list[PairLook]:
    """What a head does with the pairs of a relation, in the order of its weight on the right word.

    Args:
        loaded: The model.
        examples: Sentences; those without this relation are passed over, and those that the model cannot read.
        relation: Its name.
        layer: From 0.
        head: From 0.
        reverse: Whether the pair's target is the word that looks.
    """
    found = []
    for example in examples:
        pairs = [pair for pair in example.pairs if pair.relation == relation]
        if not pairs:
            continue
        try:
            tokens = tokenize(
                example.text, loaded.tokenizer, start_token_id=loaded.start_token_id, limit=loaded.context
            )
        except TextError:  # not counted either: nothing is left of it, or it is longer than the model reads
            continue
        with torch.no_grad():
            weights = all_words(run_tokens(loaded, tokens)[layer], Positions(tokens))[head]
        starts = [word.start for word in tokens.words]
        for pair in pairs:
            query, gold = (example.words[i][0] for i in (pair.source, pair.target))
            query, gold = (gold, query) if reverse else (query, gold)
            if query not in starts or gold not in starts:
                continue
            i, j = starts.index(query), starts.index(gold)
            row = weights[i, : len(starts)].clone()
            row[i] = 0
            if loaded.causal:
                row[i:] = 0
                if j > i:
                    continue
            best = int(row.argmax())
            asked, right, chosen = (tokens.words[k].text for k in (i, j, best))
            found.append(PairLook(example.text, asked, right, chosen, float(row[j]), best == j))
    return sorted(found, key=lambda look: (-look.hit, -look.weight))
