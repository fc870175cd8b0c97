"""Tokens, and the words or characters that they make up.

A model reads tokens; a person reads words. Both have character offsets, so weights between tokens become
weights between words for any tokenizer: byte-level pieces of a Chinese character, three tokens of
"didn't", or one token that covers several marks.
"""

import difflib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headscope.errors import TextError

Span = tuple[int, int]


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
            a rare one do, show it with their part: "她(1/2)", "她(2/2)".
        offsets: Start and end of each token in the text, in characters; (0, 0) for a special token
            that the text does not hold.
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

    def find(self, word: str) -> Word:
        """The word of the text that is written `word`.

        An exact match is preferred to one that differs only in case. Of a word that occurs more
        than once, `it#2` is the second occurrence.

        Raises:
            TextError: The word is not in the text, or is there more than once.
        """
        matches = self._matches(word)
        text, hash_sign, number = word.rpartition("#")
        if not matches and hash_sign and text and number.isdecimal():
            return self._occurrence(text, int(number))
        if not matches:
            raise TextError(self._missing(word))
        if len(matches) > 1:
            raise TextError(
                f"{word!r} is in the text {len(matches)} times: {self._listed(word, matches)}. "
                f"Write {word + '#1'!r} for the first of them."
            )
        return matches[0]

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
        return self._by_text.get(word) or self._by_folded.get(_folded(word)) or []

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
            return f"{word!r} is several words here: {', '.join(parts)}. Ask for one of them."
        if parts:
            return f"{word!r} is only a part of the word {parts[0]!r} here. Ask for that."
        texts = list(self._by_text)
        folded = {_folded(text): text for text in texts}
        close = [folded[f] for f in difflib.get_close_matches(_folded(word), list(folded), n=3)]
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        listed = " ".join(texts[:40]) + (" …" if len(texts) > 40 else "")
        return f"{word!r} is not a word of the text.{hint} Its words are: {listed}"


