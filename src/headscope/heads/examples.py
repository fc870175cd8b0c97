"""A head's examples in words: its largest and smallest weights on text, and the pairs that it gets right or wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headscope.errors import TextError
from headscope.heads.corpus import Document, Piece, TextBatch, batches, cut
from headscope.heads.measures import Visibility
from headscope.heads.measures.strongest import MaxAmong
from headscope.heads.relations.evaluate import DirectedPair, directed_pairs, words_of_tokens
from headscope.heads.relations.hits import count_hits
from headscope.heads.relations.sentences import Example
from headscope.models.loading import Loaded
from headscope.models.tokens import tokenize
from headscope.watching.hooks import AttentionCall
from headscope.watching.texts import record_batch, record_text


@dataclass(frozen=True)
class TokenExample:
    """One token's largest weight: the text before it, the token, the token it attends to, and the weight."""

    before: str
    token: str
    target: str
    distance: int
    weight: float
    document: str


@dataclass(frozen=True)
class PairExample:
    """One pair of a relation: the sentence, the two words, the head's choice, and its weight on the gold word."""

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
    texts = [piece for document in documents[:pieces] for piece in cut(loaded, document, 0, length=256, most=1)]
    examples: list[TokenExample] = []
    for batch in batches(texts, tokens=1024, pad=int(loaded.tokenizer.pad_token_id or 0), device=loaded.model.device):
        examples += _of_batch(loaded, batch, layer, head)
    examples.sort(key=lambda example: -example.weight)
    best: dict[tuple[str, str], TokenExample] = {}  # of each pair of tokens the first
    for example in examples:
        best.setdefault((example.token, example.target), example)
    return list(best.values())[:most], examples[::-1][:most]


def _of_batch(loaded: Loaded, batch: TextBatch, layer: int, head: int) -> list[TokenExample]:
    site = -1
    answers: list[tuple[Tensor, Tensor, Tensor]] = []

    def reduce(call: AttentionCall) -> None:
        nonlocal site
        site += 1
        if site == layer:
            visibility = Visibility(batch, call.scores.mask, call.shape[1])
            largest = call.matrix().reduce(MaxAmong(visibility.text))[0]
            answers.append((largest.values[:, head], largest.indices[:, head], visibility.rows))

    record_batch(loaded, batch.ids, batch.attention_mask, reduce=reduce)
    values, keys, rows = answers[0]
    return [
        _token_example(batch.pieces[b], i, int(keys[b, i]), float(values[b, i]))
        for b, i in rows.nonzero().tolist()
        if keys[b, i] >= 0
    ]


def _token_example(piece: Piece, i: int, j: int, weight: float) -> TokenExample:
    before = "".join(_spaced(text) for text in piece.texts[max(0, i - 8) : i])
    return TokenExample(before, piece.texts[i].strip(), piece.texts[j].strip(), j - i, weight, piece.document)


def _spaced(text: str) -> str:
    return text if text[:1].isspace() else f" {text}" if text[:1].isalnum() else text


def pair_examples(
    loaded: Loaded, examples: Sequence[Example], relation: str, layer: int, head: int, *, reverse: bool = False
) -> list[PairExample]:
    """What a head does with the pairs of a relation: hits first, each by its weight on the gold word.

    Args:
        loaded: The model.
        examples: Sentences; those without this relation are skipped, and those that the model cannot read.
        relation: Its name.
        layer: From 0.
        head: From 0.
        reverse: Whether the pair's target is the query.
    """
    shown: list[PairExample] = []
    for example in examples:
        if not any(pair.relation == relation for pair in example.pairs):
            continue
        try:
            tokens = tokenize(
                example.text, loaded.tokenizer, start_token_id=loaded.start_token_id, limit=loaded.context
            )
        except TextError:  # not counted either: no token is left of it, or more than the model reads
            continue
        words = words_of_tokens(tokens, example.words)
        present = [index in words for index in range(len(example.words))]
        pairs = directed_pairs(example, present, causal=loaded.causal)
        pairs = [pair for pair in pairs if (pair.relation, pair.reverse) == (relation, reverse)]
        if pairs:
            groups = torch.tensor(words)
            with torch.no_grad():
                weights = record_text(loaded, tokens)[layer].pool(groups, groups, "mass")[:, head : head + 1].cpu()
            with_tokens = torch.tensor([present[: weights.shape[-1]]])
            shown += [_pair_example(example, weights, with_tokens, p, causal=loaded.causal) for p in pairs]
    return sorted(shown, key=lambda pair: (-pair.hit, -pair.weight))


def _pair_example(
    example: Example, weights: Tensor, present: Tensor, pair: DirectedPair, *, causal: bool
) -> PairExample:
    """One pair and one head's weights between words, [1, 1, W, W]: a hit if it counts as one."""
    first, query, gold = (torch.tensor([index]) for index in (0, pair.query, pair.gold))
    hit = bool(count_hits(weights, query, first, query, gold, present, causal=causal))
    row = weights[0, 0, pair.query].masked_fill(~present[0], -1.0)
    row[pair.query] = -1.0
    if causal:
        row[pair.query :] = -1.0
    weight = float(row[pair.gold])
    if not hit:
        row[pair.gold] = -1.0  # a tie is no hit
    chosen = pair.gold if hit else int(row.argmax())
    query_word, gold_word, chosen_word = (example.word(index) for index in (pair.query, pair.gold, chosen))
    return PairExample(example.text, query_word, gold_word, chosen_word, weight, hit)
