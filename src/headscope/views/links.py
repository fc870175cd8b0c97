"""The strongest links between the words of a text: which word looks at which, in which head, and how much.

A model's weights are between tokens; here they become weights between words by Clark's rule: the
columns of a split word are summed, its rows averaged (arXiv 1906.04341). The weight on special tokens (the
start token, [CLS], [SEP]) and on the word itself is not listed among the links: it would hide them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headscope.models.tokens import Tokens, Word
from headscope.ops.matrix import AttentionMatrix
from headscope.views.words import (
    FEW_WORDS,
    Positions,
    all_words,
    column_of,
    default_words,
    label,
    percent,
    quote,
    rows_of,
)
from headscope.watching.recording import Recording


@dataclass(frozen=True, order=True, slots=True)
class Head:
    """A head, written 13.8: layer 13, head 8, both counted from 0.

    >>> print(Head(13, 8))
    13.8
    """

    layer: int
    head: int

    def __str__(self) -> str:
        return f"{self.layer}.{self.head}"


@dataclass(frozen=True, slots=True)
class Link:
    """One head's weight from a word to another.

    Attributes:
        layer: The layer, from 0.
        head: The head in it, from 0.
        source: The word that looks (the query).
        target: The word that is looked at (the key).
        weight: The share of the head's attention, from 0 to 1.
        word_distance: How many words further the target stands; -1 is the word before.
        token_distance: The same between their first tokens.
    """

    layer: int
    head: int
    source: Word
    target: Word
    weight: float
    word_distance: int
    token_distance: int


@dataclass(frozen=True, eq=False, slots=True)
class Unlisted:
    """A word's attention on no other word: each [layers, heads]; NaN for heads that were not read.

    Attributes:
        source: The word.
        special: On the start token and other special tokens.
        itself: On the word itself.
        blank: On tokens that are spaces or line ends alone.
    """

    source: Word
    special: Tensor
    itself: Tensor
    blank: Tensor


@dataclass(frozen=True, eq=False)
class TextLinks:
    """The strongest links of one text. Made by `find_links`.

    Attributes:
        tokens: The text.
        sources: The words that look; empty if that is every word (with a target only).
        target: The word that all links lead to; None for any.
        head: The one head of the links; None for all heads.
        links: The strongest links: by source in the order of `sources`, then by weight.
        unlisted: The attention on no other word, for each word in `sources`.
        heads_above_tenth: For a target: how many heads give it more than a tenth.
        heads: Heads in each layer.
        proof: The largest relative difference between weights × values and the output of the model's own
            attention; None if they could not be compared.
        notes: What a reader should know about these links.
    """

    tokens: Tokens
    sources: tuple[Word, ...]
    target: Word | None
    head: Head | None
    links: tuple[Link, ...]
    unlisted: tuple[Unlisted, ...]
    heads_above_tenth: int
    heads: tuple[int, ...]
    proof: float | None
    notes: tuple[str, ...]


def find_links(
    recording: Recording,
    tokens: Tokens,
    sources: Sequence[Word] = (),
    *,
    target: Word | None = None,
    head: Head | None = None,
    top: int | None = None,
    causal: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> TextLinks:
    """The strongest links between words.

    Memory grows with the text, not with its square: each layer is read for the sources only,
    and only the strongest heads of each pair of words are kept.

    Args:
        recording: The model's run over the text.
        tokens: The text.
        sources: The words that look. By default `default_words`; every word with a target alone, or with a
            head if the text is short.
        target: Only links to this word.
        head: Only this head.
        top: How many words for each word, and how many heads for each pair of words. By default 5
            and 4; 10 heads for a source and a target, 3 words for each word of a head.
        causal: Whether a word sees only those before it (for the notes alone).
        on_progress: Called after each layer with how many are done, and of how many.

    Raises:
        ValueError: There is no such head, `top` is below 1, or a phrase is not joined to one word: `tokens.joined`.
    """
    if top is not None and top < 1:
        raise ValueError(f"top is {top}: how many links to show, at least 1.")
    if head is not None:
        head = head_of(str(head), recording)
    every_source = target is not None and not sources
    if not sources and not every_source:
        short = head is not None and len(tokens.words) <= FEW_WORDS
        sources = tokens.words if short else default_words(tokens)
    sources = tokens.words if every_source else tuple(dict.fromkeys(sources))
    heads_per_pair = 1 if head else top or (10 if target and not every_source else 4)
    finder = _Finder(tokens, sources, target, heads_per_pair)
    layers = range(len(recording)) if head is None else [head.layer]
    for done, layer in enumerate(layers, 1):
        finder.add(layer, recording[layer], None if head is None else head.head)
        if on_progress is not None:
            on_progress(done, len(layers))
    heads = tuple(int(site.shape[1]) for site in recording.sites)
    return TextLinks(
        tokens=tokens,
        sources=() if every_source else sources,
        target=target,
        head=head,
        links=finder.links(top or (5 if head is None else 10 if every_source else 3), by_source=not every_source),
        unlisted=() if every_source else finder.unlisted(heads),
        heads_above_tenth=finder.heads_above_tenth,
        heads=heads,
        proof=recording.proof,
        notes=_notes(recording, tokens, () if every_source else sources, target, causal),
    )


def split_head(text: str) -> tuple[int, int]:
    """The layer and the head of "13.8", whether there are such or not.

    Raises:
        ValueError: It is not written so.

    >>> split_head("13.8")
    (13, 8)
    """
    match = re.fullmatch(r"(\d+)\.(\d+)", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a head. Write layer.head, both counted from 0: 13.8")
    return int(match[1]), int(match[2])


def head_of(text: str, recording: Recording) -> Head:
    """The head that is written "13.8".

    Raises:
        ValueError: It is not written so, or the model has no such head.
    """
    layer, head = split_head(text)
    if layer >= len(recording):
        raise ValueError(
            f"There is no layer {layer}: the model has {len(recording)} attention layers, 0 to {len(recording) - 1}."
        )
    count = int(recording.sites[layer].shape[1])
    if head >= count:
        raise ValueError(f"There is no head {head}: layer {layer} has {count} heads, 0 to {count - 1}.")
    return Head(layer, head)


class _Finder:
    """Takes one layer after another; keeps the strongest heads for each pair of words."""

    def __init__(self, tokens: Tokens, sources: Sequence[Word], target: Word | None, heads_per_pair: int) -> None:
        words = set(tokens.words)
        for word in (*sources, *(() if target is None else (target,))):
            if word not in words:
                raise ValueError(f"{word.text!r} is not one word of these tokens: pass tokens.joined([{word.text!r}]).")
        self.tokens, self.sources, self.target = tokens, sources, target
        self.positions = Positions(tokens)
        self.index = torch.tensor([self.positions.index[word.start] for word in sources])
        self.every_source = target is not None and len(sources) == len(tokens.words)
        self.heads_per_pair, self.heads_above_tenth = heads_per_pair, 0
        width = self.positions.count if target is None else 1
        self.weights = torch.zeros(len(sources), width, heads_per_pair)
        self.layers = torch.full((len(sources), width, heads_per_pair), -1)
        self.heads = torch.full((len(sources), width, heads_per_pair), -1)
        self.unlisted_weights: dict[int, Tensor] = {}

    def add(self, layer: int, matrix: AttentionMatrix, head: int | None) -> None:
        """Read one layer."""
        shares = self._read(layer, matrix)  # [H, n, W']
        if head is not None:
            shares = torch.zeros_like(shares).index_copy_(0, torch.tensor([head]), shares[[head]])
        self.heads_above_tenth += int((shares > 0.1).sum()) if self.target is not None else 0
        weights = torch.cat([self.weights, shares.permute(1, 2, 0)], -1)
        numbers = torch.arange(len(shares)).expand(*shares.shape[1:], -1)
        heads = torch.cat([self.heads, numbers], -1)
        layers = torch.cat([self.layers, torch.full_like(numbers, layer)], -1)
        self.weights, best = weights.topk(self.heads_per_pair, -1)
        self.heads, self.layers = heads.gather(-1, best), layers.gather(-1, best)

    def _read(self, layer: int, matrix: AttentionMatrix) -> Tensor:
        few = self.positions.count <= FEW_WORDS
        if self.every_source and not few and self.target is not None:
            return column_of(matrix, self.positions, self.target)
        if few:
            rows = all_words(matrix, self.positions)[:, self.index]
        else:
            rows = rows_of(matrix, self.positions, self.sources)
        count = self.positions.count
        itself = rows.gather(-1, self.index.view(1, -1, 1).expand(len(rows), -1, 1))
        self.unlisted_weights[layer] = torch.cat([rows[..., count:], itself], -1)
        if self.target is None:
            return rows[..., :count]
        column = self.positions.index[self.target.start]
        return rows[..., column : column + 1]

    def links(self, top: int, *, by_source: bool) -> tuple[Link, ...]:
        """The strongest: for each source its ``top`` targets; or the ``top`` sources of the target."""
        groups = [self._of_source(i, top) for i in range(len(self.sources))]
        if not by_source:
            groups = sorted((links for links in groups if links), key=lambda links: -links[0].weight)[:top]
        return tuple(link for links in groups for link in links)

    def _of_source(self, i: int, top: int) -> list[Link]:
        source = self.sources[i]
        best = self.weights[i, :, 0].clone()
        if self.target is None:
            best[self.index[i]] = 0
        elif self.every_source and self.target.start == source.start:
            best[0] = 0
        links = []
        for column in best.topk(min(top, len(best))).indices[: int((best > 0).sum())].tolist():
            target = self.target or self.tokens.words[column]
            shares = self.weights[i, column].tolist()
            for weight, layer, head in zip(
                shares, self.layers[i, column].tolist(), self.heads[i, column].tolist(), strict=True
            ):
                if weight > 0:
                    words = self.positions.index[target.start] - int(self.index[i])
                    tokens = target.tokens[0] - source.tokens[0]
                    links.append(Link(layer, head, source, target, weight, words, tokens))
        return sorted(links, key=lambda link: -link.weight)

    def unlisted(self, heads: Sequence[int]) -> tuple[Unlisted, ...]:
        """The attention on no other word."""
        whole = torch.full((len(heads), max(heads), len(self.sources), 3), torch.nan)
        for layer, part in self.unlisted_weights.items():
            whole[layer, : len(part)] = part
        return tuple(
            Unlisted(word, whole[:, :, i, 0], whole[:, :, i, 2], whole[:, :, i, 1])
            for i, word in enumerate(self.sources)
        )


def _notes(
    recording: Recording, tokens: Tokens, sources: Sequence[Word], target: Word | None, causal: bool
) -> tuple[str, ...]:
    notes = []
    if recording.unseen:
        notes.append(f"This is a part of the model: {len(recording.unseen)} of its attention modules were not seen.")
    for source in sources if target is not None and causal else ():
        if target is not None and target.start > source.start:
            earlier, later = label(tokens, source), label(tokens, target)
            notes.append(
                f"{earlier!r} gives nothing to {later!r}: in a decoder a word can only look back. "
                f"Ask the other way round: --from {quote(later)} --to {quote(earlier)}"
            )
    first = tokens.words[0]
    if causal and target is None and first in sources:
        notes.append(f"{label(tokens, first)!r} is the first word: in a decoder it has no word to look back at.")
    if tokens.unknown_share > 0.05:
        notes.append(f"{percent(tokens.unknown_share)} of this text's tokens are unknown to the model.")
    return tuple(notes)
