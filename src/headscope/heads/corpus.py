"""Texts to profile heads on: documents, cut into pieces that fit the model's context, and batched.

Each piece begins with the model's start token, because in most heads of a decoder the first position is an attention
sink: without a start token a word would be the sink.
"""

from __future__ import annotations

import hashlib
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from headscope.errors import HeadscopeError, TextError
from headscope.files import check_characters, read_text
from headscope.models.encoding import encode, surrounding
from headscope.models.loading import Loaded

_MODULES = """
    argparse ast asyncio bisect calendar collections concurrent.futures contextlib csv dataclasses datetime
    decimal difflib email.message enum fractions functools heapq html.parser http.client inspect itertools json
    logging optparse os pathlib pickle random re shutil socket statistics string subprocess tarfile tempfile
    textwrap threading turtle typing unittest urllib.request uuid xml.etree.ElementTree zipfile
"""
Item = TypeVar("Item")
_LICENSED = ("torch", "numpy", "safetensors", "transformers")


@dataclass(frozen=True)
class Document:
    """A text with a name; ``read`` returns the text, which is not kept in memory."""

    name: str
    read: Callable[[], str]


@dataclass(frozen=True)
class Piece:
    """Tokens of a document that the model reads at once, with its special tokens around them.

    Attributes:
        ids: Token ids.
        sinks: True for the start token and the other special tokens.
        delimiters: True for tokens that are only punctuation or line ends.
        document: The document's name; pieces of one document are not independent.
        half: 0 or 1. Heads are picked on one half of the documents and reported on the other.
        offset: How many tokens of the document come before the piece.
        texts: The text of each token, with what lies between it and the token before.
        period: For repeated random tokens, how many are repeated; 0 otherwise.
    """

    ids: tuple[int, ...]
    sinks: tuple[bool, ...]
    delimiters: tuple[bool, ...]
    document: str
    half: int
    offset: int = 0
    texts: tuple[str, ...] = ()
    period: int = 0


@dataclass(frozen=True, eq=False)
class TextBatch:
    """Pieces side by side, padded on the right: ``ids``, ``valid``, ``sinks`` and ``delimiters`` are [B, L]."""

    pieces: tuple[Piece, ...]
    ids: Tensor
    valid: Tensor
    sinks: Tensor
    delimiters: Tensor

    @property
    def attention_mask(self) -> Tensor | None:
        """What the model is given: 1 for text and 0 for padding, [B, L]; None without padding."""
        return None if bool(self.valid.all()) else self.valid.long()


def documents_of(paths: Sequence[Path], *, text: str | None = None) -> list[Document]:
    """Files as documents, in this order; ``text`` is what came from a pipe.

    Raises:
        TextError: A file cannot be read, is not UTF-8, or is empty.
    """
    documents = [Document(str(path), partial(_read_file, path)) for path in paths]
    if text is not None:
        documents.append(Document("-", lambda: _checked("-", text)))
    return documents


def _read_file(path: Path) -> str:
    return _checked(str(path), read_text(path))


def _checked(name: str, text: str) -> str:
    if not text or text.isspace():
        raise TextError(f"{name} holds no text. Give a text with words in it, or leave it out.")
    check_characters(text, name)
    return text


