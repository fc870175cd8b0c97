"""Examples of what heads do, in words: their largest and smallest weights on text, and pairs of related words.

They are collected in the same runs of the model as measures and counts, and are part of an atlas.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from headscope.heads.corpus import TextBatch

_MOST_TOKENS, _MOST_PAIRS = 4, 3  # examples of each kind that are kept of a head
_CONTEXT, _CONTEXT_TOKENS = 50, 12  # characters before a token, and the tokens that they are looked for in

Head = tuple[int, int]
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class TokenExample:
    """One token's largest weight: the text before it, the token, the token it attends to, and the weight."""

    before: str
    token: str
    target: str
    distance: int
    weight: float
    document: str


@dataclass
class TokenExamples:
    """For each head the tokens whose largest weight on text is largest, and those where it is smallest.

    Attributes:
        largest: By layer and head, the largest weight first; of each pair of tokens one example.
        smallest: The same, the smallest weight first.
    """

    largest: dict[Head, list[TokenExample]] = field(default_factory=dict)
    smallest: dict[Head, list[TokenExample]] = field(default_factory=dict)

    def add(self, batch: TextBatch, layer: int, weights: Tensor, keys: Tensor, rows: Tensor) -> None:
        """Add one layer of a batch; pieces whose tokens have no texts give no examples.

        Args:
            batch: The texts.
            layer: From 0.
            weights: [B, H, L], each row's largest weight on text.
            keys: [B, H, L], its key.
            rows: [B, L] bool, the rows that count.
        """
        has_texts = torch.tensor([bool(piece.texts) for piece in batch.pieces], device=rows.device)
        rows = rows & has_texts[:, None]
        places = rows.nonzero().tolist()
        by_row = weights.transpose(1, 2)[rows].cpu(), keys.transpose(1, 2)[rows].cpu()  # [N, H]
        for head, (values, targets) in enumerate(zip(by_row[0].T, by_row[1].T, strict=True)):
            order = values.argsort(dim=0, stable=True).tolist()
            for side, ordered in ((self.largest, reversed(order)), (self.smallest, iter(order))):
                candidates = (
                    _token_example(batch, places[n], int(targets[n]), float(values[n]))
                    for n in ordered
                    if targets[n] >= 0
                )
                side[layer, head] = _different(candidates)

    def merge(self, other: TokenExamples) -> None:
        """Add the examples of other texts."""
        for ours, theirs, sign in ((self.largest, other.largest, -1), (self.smallest, other.smallest, 1)):
            for head, examples in theirs.items():
                both = [*ours.get(head, []), *examples]
                ours[head] = _different(sorted(both, key=lambda example: sign * example.weight))

    def to_data(self) -> list[Any]:
        """As JSON data."""
        return [
            [layer, head, *([astuple(e) for e in side[layer, head]] for side in (self.largest, self.smallest))]
            for layer, head in self.largest
        ]

    @classmethod
    def from_data(cls, data: Iterable[Any]) -> TokenExamples:
        """What :meth:`to_data` gave. Raises TypeError or ValueError where something is missing."""
        examples = cls()
        for layer, head, largest, smallest in data:
            examples.largest[layer, head] = [TokenExample(*example) for example in largest]
            examples.smallest[layer, head] = [TokenExample(*example) for example in smallest]
        return examples


def _different(examples: Iterable[TokenExample]) -> list[TokenExample]:
    """The first few examples, of each pair of tokens the first one."""
    chosen: dict[tuple[str, str], TokenExample] = {}
    for example in examples:
        chosen.setdefault((example.token, example.target), example)
        if len(chosen) == _MOST_TOKENS:
            break
    return list(chosen.values())


def _token_example(batch: TextBatch, place: Sequence[int], j: int, weight: float) -> TokenExample:
    piece, i = batch.pieces[place[0]], place[1]
    before = " ".join("".join(piece.texts[max(0, i - _CONTEXT_TOKENS) : i]).split())[-_CONTEXT:]
    token, target = piece.texts[i].strip(), piece.texts[j].strip()
    return TokenExample(before, token, target, j - i, round(weight, 4), piece.document)


@dataclass(frozen=True, slots=True)
class KnownPair:
    """A pair of words in a sentence: the word ``query`` should attend to the word ``gold``, both given by index."""

    text: str
    words: tuple[Span, ...]
    query: int
    gold: int

    def word(self, index: int) -> str:
        """The text of a word."""
        start, end = self.words[index]
        return self.text[start:end]


@dataclass(frozen=True, slots=True)
class PairExample:
    """What one head does with a pair: its weight on the gold word, and on the strongest other candidate."""

    text: str
    query: str
    gold: str
    other: str
    weight: float
    other_weight: float

    @property
    def hit(self) -> bool:
        """Whether the head is right: a tie is not."""
        return self.weight > self.other_weight


