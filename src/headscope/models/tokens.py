"""Tokens, and the words or characters that they make up.

A model reads tokens; a person reads words. Both have character offsets, so weights between tokens become
weights between words for any tokenizer: byte-level pieces of a Chinese character, three tokens of
"didn't", or one token that covers several marks.
"""

import difflib
import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headscope.errors import TextError
from headscope.files import check_characters
from headscope.models.characters import word_spans
from headscope.models.encoding import Span, StartToken, encode, pieces_of


@dataclass(frozen=True, slots=True)
class Word:
    """What a person reads as one word, mark or character, and the tokens that it was cut into.

    Attributes:
        text: The word as it stands in the text.
        start: Offset of its first character.
        end: Offset just past its last character.
        tokens: Positions of its tokens, counted from 0 with special tokens included.

    >>> Word("it", 12, 14, (4,)).text
    'it'
    """

    text: str
    start: int
    end: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Tokens:
    """One text as the model sees it, and as a person reads it. Made by `tokenize`.

    Attributes:
        text: The text.
        ids: The number of each token in the model's vocabulary.
        pieces: What each token stands for, readable. Tokens that share a character, as the bytes of
            a rare one do, show it with their part: "她(1/2)", "她(2/2)". A control token, or one for text that the
            vocabulary lacks, has its name: "[SEP]", "[UNK]".
        offsets: Start and end of each token in the text, in characters; both are equal for a token
            that the text does not hold, such as a start token or a space that the tokenizer adds.
        special: True for control tokens: the start token, [CLS], [SEP], a chat's turn marks.
        words: The words, in the order of the text. Every token with visible text that is not
            special is in exactly one of them; tokens of spaces and line ends alone are in none.
        unknown: True for tokens that stand for text the vocabulary lacks.
    """

    text: str
    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    offsets: tuple[Span, ...]
    special: tuple[bool, ...]
    words: tuple[Word, ...]
    unknown: tuple[bool, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def unknown_share(self) -> float:
        """The share of unknown tokens among those that are not special, from 0 to 1."""
        return sum(self.unknown) / max(1, len(self.special) - sum(self.special))

    def word_ids(self) -> list[int]:
        """For each token the index of its word in `words`, -1 for a token in no word."""
        indices = [-1] * len(self.ids)
        for index, word in enumerate(self.words):
            for token in word.tokens:
                indices[token] = index
        return indices

    def find(self, word: str, *, on_note: Callable[[str], None] | None = None) -> Word:
        """The word that is written `word`, or the span of words that a phrase covers, as one word with all its tokens.

        An exact match is preferred to one that differs only in case. Of what occurs more than once `it#2` is the second
        occurrence, and `it` the last.

        Args:
            word: The word, a phrase, or a run of Chinese characters.
            on_note: Called with a sentence if the last of several is taken.

        Raises:
            TextError: The word is not in the text, or the phrase begins or ends inside a word.
        """
        matches = self._matches(word)
        text, number = _numbered(word)
        if not matches and number is not None:
            return self._occurrence(text, number)
        if not matches:
            raise TextError(self._missing(word))
        if len(matches) > 1 and on_note is not None:
            taken = f"{word}#{len(matches)}"
            on_note(
                f"{word!r} is in the text {len(matches)} times: {self._listed(word, matches)}. The last one is taken; "
                f"write {word + '#1'!r} for the first, and {taken!r} to be sure of this one."
            )
        return matches[-1]

    def joined(self, phrases: Iterable[str]) -> "Tokens":
        """The same tokens with each of these phrases as one word, wherever it is; words stay what they are.

        Raises:
            TextError: Two of the phrases share a word.
        """
        words = set(self.words)
        found = {match for phrase in phrases for match in self._matches(phrase) or self._matches(_numbered(phrase)[0])}
        spans = sorted(found - words, key=lambda span: span.start)
        for span, after in pairwise(spans):
            if after.start < span.end:
                raise TextError(f"{span.text!r} and {after.text!r} share a word here. Ask for phrases that share none.")
        inside = {token for span in spans for token in span.tokens}
        others = [word for word in self.words if word.tokens[0] not in inside]
        return replace(self, words=tuple(sorted([*others, *spans], key=lambda word: word.start)))

    @cached_property
    def _by_text(self) -> dict[str, list[Word]]:
        words: dict[str, list[Word]] = {}
        for word in self.words:
            words.setdefault(word.text, []).append(word)
        return words

    @cached_property
    def _by_folded(self) -> dict[str, list[Word]]:
        words: dict[str, list[Word]] = {}
        for word in self.words:
            words.setdefault(_folded(word.text), []).append(word)
        return words

    def _matches(self, word: str) -> list[Word]:
        return self._by_text.get(word) or self._by_folded.get(_folded(word)) or self._spans(word)

    def _spans(self, phrase: str) -> list[Word]:
        """Each occurrence of a phrase that begins and ends with a word; its spaces may differ."""
        pattern = r"\s+".join(map(re.escape, phrase.split()))
        for flags in (0, re.IGNORECASE) if pattern else ():
            places = (match.span() for match in re.finditer(pattern, self.text, flags))
            spans = [span for start, end in places if (span := self._span(start, end)) is not None]
            if spans:
                return spans
        return []

    def _span(self, start: int, end: int) -> Word | None:
        """The words from `start` to `end` as one; None if there is none, or one reaches beyond."""
        first = bisect_right(self.words, start, key=lambda word: word.end)
        last = bisect_left(self.words, end, key=lambda word: word.start)
        words = self.words[first:last]
        if not words or words[0].start < start or words[-1].end > end:
            return None
        start, end = words[0].start, words[-1].end
        return Word(self.text[start:end], start, end, tuple(token for word in words for token in word.tokens))

    def _occurrence(self, word: str, number: int) -> Word:
        matches = self._matches(word)
        if not matches:
            raise TextError(self._missing(word))
        if not 1 <= number <= len(matches):
            times = "once" if len(matches) == 1 else f"{len(matches)} times"
            raise TextError(
                f"There is no occurrence {number} of {word!r}: it is in the text {times}, "
                f"{self._listed(word, matches)}."
            )
        return matches[number - 1]

    def _listed(self, word: str, matches: Sequence[Word], limit: int = 9) -> str:
        occurrences = [f"{word}#{i} in {self._around(m)!r}" for i, m in enumerate(matches[:limit], 1)]
        return ", ".join(occurrences) + (f", … {word}#{len(matches)}" if len(matches) > limit else "")

    def _around(self, word: Word, reach: int = 20) -> str:
        before = self.text[max(0, word.start - reach) : word.start]
        after = self.text[word.end : word.end + reach]
        around = " ".join(f"{before}[{word.text}]{after}".split())
        return ("…" if word.start > reach else "") + around + ("…" if word.end + reach < len(self.text) else "")

    def _missing(self, word: str) -> str:
        at = self.text.find(word) if word else -1
        parts = [w.text for w in self.words if w.start < at + len(word) and w.end > at >= 0]
        if len(parts) > 1:
            return f"{word!r} begins or ends inside a word here: {', '.join(parts)}. Ask for whole words."
        if parts:
            return f"{word!r} is only a part of the word {parts[0]!r} here. Ask for that."
        texts = list(self._by_text)
        folded = {_folded(text): text for text in texts}
        close = [folded[f] for f in difflib.get_close_matches(_folded(word), list(folded), n=3)]
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        listed = " ".join(texts[:40]) + (" …" if len(texts) > 40 else "")
        return f"{word!r} is not a word of the text.{hint} Its words are: {listed}"


def tokenize(text: str, tokenizer: Any, *, start_token_id: StartToken = "auto", limit: int | None = None) -> Tokens:
    """Cut a text into the model's tokens, and group these into words.

    Words are what a person reads: "didn't" and "well-known" are one word each, a punctuation mark
    is a word of its own, and so are each Chinese or Japanese character and each emoji. What a
    language writes without spaces in an alphabet (Thai, Khmer) stays one word up to the next space.
    Where one token covers several words they become one.

    Args:
        text: The text, with at least one visible character.
        tokenizer: A fast Hugging Face tokenizer (one with character offsets).
        start_token_id: The token that the text begins with, in place of what the tokenizer puts there itself; None: no
            such token; "auto": what the tokenizer does.
        limit: The number of tokens that the model can read, special tokens included.

    Raises:
        TextError: The text is blank, holds half a character (a lone surrogate) or has more tokens
            than `limit`; or the tokenizer gives no offsets.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> inner = Tokenizer(models.WordLevel({"?": 0, "It": 1, "'": 2, "s": 3}, unk_token="?"))
    >>> inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    >>> tokens = tokenize("It's red.", PreTrainedTokenizerFast(tokenizer_object=inner))
    >>> [(word.text, word.tokens) for word in tokens.words]
    [("It's", (0, 1, 2)), ('red', (3,)), ('.', (4,))]
    """
    _check_text(text)
    encoding = encode(text, tokenizer)
    if start_token_id != "auto":
        encoding = encoding.beginning(start_token_id, tokenizer)
    offsets, special = encoding.offsets, encoding.special
    if limit is not None and len(encoding.ids) > limit:
        raise TextError(
            f"The text has {len(encoding.ids)} tokens, and the model reads at most {limit}. "
            "Shorten the text, or use a model with a longer context."
        )
    words = _words(text, offsets, special)
    if not words:
        raise TextError(f"The tokenizer keeps nothing of the text {_shortened(text)!r}. Give a text with words in it.")
    return Tokens(
        text=text,
        ids=tuple(encoding.ids),
        pieces=pieces_of(text, tokenizer, encoding),
        offsets=tuple(offsets),
        special=tuple(special),
        words=words,
        unknown=tuple(encoding.unknown),
    )


def _check_text(text: str) -> None:
    if not text or text.isspace():
        raise TextError(f"The text is blank: {_shortened(text)!r}. Give at least one word.")
    check_characters(text, "The text")


def _shortened(text: str, limit: int = 40) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _numbered(word: str) -> tuple[str, int | None]:
    """A word and the number of its occurrence, which may be written after it: "it#2"."""
    text, hash_sign, number = word.rpartition("#")
    return (text, int(number)) if hash_sign and text and number.isdecimal() else (word, None)


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()


def _words(text: str, offsets: list[Span], special: list[bool]) -> tuple[Word, ...]:
    """The words of the text, joined where a token covers several, with the tokens of each."""
    spans = np.array(word_spans(text), dtype=np.int64).reshape(-1, 2)
    bounds = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    first = np.searchsorted(spans[:, 1], bounds[:, 0], side="right")
    last = np.searchsorted(spans[:, 0], bounds[:, 1], side="left") - 1
    inside = np.flatnonzero((first <= last) & ~np.array(special, dtype=bool))
    # joins[w] > 0: some token covers both word w and word w + 1
    change = np.zeros(len(spans) + 1, dtype=np.int64)
    np.add.at(change, first[inside], 1)
    np.add.at(change, last[inside], -1)
    joins = np.cumsum(change)[: max(0, len(spans) - 1)] > 0
    unit_of_span: NDArray[np.int64] = np.concatenate([[0], np.cumsum(~joins)])[: len(spans)]
    units = unit_of_span[first[inside]]
    order = np.argsort(units, kind="stable")
    present, begins = np.unique(units[order], return_index=True)
    tokens: list[int] = inside[order].tolist()
    cuts: list[int] = [*begins.tolist(), len(tokens)]
    starts = spans[np.searchsorted(unit_of_span, present, side="left"), 0].tolist()
    ends = spans[np.searchsorted(unit_of_span, present, side="right") - 1, 1].tolist()
    return tuple(
        Word(text[start:end], start, end, tuple(tokens[a:b]))
        for start, end, a, b in zip(starts, ends, cuts[:-1], cuts[1:], strict=True)
    )
