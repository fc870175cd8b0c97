"""Which word each head looks at hardest: whether that is the right one, and by what luck it would be."""

from __future__ import annotations

import torch
from torch import Tensor

from headscope.heads.relations.sentences.pairs import Example

__all__ = ["count_blind", "count_controls", "count_hits", "numbered", "strongest"]


def numbered(example: Example) -> Tensor:
    """Each word's class as a number, [W]; -1 for none."""
    known = {name: number for number, name in enumerate(sorted(set(example.classes) - {""}))}
    return torch.tensor([known.get(example.class_of(i), -1) for i in range(len(example.words))])


def count_hits(
    word_map: Tensor, row: Tensor, text: Tensor, query: Tensor, gold: Tensor, present: Tensor, *, causal: bool
) -> Tensor:
    """Whether each head's strongest weight, of those a question chooses from, is on the gold word: [N, H] bool.

    The word itself is left out, and in a decoder every word behind it. A tie with the gold word is no hit, so
    a head that gives every word the same, or none anything, never hits.

    Args:
        word_map: [B, H, R, W], the weights of some words' rows on all words.
        row: [N], the row of each question's query in its text's map.
        text: [N], its text in the batch.
        query: [N], the word that looks.
        gold: [N], the word that it should look at.
        present: [B, W] bool, the words that have tokens.
        causal: Whether a word sees only those before it.
    """
    right = torch.arange(word_map.shape[-1], device=word_map.device) == gold[:, None]
    return _strongest_in(right, word_map[text, :, row], _choice(text, query, present, causal))


def count_blind(
    word_map: Tensor,
    row: Tensor,
    text: Tensor,
    query: Tensor,
    gold: Tensor,
    present: Tensor,
    classes: Tensor,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """What each head would hit if it took any word of the gold word's class alike: [N, H]; and which have rivals, [N].

    A head that looks at a noun, and not at which one, is right for one pair in two where there are two.

    Args:
        word_map: As in `count_hits`, and so are the arguments that follow it.
        row: [N]
        text: [N]
        query: [N]
        gold: [N]
        present: [B, W] bool.
        classes: [B, W], a number for each class of words, -1 for none.
        causal: Whether a word sees only those before it.
    """
    choice = _choice(text, query, present, causal)
    its = classes[text].gather(1, gold[:, None])
    alike = choice & (classes[text] == its) & (its >= 0)  # the gold word among them
    found = _strongest_in(alike, word_map[text, :, row], choice)
    number = alike.sum(-1)
    return found / number.clamp(min=1)[:, None], number > 1


def strongest(word_map: Tensor, words: Tensor, present: Tensor, *, causal: bool) -> Tensor:
    """Which word each word of some rows looks at hardest, [B, H, R]; -1 for a tie, -2 where there is no choice of two.

    Args:
        word_map: [B, H, R, W], as in `count_hits`.
        words: [B, R], the word of each row, -1 for none.
        present: [B, W] bool, the words that have tokens.
        causal: Whether a word sees only those before it.
    """
    columns = torch.arange(word_map.shape[-1], device=word_map.device)
    asks = words[..., None]
    choice = present[:, None] & (columns < asks if causal else columns != asks)  # [B, R, W]
    weights = word_map.masked_fill(~choice[:, None], -1.0)
    best = weights.amax(-1, keepdim=True)
    found = torch.where((weights == best).sum(-1) == 1, weights.argmax(-1), -1)
    return found.masked_fill((choice.sum(-1) < 2)[:, None], -2)


def count_controls(
    chosen: Tensor, words: Tensor, text: Tensor, query: Tensor, gold: Tensor, classes: Tensor, *, causal: bool
) -> Tensor:
    """How often other words that may see the gold word look at it hardest, in each head: [N, H], 0 to 1.

    A head that likes the gold word whoever asks has not found a relation. The others are the words of the query's
    class; where there are none, all. In an encoder it is the share among those on the query's side of the gold word
    if that is larger: a head may look back alone.

    Args:
        chosen: [B, H, R], as `strongest` gives it.
        words: [B, R], the word of each row, -1 for none.
        text: [N], each question's text in the batch.
        query: [N], the word that looks.
        gold: [N], the word that it should look at.
        classes: [B, W], a number for each class of words, -1 for none.
        causal: Whether a word sees only those before it.
    """
    asking = words[text]  # [N, R]
    others = (asking >= 0) & (chosen[:, 0] > -2)[text] & (asking != query[:, None]) & (asking != gold[:, None])
    if causal:
        others &= asking > gold[:, None]
    theirs, its = classes.gather(1, words.clamp(min=0))[text], classes[text].gather(1, query[:, None])
    others = _or_all(others & (theirs == its) & (its >= 0), others)
    here = others & ((asking > gold[:, None]) == (query > gold)[:, None])
    hits = chosen[text] == gold[:, None, None]
    return torch.maximum(_share(hits, others), _share(hits, here))


def _or_all(some: Tensor, others: Tensor) -> Tensor:
    """Some of each row's [N, R]; all where there are none."""
    return torch.where(some.any(-1, keepdim=True), some, others)


def _share(hits: Tensor, among: Tensor) -> Tensor:
    """The share of hits [N, H, R] among some of the words [N, R]; 0 where there are none."""
    return (hits & among[:, None]).sum(-1) / among.sum(-1).clamp(min=1)[:, None]


def _choice(text: Tensor, query: Tensor, present: Tensor, causal: bool) -> Tensor:
    """Which words a question chooses from, [N, W]."""
    columns = torch.arange(present.shape[-1], device=present.device)
    return present[text] & (columns < query[:, None] if causal else columns != query[:, None])


def _strongest_in(right: Tensor, weights: Tensor, choice: Tensor) -> Tensor:
    """Whether the strongest of a choice [N, W] is among the right ones, by weights [N, H, W]; a tie is not: [N, H]."""
    inside = weights.masked_fill(~(choice & right)[:, None], -1.0).amax(-1)
    return inside > weights.masked_fill(~(choice & ~right)[:, None], -1.0).amax(-1)
