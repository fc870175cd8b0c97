"""Run a model over sentences with known pairs, and count which words its heads attend to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from headscope.errors import HeadscopeError, TextError, is_out_of_memory
from headscope.heads.corpus import by_length
from headscope.heads.examples import KnownPair
from headscope.heads.relations.counts import RelationCounts, direction_of
from headscope.heads.relations.hits import (
    class_ids,
    count_class_baseline,
    count_controls,
    pair_weights,
    strongest_words,
)
from headscope.heads.relations.sentences import Example
from headscope.models.loading import Loaded
from headscope.models.tokens import Tokens, tokenize
from headscope.ops.reductions import Pool
from headscope.watching.hooks import AttentionCall
from headscope.watching.texts import record_batch

_ROWS_AT_ONCE = 256  # query words of one text that are pooled together
_MAX_UNKNOWN = 0.05
_MAX_PER_CHARACTER = 1.2

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class DirectedPair:
    """One pair in one direction: does the word `query` attend to the word `gold`?

    Attributes:
        relation: The relation's name.
        reverse: Whether the pair's target is the query.
        query: Index of the word that attends.
        gold: Index of the word that it should attend to.
    """

    relation: str
    reverse: bool
    query: int
    gold: int


def words_of_tokens(tokens: Tokens, words: Sequence[Span]) -> list[int]:
    """For each token the index of the word that it overlaps most, the first of equals; -1 if none or special."""
    indices, first = [], 0
    for (start, end), special in zip(tokens.offsets, tokens.special, strict=True):
        best, most = -1, 0
        while first < len(words) and words[first][1] <= start and not special:
            first += 1
        for index in range(max(0, first - 1), len(words)):
            if special or words[index][0] >= end:
                break
            shared = min(end, words[index][1]) - max(start, words[index][0])
            if shared > most:
                best, most = index, shared
        indices.append(best)
    return indices


def directed_pairs(example: Example, present: Sequence[bool], *, causal: bool) -> list[DirectedPair]:
    """The pairs of which both words have tokens and the query has at least two candidates, in both directions.

    Args:
        example: The sentence and its pairs.
        present: For each word whether it has tokens.
        causal: Whether a word sees only those before it.
    """
    before = list(accumulate(present, initial=0))  # for each word how many with tokens stand before it
    pairs = []
    for pair in example.pairs:
        for reverse in (False, True):
            query, gold = (pair.target, pair.source) if reverse else (pair.source, pair.target)
            if query == gold or not present[query] or not present[gold] or (causal and gold > query):
                continue
            candidates = before[query] if causal else before[-1] - 1
            if candidates >= 2:
                pairs.append(DirectedPair(pair.relation, reverse, query, gold))
    return pairs


@dataclass(frozen=True, slots=True)
class _Tokenized:
    """An example and its tokens."""

    example: Example
    ids: tuple[int, ...]
    words: list[int]
    present: list[bool]
    pairs: list[DirectedPair]


@dataclass(frozen=True, eq=False, slots=True)
class _Chunk:
    """Some of a batch's words, whose rows are pooled together."""

    pool_rows: Tensor  # [B, L]: which row of the map each token adds to, -1 for none
    index: list[int]  # which of the batch's pairs these are
    words: Tensor  # [B, R]: the word of each row, -1 for none
    row: Tensor  # [N]
    text: Tensor
    query: Tensor
    gold: Tensor