@dataclass(eq=False)
class PairExamples:
    """For each head and direction of a relation the pairs with the largest and the smallest margin.

    The margin is the weight on the gold word minus that on the strongest other candidate: a hit's is above 0.

    Attributes:
        pairs: The pairs, each once.
        weights: By direction [K, 2, layers, H] float32: the weight on the gold word, and the margin, largest first.
        indices: By direction [K, 2, layers, H]: the number of the pair, and the index of the other word.
    """

    pairs: list[KnownPair] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    indices: dict[str, Tensor] = field(default_factory=dict)

    def add(self, direction: str, pairs: Sequence[KnownPair], gold: Tensor, other: Tensor, other_word: Tensor) -> None:
        """Add pairs of one direction.

        Args:
            direction: The relation's direction.
            pairs: N pairs.
            gold: [N, layers, H], each head's weight on the gold word.
            other: [N, layers, H], its largest weight on another candidate.
            other_word: [N, layers, H], the index of that candidate.
        """
        numbers = torch.arange(len(pairs)).view(-1, 1, 1).expand_as(other_word)
        weights, indices = torch.stack([gold, gold - other], 1).float(), torch.stack([numbers, other_word.long()], 1)
        self.merge(PairExamples(list(pairs), {direction: weights}, {direction: indices}))

    def merge(self, other: PairExamples) -> None:
        """Add the examples of other sentences."""
        shift = torch.tensor([len(self.pairs), 0]).view(2, 1, 1)
        self.pairs = [*self.pairs, *other.pairs]
        for direction, weights in other.weights.items():
            indices = other.indices[direction] + shift
            if direction in self.weights:
                weights = torch.cat([self.weights[direction], weights])
                indices = torch.cat([self.indices[direction], indices])
            order = weights[:, 1].argsort(dim=0, descending=True, stable=True)
            if len(order) > 2 * _MOST_PAIRS:
                order = torch.cat([order[:_MOST_PAIRS], order[-_MOST_PAIRS:]])
            rows = order[:, None].expand(-1, 2, -1, -1)
            self.weights[direction], self.indices[direction] = weights.gather(0, rows), indices.gather(0, rows)
        self._forget_unused()

    def _forget_unused(self) -> None:
        """Keep the pairs that are an example of some head."""
        used = sorted({number for indices in self.indices.values() for number in indices[:, 0].unique().tolist()})
        numbers = torch.zeros(len(self.pairs), dtype=torch.long)
        numbers[used] = torch.arange(len(used))
        self.pairs = [self.pairs[number] for number in used]
        for indices in self.indices.values():
            indices[:, 0] = numbers[indices[:, 0]]

    def without(self, directions: Collection[str]) -> PairExamples:
        """The examples of all other directions."""
        others = PairExamples(list(self.pairs))
        others.weights = {name: value.clone() for name, value in self.weights.items() if name not in directions}
        others.indices = {name: self.indices[name].clone() for name in others.weights}
        others._forget_unused()
        return others

    def of_head(self, direction: str, layer: int, head: int) -> list[PairExample]:
        """The examples of one head and direction, the largest margin first; empty if there are none."""
        if direction not in self.weights:
            return []
        examples = []
        places = self.weights[direction][..., layer, head].tolist(), self.indices[direction][..., layer, head].tolist()
        for (weight, margin), (number, other) in zip(*places, strict=True):
            pair = self.pairs[number]
            query, gold, other_word = (pair.word(index) for index in (pair.query, pair.gold, other))
            examples.append(PairExample(pair.text, query, gold, other_word, weight, weight - margin))
        return examples

    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Small tensors by name, and as JSON data the pairs and their sentences, as gaps and words in turn."""
        tensors = {f"weights/{name}": value.half() for name, value in self.weights.items()}
        tensors |= {f"indices/{name}": value.int() for name, value in self.indices.items()}
        numbers: dict[tuple[str, ...], int] = {}
        pairs = [
            [numbers.setdefault(_gaps_and_words(pair), len(numbers)), pair.query, pair.gold] for pair in self.pairs
        ]
        return tensors, {"sentences": [list(sentence) for sentence in numbers], "pairs": pairs}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> PairExamples:
        """What :meth:`to_state` gave. Raises KeyError, TypeError or ValueError where something is missing."""
        sentences = [_text_and_words(sentence) for sentence in data["sentences"]]
        if any(not 0 <= sentence < len(sentences) for sentence, _, _ in data["pairs"]):
            raise ValueError("an example is of a sentence that is not there")
        pairs = [(*sentences[sentence], query, gold) for sentence, query, gold in data["pairs"]]
        examples = cls([KnownPair(text, words, query, gold) for text, words, query, gold in pairs])
        for name, value in tensors.items():
            kind, _, direction = name.partition("/")
            if kind == "weights":
                indices = tensors[f"indices/{direction}"].long()
                if indices.shape != value.shape or int(indices[:, 0].max()) >= len(examples.pairs):
                    raise ValueError(f"the examples of {direction!r} do not fit their sentences")
                examples.weights[direction], examples.indices[direction] = value.float(), indices
        return examples


def _gaps_and_words(pair: KnownPair) -> tuple[str, ...]:
    """A sentence cut at the bounds of its words: every second part is a word, the others are what lies between."""
    bounds = [0, *(bound for span in pair.words for bound in span), len(pair.text)]
    return tuple(pair.text[start:end] for start, end in pairwise(bounds))


def _text_and_words(parts: Sequence[str]) -> tuple[str, tuple[Span, ...]]:
    bounds = list(accumulate(map(len, parts)))[:-1]
    return "".join(parts), tuple(zip(bounds[::2], bounds[1::2], strict=True))