def default_documents(most: int = 24) -> list[Document]:
    """Texts that every machine has: docstrings of the standard library, and licence texts.

    They differ between versions of Python, so an atlas stores their hash.
    """
    documents = [Document(f"python:{name}", _docstrings(name)) for name in _MODULES.split()]
    documents += [Document(f"licence:{name}", lambda name=name: _licence(name)) for name in _LICENSED]  # type: ignore[misc]
    step = max(1, len(documents) // most)
    return [document for document in documents[::step][:most] if document.read().strip()]


def _docstrings(module: str) -> Callable[[], str]:
    def read() -> str:
        import importlib
        import inspect

        imported = importlib.import_module(module)
        parts = [inspect.cleandoc(imported.__doc__ or "")]
        for name, member in sorted(vars(imported).items()):
            if name.startswith("_") or not (inspect.isclass(member) or inspect.isfunction(member)):
                continue
            if str(getattr(member, "__module__", "")).split(".")[0] == module.split(".")[0]:
                parts.append(inspect.cleandoc(vars(member).get("__doc__") or ""))
        return "\n\n".join(part for part in parts if len(part) > 80)

    return read


def _licence(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, files

    try:
        listed = [file for file in files(package) or [] if file.name.upper().startswith(("LICENSE", "LICENCE"))]
        return listed[0].read_text("utf-8")[:20_000] if listed else ""
    except (PackageNotFoundError, OSError):
        return ""


def digest(document: Document) -> str:
    """The sha256 of a document's text in UTF-8; the name does not matter."""
    return hashlib.sha256(document.read().encode("utf-8", "surrogatepass")).hexdigest()


def check_different(documents: Sequence[Document]) -> None:
    """Check that all documents differ: else heads would be confirmed on the text that picked them.

    Raises:
        TextError: Two have one name or one text, or one cannot be read.
    """
    check_names(documents)
    check_texts((document.name, digest(document)) for document in documents)


def check_texts(texts: Iterable[tuple[str, str]], error: type[HeadscopeError] = TextError) -> None:
    """Raise ``error`` when two names have one text, given as pairs of name and digest."""
    names: dict[str, str] = {}
    for name, text_digest in texts:
        other = names.setdefault(text_digest, name)
        if other != name:
            raise error(f"{other} and {name} hold the same text: give it once, it would count twice.")


def check_names(documents: Sequence[Document]) -> None:
    """Raise TextError when two documents have one name."""
    names: set[str] = set()
    for document in documents:
        if document.name in names:
            raise TextError(f"{document.name} is given twice: give it once, it would count twice.")
        names.add(document.name)


def cut(loaded: Loaded, document: Document, half: int, *, length: int = 512, most: int | None = None) -> list[Piece]:
    """Cut a document into pieces of at most ``length`` tokens, special tokens included.

    Args:
        loaded: The model whose tokens they are.
        document: The text.
        half: Which half of the documents it belongs to, 0 or 1.
        length: Tokens in a piece; the model's context if that is shorter.
        most: At most so many pieces, from the document's start; None for all.

    Raises:
        TextError: The special tokens leave no room for text, or the text cannot be read.
    """
    text = document.read()
    check_characters(text, document.name)
    before, after = surrounding(loaded.tokenizer, loaded.start_token_id)
    room = min(length, loaded.context or length) - len(before) - len(after)
    if room < 2:
        raise TextError(f"{length} tokens a piece leave no room beside {len(before) + len(after)} special tokens.")
    encoding = encode(text, loaded.tokenizer, add_special_tokens=False)
    ids, special = encoding.ids, encoding.special
    delimiters = [is_delimiter(text[start:end]) for start, end in encoding.offsets]
    ends = [0, *(end for _, end in encoding.offsets)]
    texts = [text[min(last, start) : end] for last, (start, end) in zip(ends, encoding.offsets, strict=False)]
    pieces = []
    starts = range(0, len(ids), room)
    for start in starts if most is None else starts[:most]:
        part = slice(start, start + room)
        if len(ids[part]) < 2:
            continue
        pieces.append(
            Piece(
                ids=(*before, *ids[part], *after),
                sinks=(*(True for _ in before), *special[part], *(True for _ in after)),
                delimiters=(*(False for _ in before), *delimiters[part], *(False for _ in after)),
                document=document.name,
                half=half,
                offset=start,
                texts=(*("" for _ in before), *texts[part], *("" for _ in after)),
            )
        )
    return pieces


def is_delimiter(piece: str) -> bool:
    """Whether a token is punctuation or a line end: the delimiters of arXiv 1906.04341, without [SEP]."""
    marks = piece.strip()
    if not marks:
        return "\n" in piece
    return all(unicodedata.category(mark)[0] == "P" for mark in marks)


def repeats(loaded: Loaded, *, count: int = 16, period: int = 50, seed: int = 0) -> list[Piece]:
    """Texts of random tokens that are repeated once: meaning cannot help with the second copy (arXiv 2209.11895).

    Args:
        loaded: The model.
        count: How many texts; each counts as a document.
        period: How many tokens are repeated.
        seed: The seed of the random tokens.
    """
    before, after = surrounding(loaded.tokenizer, loaded.start_token_id)
    period = min(period, ((loaded.context or 1 << 30) - len(before) - len(after)) // 2)
    special = set(loaded.tokenizer.all_special_ids)
    vocabulary = int(loaded.model.get_input_embeddings().weight.shape[0])
    words = torch.tensor([i for i in range(min(vocabulary, len(loaded.tokenizer))) if i not in special])
    pieces = []
    for number in range(count):
        random = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{number}".encode()))
        copy = words[torch.randint(len(words), (period,), generator=random)].tolist()
        ids = (*before, *copy, *copy, *after)
        sinks = tuple(not len(before) <= i < len(before) + 2 * period for i in range(len(ids)))
        name = f"repeat:{seed}:{number}"
        pieces.append(Piece(ids, sinks, (False,) * len(ids), name, number % 2, period=period))
    return pieces


def batches(pieces: Iterable[Piece], *, tokens: int = 2048, pad: int = 0, device: Any = None) -> Iterator[TextBatch]:
    """Batches of pieces of similar length, the longest first; at most ``tokens`` in a batch of several pieces.

    Args:
        pieces: The pieces.
        tokens: Tokens in a batch, padding included.
        pad: The id of the padding token.
        device: The device of the tensors.
    """
    for group in by_length(pieces, lambda piece: len(piece.ids), tokens):
        yield _batch(group, pad, device)


def by_length(items: Iterable[Item], length: Callable[[Item], int], tokens: int) -> Iterator[list[Item]]:
    """Groups of items of similar length, the longest first, so that a lack of memory shows at once.

    Args:
        items: The items.
        length: The number of tokens of an item.
        tokens: The largest number of tokens in a group of several items, padding included.
    """
    waiting: list[Item] = []
    for item in sorted(items, key=lambda item: -length(item)):
        if waiting and (len(waiting) + 1) * length(waiting[0]) > tokens:
            yield waiting
            waiting = []
        waiting.append(item)
    if waiting:
        yield waiting


def _batch(pieces: Sequence[Piece], pad: int, device: Any) -> TextBatch:
    length = max(len(piece.ids) for piece in pieces)

    def padded(rows: Iterable[Sequence[Any]], fill: Any) -> Tensor:
        return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows], device=device)

    return TextBatch(
        pieces=tuple(pieces),
        ids=padded((piece.ids for piece in pieces), pad),
        valid=padded(([True] * len(piece.ids) for piece in pieces), False),
        sinks=padded((piece.sinks for piece in pieces), False),
        delimiters=padded((piece.delimiters for piece in pieces), False),
    )