def tokenize(text: str, tokenizer: Any, *, start_token_id: int | None = None, limit: int | None = None) -> Tokens:
    """Cut a text into the model's tokens, and group these into words.

    Words are what a person reads: "didn't" and "well-known" are one word each, a punctuation mark
    is a word of its own, and so are each Chinese or Japanese character and each emoji. What a
    language writes without spaces in an alphabet (Thai, Khmer) stays one word up to the next space.
    Where one token covers several words they become one.

    Args:
        text: The text, with at least one visible character.
        tokenizer: A fast Hugging Face tokenizer (one with character offsets).
        start_token_id: The token to put in front, if the tokenizer does not put it there itself.
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
    ids, offsets, added = _encode(text, tokenizer)
    if start_token_id is not None and ids[:1] != [start_token_id]:
        ids, offsets, added = [start_token_id, *ids], [(0, 0), *offsets], [True, *added]
    if limit is not None and len(ids) > limit:
        raise TextError(
            f"The text has {len(ids)} tokens, and the model reads at most {limit}. "
            "Shorten the text, or use a model with a longer context."
        )
    special = special_tokens(text, tokenizer, ids, offsets, added)
    unknown_id = getattr(tokenizer, "unk_token_id", None)
    words = _words(text, offsets, special)
    if not words:
        raise TextError(f"The tokenizer keeps nothing of the text {_shortened(text)!r}. Give a text with words in it.")
    return Tokens(
        text=text,
        ids=tuple(ids),
        pieces=_pieces(text, tokenizer, ids, offsets, special),
        offsets=tuple(offsets),
        special=tuple(special),
        words=words,
        unknown=tuple(i == unknown_id and not s for i, s in zip(ids, special, strict=True)),
    )


def _encode(text: str, tokenizer: Any) -> tuple[list[int], list[Span], list[bool]]:
    """Ids, offsets, and whether the tokenizer added the token itself."""
    if not getattr(tokenizer, "is_fast", False):
        raise TextError(
            f"{type(tokenizer).__name__} gives no character offsets, so its tokens cannot be "
            "traced to words. Pass a fast tokenizer: AutoTokenizer.from_pretrained(name)."
        )
    encoded = tokenizer(
        text,
        add_special_tokens=True,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        truncation=False,
        padding=False,
        verbose=False,
    )
    offsets = [(start, end) for start, end in encoded["offset_mapping"]]
    added = [bool(flag) for flag in encoded["special_tokens_mask"]]
    return list(encoded["input_ids"]), offsets, added


def _check_text(text: str) -> None:
    if not text or text.isspace():
        raise TextError(f"The text is blank: {_shortened(text)!r}. Give at least one word.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TextError(
            f"Character {error.start} of the text is half a character (the surrogate "
            f"U+{ord(text[error.start]):04X} alone), which no tokenizer can read. Remove it, or "
            "read the text again with its right encoding."
        ) from None


def _shortened(text: str, limit: int = 40) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()


def special_tokens(text: str, tokenizer: Any, ids: list[int], offsets: list[Span], added: list[bool]) -> list[bool]:
    """True for tokens that the tokenizer added, and for control tokens written in the text.

    The token for unknown text is not special, though tokenizers declare it so.
    """
    declared = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    return [
        flag or (i in declared and text[start:end].strip() in ("", declared[i]))
        for i, (start, end), flag in zip(ids, offsets, added, strict=True)
    ]


def _pieces(text: str, tokenizer: Any, ids: list[int], offsets: list[Span], special: list[bool]) -> tuple[str, ...]:
    pieces = [text[start:end] for start, end in offsets]
    unnamed = [i for i, piece in enumerate(pieces) if special[i] or not piece]
    names = tokenizer.convert_ids_to_tokens([ids[i] for i in unnamed])
    for i, name in zip(unnamed, names, strict=True):
        pieces[i] = name if special[i] else name.replace("▁", " ")
    bounds = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    start = np.maximum(bounds[:-1, 0], bounds[1:, 0])
    shares = start < np.minimum(bounds[:-1, 1], bounds[1:, 1])  # token i with token i + 1
    edges = np.flatnonzero(np.diff(np.concatenate([[False], shares, [False]])))
    for first, last in edges.reshape(-1, 2).tolist():
        for i in range(first, last + 1):
            pieces[i] = f"{pieces[i]}({i - first + 1}/{last - first + 1})"
    return tuple(pieces)


def _words(text: str, offsets: list[Span], special: list[bool]) -> tuple[Word, ...]:
    """The words of the text, joined where a token covers several, with the tokens of each."""
    spans = np.array(_word_spans(text), dtype=np.int64).reshape(-1, 2)
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


# Each character has a class, a letter, and words are found by one regular expression over the
# classes: l letter, d digit, c a character that is a word alone (Chinese, Japanese), m mark that
# belongs to the character before (accent, skin tone), k keycap, z zero-width joiner, f other
# invisible format character, r half a flag, h may join letters (hyphen, apostrophe), n may join
# digits (decimal point), p any other mark or symbol, s space.
_LETTER = r"[ld](?!m*k)m*"
_WORD = re.compile(
    rf"{_LETTER}(?:(?:h|(?<=d)n(?=d))?[zf]*{_LETTER}|[zf]+m+)*"  # a word or a number
    r"|rr[mk]*"  # a flag
    r"|[ldchnrpmk][mk]*(?:z+[ldchnrp][mk]*)*"  # a character alone, or an emoji joined from several
)


class _Classes(dict[int, str]):
    """The class of each character, computed once for each that occurs."""

    def __missing__(self, code: int) -> str:
        self[code] = _character_class(code)
        return self[code]


# The ranges of characters that are words alone: Chinese, and the two Japanese syllabaries.
_ALONE = (
    (0x2E80, 0x2FDF),
    (0x3005, 0x3007),
    (0x3021, 0x3029),
    (0x3041, 0x3096),
    (0x309D, 0x30FF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9D),
    (0x1AFF0, 0x1B16F),
    (0x20000, 0x3FFFD),
)
_BY_CODE = {0x200D: "z", 0x20E3: "k", ord("."): "n", ord(","): "n", ord("_"): "l"}
_BY_CODE |= dict.fromkeys(map(ord, "'’-‐‑·׳״＇"), "h")
_BY_CODE |= dict.fromkeys((0xFF9E, 0xFF9F), "m")  # the half-width voicing marks


def _character_class(code: int) -> str:
    if code in _BY_CODE:
        return _BY_CODE[code]
    if 0x1F3FB <= code <= 0x1F3FF or 0xE0020 <= code <= 0xE007F:
        return "m"
    if 0x1F1E6 <= code <= 0x1F1FF:
        return "r"
    category = unicodedata.category(chr(code))
    if category[0] in "LN" and any(first <= code <= last for first, last in _ALONE):
        return "c"
    if category == "Nd":
        return "d"
    if category == "Cf":
        return "f"
    if category[0] == "Z" or category == "Cc":
        return "s"
    return {"L": "l", "N": "l", "M": "m"}.get(category[0], "p")


_CLASSES = _Classes()


def _word_spans(text: str) -> list[Span]:
    """Start and end of each word of the text, from its characters alone."""
    return [match.span() for match in _WORD.finditer(text.translate(_CLASSES))]
