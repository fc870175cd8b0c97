"""Weights between words, which words to show, and how words and shares are written.

Tokens become words by Clark's rule: the columns of a split word are summed, its rows averaged
(arXiv 1906.04341). After the columns of the words come two more: the weight on special tokens (the start
token, [CLS], [SEP]), and on tokens of spaces alone.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import torch
from torch import Tensor

from headscope.errors import TextError
from headscope.models.encoding import start_in_words
from headscope.models.tokens import Tokens, Word
from headscope.ops.matrix import AttentionMatrix

FEW_WORDS = 400  # up to here the map of all words by all words is made, one layer at a time


def label(tokens: Tokens, word: Word) -> str:
    """How to ask for a word: its text, and its number if it is there more than once, as in "it#2"."""
    same = [other.start for other in tokens.words if other.text == word.text]
    return word.text if len(same) == 1 else f"{word.text}#{same.index(word.start) + 1}"


def quote(text: str) -> str:
    """A text as one word of a shell: in double quotes if it has an apostrophe and nothing that these would change.

    >>> print(quote("didn't"), quote("a b"), quote("it"))
    "didn't" 'a b' it
    """
    return f'"{text}"' if "'" in text and not set(text) & set('"$`\\!') else shlex.quote(text)


def shown_name(tokens: Tokens, word: Word) -> str:
    """What the model reads of a word: its label; of one that its vocabulary lacks the unknown token, as "[UNK]#2"."""
    unread = [other.start for other in tokens.words if all(tokens.unknown[token] for token in other.tokens)]
    if word.start not in unread:
        return label(tokens, word)
    name = tokens.pieces[word.tokens[0]]
    return name if len(unread) == 1 else f"{name}#{unread.index(word.start) + 1}"


def start_token(tokens: Tokens) -> str:
    """The token before the text, as "start token <s> (1)", or that there is none."""
    return start_in_words(tokens.ids[0], tokens.pieces[0]) if tokens.special[0] else start_in_words(None)


def percent(share: float, digits: int = 0) -> str:
    """A share as people read it, on one line: "96 %".

    >>> percent(0.9612).split()
    ['96', '%']
    """
    return f"{share * 100:.{digits}f}\N{NO-BREAK SPACE}%"


def _words(listed: str) -> frozenset[str]:
    return frozenset(listed.split())


_PRONOUNS = _words("it he she they him her them itself himself herself themselves who whom 它 他 她 牠 它们 他们 她们")
_FUNCTION = _words(
    """a an the this that these those i you we us me my your his its our their of in on at to from by with for about
    into over under after before and or but nor so yet because since as if when while although though than then is am
    are was were be been being do does did has have had will would can could shall should may might must not no too
    very also just there here what which where how why don't doesn't didn't isn't aren't wasn't weren't won't can't
    的 了 着 过 吗 呢 吧 啊 是 在 和 与 也 都 就 不 没 有 把 被 给 很 太 这 那 我 你 们"""
)


def default_words(tokens: Tokens, limit: int = 4) -> tuple[Word, ...]:
    """The words that are shown when none is named: at most four.

    The last two pronouns of the third person (it, she, 他 …), because they stand for another word, then
    the last words that are not function words (the, because, was …), because they have the most to look
    back at; if there are none of these, the last words.
    """
    folded = [word.text.replace("’", "'").casefold() for word in tokens.words]
    visible = [i for i, text in enumerate(folded) if any(c.isalnum() for c in text)] or list(range(len(folded)))
    pronouns = [i for i in visible if folded[i] in _PRONOUNS][-2:]
    content = [i for i in reversed(visible) if folded[i] not in _PRONOUNS | _FUNCTION]
    chosen = list(dict.fromkeys(pronouns + content))[:limit] or visible[-limit:]
    return tuple(tokens.words[i] for i in chosen)


def word_map(matrix: AttentionMatrix, tokens: Tokens, head: int) -> Tensor:
    """One head's map between words, [W, W + 2]; the last columns: on special tokens, on blanks.

    Raises:
        TextError: The text has too many words for such a map.
    """
    count = len(tokens.words)
    if count > FEW_WORDS:
        raise TextError(f"The text has {count} words, and a map of words is made for at most {FEW_WORDS}.")
    return all_words(matrix, Positions(tokens))[head]


class Positions:
    """Which word each token belongs to."""

    def __init__(self, tokens: Tokens) -> None:
        self.count = len(tokens.words)
        self.rows = torch.tensor(tokens.word_ids())
        special = torch.tensor(tokens.special)
        other = torch.where(special, self.count, self.count + 1)
        self.columns = torch.where(self.rows >= 0, self.rows, other)
        self.index = {word.start: i for i, word in enumerate(tokens.words)}


def all_words(matrix: AttentionMatrix, positions: Positions) -> Tensor:
    """Words by words of every head, [H, W, W + 2]."""
    pooled = matrix.pool(positions.rows, positions.columns, "mass")[0].float()
    missing = positions.count + 2 - pooled.shape[-1]
    return torch.nn.functional.pad(pooled, (0, missing))


def rows_of(matrix: AttentionMatrix, positions: Positions, words: Sequence[Word]) -> Tensor:
    """The rows of some words, [H, n, W + 2], from these words' queries alone."""
    heads = matrix.shape[1]
    out = torch.zeros(heads, len(words), positions.count + 2)
    for i, word in enumerate(words):
        first, last = word.tokens[0], word.tokens[-1]
        offsets = [token - first for token in word.tokens]
        row = matrix[0, :, first : last + 1][:, offsets].mean(1).float()
        out[:, i].index_add_(1, positions.columns, row)
    return out


def column_of(matrix: AttentionMatrix, positions: Positions, target: Word) -> Tensor:
    """The weight of every word on one word, [H, W, 1]."""
    first, last = target.tokens[0], target.tokens[-1]
    offsets = [token - first for token in target.tokens]
    weights = matrix[0, :, :, first : last + 1][..., offsets].sum(-1).float()
    inside = positions.rows >= 0
    rows = positions.rows[inside]
    sums = torch.zeros(len(weights), positions.count).index_add_(1, rows, weights[:, inside])
    return (sums / torch.bincount(rows, minlength=positions.count)).unsqueeze(-1)