def count_relations(
    loaded: Loaded,
    examples: Sequence[Example],
    *,
    batch_tokens: int = 2048,
    on_progress: Callable[[int, int], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> RelationCounts:
    """Count for every head how often its strongest weight from a word is on the word that belongs to it.

    Each pair is counted in both directions. Weights between tokens become weights between words: columns are
    summed, rows averaged (arXiv 1906.04341). Weight on the word itself, on special tokens and on tokens of
    no word is left out. In a decoder only pairs whose gold word stands before the query are counted.

    Args:
        loaded: The model.
        examples: The sentences.
        batch_tokens: How many tokens are run at once, padding included; halved, with a note, where memory is short.
        on_progress: Called after each batch with how many examples are done, and of how many.
        on_note: Called with what a reader of the counts should know.

    Raises:
        HeadscopeError: The model's attention is not between the tokens of its text.
    """
    tokenized, skipped, empty = _tokenize(loaded, examples)
    counts = RelationCounts()
    done = 0
    work = list(by_length(tokenized, lambda item: len(item.ids), batch_tokens))
    while work:
        batch = work.pop(0)
        with_pairs = [item for item in batch if item.pairs]
        try:
            if with_pairs:
                counts.merge(_count_batch(loaded, with_pairs))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or len(with_pairs) == 1:
                raise
            middle = len(with_pairs) // 2
            work[:0] = [with_pairs[:middle], with_pairs[middle:]]
            done += len(batch) - len(with_pairs)
            if on_note is not None:
                on_note("Not enough memory for whole batches of sentences: smaller ones were used.")
            continue
        done += len(batch)
        if on_progress is not None:
            on_progress(done, len(tokenized))
    counts.examples, counts.skipped, counts.empty = len(tokenized), skipped, empty
    if empty and on_note is not None:
        on_note(f"Sentences of which the tokenizer keeps nothing were left out: {empty}.")
    return counts


def _tokenize(loaded: Loaded, examples: Sequence[Example]) -> tuple[list[_Tokenized], int, int]:
    """What can be run; how many are longer than the model reads, and of how many the tokenizer keeps nothing."""
    tokenized, skipped, empty = [], 0, 0
    for example in examples:
        try:
            tokens = tokenize(example.text, loaded.tokenizer, start_token_id=loaded.start_token_id)
        except TextError:
            empty += 1
            continue
        if loaded.context is not None and len(tokens) > loaded.context:
            skipped += 1
            continue
        words = words_of_tokens(tokens, example.words)
        with_tokens = set(words)
        present = [index in with_tokens for index in range(len(example.words))]
        pairs = directed_pairs(example, present, causal=loaded.causal)
        tokenized.append(_Tokenized(example, tokens.ids, words, present, pairs))
    return tokenized, skipped, empty


def _count_batch(loaded: Loaded, batch: list[_Tokenized]) -> RelationCounts:
    length = max(len(item.ids) for item in batch)
    ids = torch.full((len(batch), length), _padding(loaded.tokenizer))
    mask = torch.zeros(len(batch), length, dtype=torch.long)
    columns = torch.full((len(batch), length), -1)
    present = torch.zeros(len(batch), max(len(item.present) for item in batch), dtype=torch.bool)
    classes = torch.full(present.shape, -1)
    for i, item in enumerate(batch):
        ids[i, : len(item.ids)] = torch.tensor(item.ids)
        mask[i, : len(item.ids)] = 1
        columns[i, : len(item.ids)] = torch.tensor(item.words)
        present[i, : len(item.present)] = torch.tensor(item.present)
        classes[i, : len(item.present)] = class_ids(item.example)
    used = int(columns.max()) + 1  # words behind the last one with tokens have no column
    present, classes = present[:, :used], classes[:, :used]
    chunks, pair_words = list(_chunks(batch, columns)), _pair_words(batch)
    total, causal = len(pair_words[0]), loaded.causal

    def count(call: AttentionCall) -> tuple[Tensor, ...]:
        if tuple(call.shape[-2:]) != (length, length) or call.shape[0] != len(batch):
            raise HeadscopeError(
                f"{loaded.name} has attention of shape {tuple(call.shape)}, but was given {len(batch)} texts of "
                f"{length} tokens: its positions are not those of the text, so no words can be put on them."
            )
        gold, other, baseline = (torch.zeros(total, call.shape[1]) for _ in range(3))
        other_word = torch.zeros(total, call.shape[1], dtype=torch.long)
        contested = torch.zeros(total, 1, dtype=torch.bool)
        chosen = []
        for chunk in chunks:
            (pooled,) = call.matrix().reduce(Pool(chunk.pool_rows, columns, "mass"))
            word_map = pooled.cpu()
            chosen.append(strongest_words(word_map, chunk.words, present, causal=causal))
            rows = (word_map, chunk.row, chunk.text, chunk.query, chunk.gold, present)
            gold[chunk.index], other[chunk.index], other_word[chunk.index] = pair_weights(*rows, causal=causal)
            baseline[chunk.index], contested[chunk.index, 0] = count_class_baseline(*rows, classes, causal=causal)
        every_row = torch.cat(chosen, -1), torch.cat([chunk.words for chunk in chunks], -1)
        controls = count_controls(*every_row, *pair_words, classes, causal=causal)
        return controls, baseline, gold, other, other_word, contested

    layers = [answer.values for answer in record_batch(loaded, ids, mask, reduce=count).answers]
    counts = RelationCounts([layer[0].shape[1] for layer in layers])
    controls, baseline, *weights = (_side_by_side([layer[which] for layer in layers]) for which in range(5))
    hits, contested = (weights[0] > weights[1]).double(), layers[0][-1]
    pairs = [(item.example, pair) for item in batch for pair in item.pairs]
    for number, (example, pair) in enumerate(pairs):
        key = (pair.relation, direction_of(pair.relation, pair.reverse), example.half)
        class_baseline = baseline[number] if contested[number] else None
        offset = pair.gold - pair.query
        counts.add(key, example.cluster, hits[number], offset, controls[number], class_baseline)
    _add_examples(counts, pairs, weights)
    return counts


def _add_examples(
    counts: RelationCounts, pairs: Sequence[tuple[Example, DirectedPair]], weights: Sequence[Tensor]
) -> None:
    """Add the pairs of the second half as examples, by direction.

    Args:
        counts: The counts.
        pairs: N pairs.
        weights: What `pair_weights` gives, [N, layers, H] each.
    """
    numbers: dict[str, list[int]] = {}
    for number, (example, pair) in enumerate(pairs):
        if example.half == 1:
            numbers.setdefault(direction_of(pair.relation, pair.reverse), []).append(number)
    for direction, chosen in numbers.items():
        known = [KnownPair(e.text, e.words, p.query, p.gold) for e, p in (pairs[number] for number in chosen)]
        counts.pair_examples.add(direction, known, *(part[chosen] for part in weights))


def _pair_words(batch: list[_Tokenized]) -> tuple[Tensor, Tensor, Tensor]:
    """For each pair of a batch its text, its query and its gold word: [N] each."""
    rows = [(i, pair.query, pair.gold) for i, item in enumerate(batch) for pair in item.pairs]
    text, query, gold = torch.tensor(rows).unbind(1)
    return text, query, gold


def _side_by_side(layers: Sequence[Tensor]) -> Tensor:
    """[N, H] of each layer as [N, layers, heads], with 0 for heads that a layer does not have."""
    widest = max(layer.shape[1] for layer in layers)
    return torch.stack([torch.nn.functional.pad(x, (0, widest - x.shape[1])) for x in layers], 1).double()


def _chunks(batch: list[_Tokenized], columns: Tensor) -> Iterator[_Chunk]:
    """The words of each text, at most 256 of a text at a time."""
    queries = [sorted({word for word in item.words if word >= 0}) for item in batch]
    for start in range(0, max(map(len, queries)), _ROWS_AT_ONCE):
        pool_rows = torch.full_like(columns, -1)
        words = torch.full((len(batch), min(_ROWS_AT_ONCE, max(map(len, queries)) - start)), -1)
        index, pairs, number = [], [], 0
        for i, item in enumerate(batch):
            row_of = {word: row for row, word in enumerate(queries[i][start : start + _ROWS_AT_ONCE])}
            if row_of:
                table = torch.full((len(item.present) + 1,), -1)  # its last entry is for tokens of no word
                table[list(row_of)] = torch.tensor(list(row_of.values()))
                pool_rows[i] = table[columns[i]]
                words[i, : len(row_of)] = torch.tensor(list(row_of))
            for pair in item.pairs:
                if pair.query in row_of:
                    index.append(number)
                    pairs.append((row_of[pair.query], i, pair.query, pair.gold))
                number += 1
        yield _Chunk(pool_rows, index, words, *torch.tensor(pairs, dtype=torch.long).reshape(-1, 4).unbind(1))


def _padding(tokenizer: Any) -> int:
    padding = getattr(tokenizer, "pad_token_id", None)
    return 0 if padding is None else int(padding)


def can_read(loaded: Loaded, texts: Sequence[str]) -> tuple[bool, str]:
    """Whether the model reads a language, judged by its tokens of these texts; and the reason, a doubt, or "".

    It does with at most 5 % unknown tokens and, where most letters are Chinese, at most 1.2 tokens per character: a
    model that sees characters only as bytes has not learned their words. In other scripts more tokens per character
    are only a doubt: a model may have learned from bytes.
    """
    tokens = unknown = letters = characters = chinese = 0
    for text in texts:
        try:
            cut = tokenize(text, loaded.tokenizer)
        except TextError:  # nothing is left of it to be known or unknown
            continue
        tokens += len(cut) - sum(cut.special)
        unknown += sum(cut.unknown)
        letters += len(text)
        characters += sum(not c.isspace() for c in text)
        chinese += sum("\u3400" <= c <= "\u9fff" for c in text)
    if unknown > _MAX_UNKNOWN * tokens:
        return (
            False,
            f"{100 * unknown / tokens:.0f} % of the tokens are unknown to it, more than {100 * _MAX_UNKNOWN:.0f} %",
        )
    if chinese > characters / 2 and tokens > _MAX_PER_CHARACTER * characters:
        return False, (
            f"it needs {tokens / characters:.2f} tokens per Chinese character, more than {_MAX_PER_CHARACTER}"
        )
    if tokens > _MAX_PER_CHARACTER * letters:
        return True, f"it needs {tokens / letters:.2f} tokens per character, and may know the words as bytes only"
    return True, ""
