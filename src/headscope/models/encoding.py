"""How a tokenizer cuts a text: ids, their offsets in the text, and which of them are control tokens.

Tokenizers give some tokens offsets that are not theirs; here each token has the characters that it stands for.
"""

import re
import unicodedata
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from headscope.errors import TextError

Span = tuple[int, int]
StartToken = int | Literal["auto"] | None

_BYTE = re.compile("<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Encoding:
    """The tokens of a text.

    Attributes:
        ids: The number of each token in the vocabulary.
        names: Its name there.
        offsets: Start and end of each token in the text, in characters.
        added: True for tokens that the tokenizer added.
        special: True for control tokens, added or written in the text.
        unknown: True for tokens that stand for text the vocabulary lacks.
    """

    ids: list[int]
    names: list[str]
    offsets: list[Span]
    added: list[bool]
    special: list[bool]
    unknown: list[bool]

    def beginning(self, start_token_id: int | None, tokenizer: Any) -> "Encoding":
        """The same text after this start token, in place of the tokenizer's own; None: after none."""
        if start_token_id is not None and self.ids[:1] == [start_token_id]:
            return self
        first = self.added_in_front()
        start = [] if start_token_id is None else [start_token_id]
        return Encoding(
            [*start, *self.ids[first:]],
            [*tokenizer.convert_ids_to_tokens(start), *self.names[first:]],
            [*((0, 0) for _ in start), *self.offsets[first:]],
            [*(True for _ in start), *self.added[first:]],
            [*(True for _ in start), *self.special[first:]],
            [*(False for _ in start), *self.unknown[first:]],
        )

    def added_in_front(self) -> int:
        """How many tokens the tokenizer put before the text."""
        return next((i for i, flag in enumerate(self.added) if not flag), 0)


def encode(text: str, tokenizer: Any, *, add_special_tokens: bool = True) -> Encoding:
    """The tokens of a text, as a tokenizer cuts it.

    Args:
        text: The text.
        tokenizer: A fast Hugging Face tokenizer.
        add_special_tokens: Whether the tokenizer adds its start token, [CLS], [SEP] and the like.

    Raises:
        TextError: The tokenizer gives no offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TextError(
            f"{type(tokenizer).__name__} gives no character offsets, so its tokens cannot be "
            "traced to words. Pass a fast tokenizer: AutoTokenizer.from_pretrained(name)."
        )
    encoded = tokenizer(
        text,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        truncation=False,
        padding=False,
        verbose=False,
    )
    ids = list(encoded["input_ids"])
    names = list(tokenizer.convert_ids_to_tokens(ids))
    offsets = [(start, end) for start, end in encoded["offset_mapping"]]
    offsets = _own_offsets(text, names, offsets, _space_names(tokenizer, names))
    # A control token that is written in the text is marked like an added one, but has characters.
    flags = zip(encoded["special_tokens_mask"], offsets, strict=True)
    added = [bool(flag) and start == end for flag, (start, end) in flags]
    special = _special_tokens(text, tokenizer, ids, offsets, added)
    unknown_id = getattr(tokenizer, "unk_token_id", None)
    unknown = [i == unknown_id and not flag for i, flag in zip(ids, special, strict=True)]
    return Encoding(ids, names, offsets, added, special, unknown)


def surrounding(tokenizer: Any, start_token_id: int | None) -> tuple[list[int], list[int]]:
    """The control tokens before and after each text: this start token, or none, and what the tokenizer adds."""
    encoding = encode("a", tokenizer).beginning(start_token_id, tokenizer)
    first = encoding.added_in_front()
    last = len(encoding.ids) - next((i for i, flag in enumerate(reversed(encoding.added)) if not flag), 0)
    return encoding.ids[:first], encoding.ids[last:]


def start_in_words(token_id: int | None, text: str = "") -> str:
    """The token before a text as people read it.

    >>> start_in_words(0, "<s>"), start_in_words(None)
    ('start token <s> (0)', 'no start token')
    """
    return "no start token" if token_id is None else f"start token {text} ({token_id})"


def token_id(written: int | str, tokenizer: Any) -> int:
    """The id of a token that is written as its id or as its text in the vocabulary.

    Raises:
        TextError: The vocabulary has no such token.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if isinstance(written, int) or re.fullmatch(r"-?[0-9]+", written):
        if 0 <= int(written) < len(tokenizer):
            return int(written)
        raise TextError(f"There is no token {written}: the ids of this model are 0 to {len(tokenizer) - 1}.")
    if written in vocabulary:
        return vocabulary[written]
    control = ", ".join(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    raise TextError(
        f"{written!r} is no token of this model. Give an id, none, or a token of its vocabulary; its control tokens "
        f"are: {control}."
    )


def _space_names(tokenizer: Any, names: list[str]) -> set[str]:
    """Which of these names are spaces alone: ▁ for sentencepiece, Ġ in byte-level vocabularies, else a letter."""
    letters = {name for name in set(names) if name and not name.strip("Ġ")}
    decoded = {name: str(tokenizer.decode(tokenizer.convert_tokens_to_ids([name]))) for name in letters}
    return {name for name in set(names) if name and not name.strip("▁")} | {
        name for name, text in decoded.items() if text.isspace()
    }


def _own_offsets(text: str, names: list[str], offsets: list[Span], spaces: set[str]) -> list[Span]:
    """The offsets of the characters that each token stands for.

    A tokenizer gives a space that it put in front of a word the offsets of the character after it, and may give each
    byte of a run those of the whole run.
    """
    own = list(offsets)
    run: list[int] = []  # tokens that are bytes and have the same offsets
    for i, (name, (start, end)) in enumerate(zip(names, offsets, strict=True)):
        if name in spaces:
            characters = text[start:end]
            if characters and not characters.isspace() and name[0] not in characters:
                own[i] = (start, start)
        if run and (start, end) != offsets[run[0]]:
            _separate_bytes(text, names, own, run)
            run = []
        if end - start > 1 and _BYTE.fullmatch(name):
            run.append(i)
    _separate_bytes(text, names, own, run)
    return own


def _separate_bytes(text: str, names: list[str], offsets: list[Span], run: list[int]) -> None:
    """Give each byte of a run the offsets of its character, where the bytes are those of the text."""
    if not run:
        return
    data = bytes(int(names[i][3:5], 16) for i in run)
    spans: list[Span] = []
    start, end = offsets[run[0]]
    for at in range(start, end):
        forms = (text[at].encode(), unicodedata.normalize("NFKC", text[at]).encode())
        form = next((form for form in forms if data.startswith(form, len(spans))), None)
        if form is None:
            return
        spans += [(at, at + 1)] * len(form)
    if len(spans) == len(run):
        for i, span in zip(run, spans, strict=True):
            offsets[i] = span


def _special_tokens(text: str, tokenizer: Any, ids: list[int], offsets: list[Span], added: list[bool]) -> list[bool]:
    """True for tokens that the tokenizer added, and for control tokens written in the text.

    The token for unknown text is not special, though tokenizers declare it so, unless the text has its name.
    """
    declared = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    unknown_id = getattr(tokenizer, "unk_token_id", None)
    pieces = [text[start:end].strip() for start, end in offsets]
    return [
        flag or (i in declared and (piece == declared[i] or (not piece and i != unknown_id)))
        for i, piece, flag in zip(ids, pieces, added, strict=True)
    ]


def pieces_of(text: str, tokenizer: Any, encoding: Encoding) -> tuple[str, ...]:
    """What each token stands for, readable; a share of a character with its part, as "她(1/2)"."""
    pieces = [text[start:end] for start, end in encoding.offsets]
    for i, name in enumerate(encoding.names):
        if encoding.special[i] or encoding.unknown[i]:
            pieces[i] = name
        elif not pieces[i]:
            decoded = str(tokenizer.decode([encoding.ids[i]]))
            pieces[i] = decoded if decoded.isspace() else name.replace("▁", " ")
    bounds = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    start = np.maximum(bounds[:-1, 0], bounds[1:, 0])
    shares = start < np.minimum(bounds[:-1, 1], bounds[1:, 1])  # token i with token i + 1
    edges = np.flatnonzero(np.diff(np.concatenate([[False], shares, [False]])))
    for first, last in edges.reshape(-1, 2).tolist():
        for i in range(first, last + 1):
            pieces[i] = f"{pieces[i]}({i - first + 1}/{last - first + 1})"
    return tuple(pieces)
