"""A head's best and worst examples in words: where it looks hardest, where it cannot choose, what it gets wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headscope.errors import TextError
from headscope.heads.corpus import Document, Piece, TextBatch, batches, cut
from headscope.heads.measures import Visibility
from headscope.heads.measures.strongest import MaxAmong
from headscope.heads.relations import Example, count_hits
from headscope.heads.relations.evaluate import DirectedPair, directed_pairs, words_of_tokens
from headscope.models.loading import Loaded
from headscope.models.tokens import tokenize
from headscope.watching.hooks import AttentionCall
from headscope.watching.texts import record_batch, record_text

__all__ = ["PairExample", "TokenExample", "pair_examples", "token_examples"]


@dataclass(frozen=True)
class TokenExample:
    """One token's strongest look at another: the text before it, the token, what it looks at, and how much."""

    before: str
    token: str
    target: str
    distance: int
    weight: float
    document: str


@dataclass(frozen=True)
class PairExample:
    """One pair of a relation: the sentence, the two words, what the head chose instead, and its weights."""

    text: str
    query: str
    gold: str
    chosen: str
    weight: float
    hit: bool


def token_examples(
    loaded: Loaded, documents: Sequence[Document], layer: int, head: int, *, most: int = 5, pieces: int = 4
) -> tuple[list[TokenExample], list[TokenExample]]:
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
    found: list[TokenExample] = []
    for batch in batches(given, tokens=1024, pad=int(loaded.tokenizer.pad_token_id or 0), device=loaded.model.device):
        found += _looks(loaded, batch, layer, head)
    found.sort(key=lambda look: -look.weight)
    best, seen = [], set()
    for look in found:
        if (look.token, look.target) not in seen:
            seen.add((look.token, look.target))
            best.append(look)
    return best[:most], found[::-1][:most]


def _looks(loaded: Loaded, batch: TextBatch, layer: int, head: int) -> list[TokenExample]:
    number = -1
    answers: list[tuple[Tensor, Tensor, Tensor]] = []

    def on_call(call: AttentionCall) -> None:
        nonlocal number
        number += 1
        if number == layer:
            seen = Visibility(batch, call.scores.mask, call.shape[1])
            largest = call.matrix().reduce(MaxAmong(seen.text))[0]
            answers.append((largest.values[:, head], largest.indices[:, head], seen.rows))

    record_batch(loaded, batch.ids, batch.attention_mask, reduce=on_call)
    values, keys, rows = answers[0]
    return [
        _look(batch.pieces[b], i, int(keys[b, i]), float(values[b, i]))
        for b, i in rows.nonzero().tolist()
        if keys[b, i] >= 0
    ]


def _look(piece: Piece, i: int, j: int, weight: float) -> TokenExample:
    before = "".join(_spaced(text) for text in piece.texts[max(0, i - 8) : i])
    return TokenExample(before, piece.texts[i].strip(), piece.texts[j].strip(), j - i, weight, piece.document)


def _spaced(text: str) -> str:
    return text if text[:1].isspace() else f" {text}" if text[:1].isalnum() else text


def pair_examples(
    loaded: Loaded, examples: Sequence[Example], relation: str, layer: int, head: int, *, reverse: bool = False
) -> list[PairExample]:
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
        if not any(pair.relation == relation for pair in example.pairs):
            continue
        try:
            tokens = tokenize(
                example.text, loaded.tokenizer, start_token_id=loaded.start_token_id, limit=loaded.context
            )
        except TextError:  # not counted either: nothing is left of it, or it is longer than the model reads
            continue
        words = words_of_tokens(tokens, example.words)
        present = [index in words for index in range(len(example.words))]
        asked = directed_pairs(example, present, causal=loaded.causal)
        mine = [question for question in asked if (question.relation, question.reverse) == (relation, reverse)]
        if mine:
            groups = torch.tensor(words)
            with torch.no_grad():
                weights = record_text(loaded, tokens)[layer].pool(groups, groups, "mass")[:, head : head + 1].cpu()
            here = torch.tensor([present[: weights.shape[-1]]])
            found += [_pair_look(example, weights, here, question, causal=loaded.causal) for question in mine]
    return sorted(found, key=lambda look: (-look.hit, -look.weight))


def _pair_look(example: Example, weights: Tensor, here: Tensor, question: DirectedPair, *, causal: bool) -> PairExample:
    """One question to one head's weights between words, [1, 1, W, W]: judged as when they are counted."""
    query, gold = question.query, question.gold
    asks, first, right_one = torch.tensor([query]), torch.tensor([0]), torch.tensor([gold])
    hit = bool(count_hits(weights, asks, first, asks, right_one, here, causal=causal))
    row = weights[0, 0, query].masked_fill(~here[0], -1.0)
    row[query] = -1.0
    if causal:
        row[query:] = -1.0
    right = float(row[gold])
    if not hit:
        row[gold] = -1.0  # a tie is no hit
    chosen = gold if hit else int(row.argmax())
    return PairExample(example.text, example.word(query), example.word(gold), example.word(chosen), right, hit)
