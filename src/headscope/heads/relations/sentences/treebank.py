"""Treebanks in CoNLL-U format, that of the Universal Dependencies.

Every dependency becomes a pair from the dependent to its head. The format is described at
https://universaldependencies.org/format.html
"""

from __future__ import annotations

import codecs
import hashlib
import io
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from headscope.errors import TreebankError, optional_imports
from headscope.heads.relations.sentences.pairs import Example, Pair

_ID = re.compile(r"[1-9]\d*(?:-[1-9]\d*)?|\d+\.[1-9]\d*")
_NAMES = ["ID", "FORM", "LEMMA", "UPOS", "XPOS", "FEATS", "HEAD", "DEPREL", "DEPS", "MISC"]
_COLUMNS = len(_NAMES)
_BLOCK = 10  # sentences in a cluster, where the file names no documents

Span = tuple[int, int]


def read_conllu(path: str | os.PathLike[str], *, on_note: Callable[[str], None] | None = None) -> list[Example]:
    """The sentences of a treebank with their dependencies, dependent to head, named by the deprel.

    Subtypes are kept ("nsubj:pass"); roots and punctuation are left out. A document ("# newdoc") is a cluster, and a
    hash of its id chooses its half. A file without documents is cut into clusters of 10 sentences, whose names hold a
    hash of the file, because two treebanks may have one file name. The words of a multiword token share its surface if
    their forms make it up ("gonna": gon, na). Otherwise the surface is one word ("du": de, le), and dependencies inside
    it are left out. Empty nodes are skipped. A word's class is its universal part of speech. Words that are only _
    stand for text that was not published: their dependencies are left out, and so are sentences without other words.

    Args:
        path: The file, in UTF-8.
        on_note: Called with a sentence if sentences were left out.

    Raises:
        TreebankError: There is no such file, it is not UTF-8, it holds no sentence, a line is not CoNLL-U, or all words
            are _.
    """
    path = Path(path)
    language = re.match(r"([a-z]{2,3})_", path.name)
    try:
        with path.open("rb") as file:
            name = f"{path.name} ({_digest(file)})"
            file.seek(0)
            lines = _Lines(file, path)
            examples = list(_examples(lines, name, language[1] if language else ""))
    except OSError as error:
        raise TreebankError(f"{path} cannot be read: {error.strerror or error}. Give a .conllu file.") from error
    if lines.without_text:
        left_out = (
            f"{path} was published without the text of {len(lines.without_text)} sentences, the first in line "
            f"{lines.without_text[0]}: their words are _. Merge the text in first, as the treebank's README says"
        )
        if not any(character.isalnum() for example in examples for character in example.text):
            raise TreebankError(f"{left_out}.")
        if on_note is not None:
            on_note(f"{left_out}; now they are left out.")
    if not examples:
        raise TreebankError(f"{path} holds no sentence. Give a .conllu file with at least one.")
    return examples


def _digest(file: BinaryIO) -> str:
    """A hash of the file without line ends and empty lines."""
    digest = hashlib.sha256()
    for raw in file:
        if line := raw.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n"):
            digest.update(line + b"\n")
    return digest.hexdigest()[:8]


class _Lines(io.TextIOBase):
    """The lines of the file, each checked as it is read, and the line numbers of the current sentence's words."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.number = 0
        self.words: list[int] = []  # the line of each word of the current sentence
        self.without_text: list[int] = []  # the first line of each sentence whose words are all _

    def __iter__(self) -> Iterator[str]:  # type: ignore[override]  # typed as bytes there
        for raw in self.file:
            self.number += 1
            try:
                line = raw.decode("utf-8-sig" if self.number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                reason = f"byte 0x{raw[error.start]:02X} is not UTF-8. Save the file in UTF-8"
                raise self.error(self.number, reason) from None
            self._check(line)
            yield line + "\n"

    def _check(self, line: str) -> None:
        if line.startswith("#"):
            names = re.match(r"#\s*global\.columns\s*=(.*)", line)
            if names and names[1].upper().split() != _NAMES:
                wanted = f"wanted plain CoNLL-U, which has {' '.join(_NAMES)}"
                raise self.error(self.number, f"this is CoNLL-U Plus, whose columns differ; {wanted}")
            return
        if not line.strip():
            return
        columns = line.split("\t")
        if len(columns) != _COLUMNS:
            raise self.error(self.number, f"{len(columns)} columns, wanted {_COLUMNS} with a tab between each two")
        empty = [number for number, column in enumerate(columns, 1) if not column.strip()]
        if empty:
            raise self.error(self.number, f"column {empty[0]} is empty; write _ where there is nothing")
        if "  " in line:
            raise self.error(self.number, "two spaces inside a column; a column has at most one at a time")
        if not _ID.fullmatch(columns[0]):
            raise self.error(self.number, f"{columns[0]!r} is no id; wanted 8, or 8-9, or 8.1")
        if columns[0].isdigit() and not re.fullmatch(r"0|[1-9]\d*", columns[6]):
            raise self.error(self.number, f"{columns[6]!r} is no head; wanted the id of a word, or 0 for the root")
        self.words.append(self.number)

    def error(self, number: int, reason: str) -> TreebankError:
        """What is wrong in which line."""
        return TreebankError(f"{self.path}:{number}: {reason}.")


def _examples(lines: _Lines, name: str, language: str) -> Iterator[Example]:
    with optional_imports("atlas", "Treebanks"):
        import conllu
        from conllu.exceptions import ParseException
        from conllu.parser import DEFAULT_FIELDS

    sentences = iter(conllu.parse_incr(lines, fields=DEFAULT_FIELDS))  # type: ignore[arg-type]
    document, documents, count = "", 0, 0
    while True:
        lines.words = []
        try:
            sentence = next(sentences, None)
        except ParseException as error:
            raise lines.error(lines.number, f"the sentence that ends here cannot be read ({error})") from None
        if sentence is None:
            return
        meta = sentence.metadata
        if "newdoc id" in meta or "newdoc" in meta:
            documents += 1
            document = meta.get("newdoc id") or f"{name} document {documents}"
        if not len(sentence):
            continue
        if _without_text(sentence):
            lines.without_text.append(lines.words[0])
            continue
        first = count // _BLOCK * _BLOCK + 1
        cluster = document or f"{name} sentences {first}-{first + _BLOCK - 1}"
        count += 1
        yield _example(sentence, lines, cluster, language)


def _example(sentence: Any, lines: _Lines, cluster: str, language: str) -> Example:
    units = _units(sentence, lines)
    text, spans = _located(units, sentence.metadata.get("text") or "")
    words: list[Span] = []
    classes: list[str] = []
    word_of: dict[int, int] = {}
    for unit, (start, end) in zip(units, spans, strict=True):
        forms = [member["form"] for member in unit[1:]]
        split = "".join(forms)
        if len(split) == end - start and split.lower() == text[start:end].lower():
            for member in unit[1:]:
                word_of[member["id"]] = len(words)
                classes.append(_class({member["upos"]}))
                words.append((start, start := start + len(member["form"])))
        else:
            word_of |= {member["id"]: len(words) for member in unit[1:]}
            classes.append(_class({member["upos"] for member in unit[1:]}))
            words.append((start, end))
    pairs = []
    for token, number in zip(sentence, lines.words, strict=True):
        if not isinstance(token["id"], int):
            continue
        head, relation = token["head"], token["deprel"]
        if head != 0 and (head not in word_of or head == token["id"]):
            wrong = "the word itself" if head == token["id"] else "no word of the sentence"
            raise lines.error(number, f"the head of word {token['id']} ({token['form']}) is {head}, which is {wrong}")
        if head == 0 or relation in ("root", "punct") or relation.startswith(("root:", "punct:")):
            continue
        if relation == "_":
            raise lines.error(number, f"word {token['id']} ({token['form']}) has a head and no relation to it")
        source, target = word_of[token["id"]], word_of[head]
        without_text = any(_is_masked(text[slice(*words[index])]) for index in (source, target))
        if source != target and not without_text:
            pairs.append(Pair(relation, source, target))
    _check_tree(sentence, lines)
    half = zlib.crc32(cluster.encode()) & 1
    return Example(text, tuple(words), tuple(dict.fromkeys(pairs)), cluster, half, language, tuple(classes))


def _is_masked(form: str) -> bool:
    """Whether a word was published without its text: it is only _, one or several."""
    return not form.strip("_")


def _without_text(sentence: Any) -> bool:
    """Whether the words of a sentence are masked, all but its punctuation; a single one may be a line in the text."""
    forms = [token["form"] for token in sentence]
    return sum(map(_is_masked, forms)) > 1 and not any(character.isalnum() for form in forms for character in form)


def _check_tree(sentence: Any, lines: _Lines) -> None:
    """Every word's head, its head's head and so on must end at a root."""
    heads = {token["id"]: token["head"] for token in sentence if isinstance(token["id"], int)}
    for token, number in zip(sentence, lines.words, strict=True):
        at, passed = token["id"] if isinstance(token["id"], int) else 0, set[int]()
        while at:
            if at in passed:
                raise lines.error(number, f"the heads of word {token['id']} ({token['form']}) go round in a circle")
            passed.add(at)
            at = heads[at]


def _class(parts_of_speech: set[str | None]) -> str:
    """The part of speech of a word; "" where none is given, or the words behind one surface have several."""
    (first, *others) = parts_of_speech
    return first if first and first != "_" and not others else ""


def _units(sentence: Any, lines: _Lines) -> list[list[Any]]:
    """The units of the text: for each the token with its surface, then the words in it."""
    units: list[list[Any]] = []
    expected, inside = 1, 0
    for token, number in zip(sentence, lines.words, strict=True):
        which = token["id"]
        if isinstance(which, int):
            if which != expected:
                raise lines.error(number, f"the id is {which}, wanted {expected}: words are counted from 1")
            if which <= inside:
                units[-1].append(token)
            else:
                units.append([token, token])
            expected += 1
        elif which[1] == "-":
            if which[0] != expected or which[2] <= which[0] or which[0] <= inside:
                raise lines.error(number, f"the range {which[0]}-{which[2]} does not stand before its words")
            units.append([token])
            inside = which[2]
    if inside >= expected:
        raise lines.error(lines.words[-1], f"the range that ends at {inside} has words only up to {expected - 1}")
    if not units:
        raise lines.error(lines.words[-1], "the sentence has no words, only empty nodes")
    return units


def _located(units: list[list[Any]], text: str) -> tuple[str, list[Span]]:
    """The text and each unit's span in it: the file's text if the forms make it up, otherwise a rebuilt one."""
    spans, at = [], 0
    for unit in units:
        form = unit[0]["form"]
        while at < len(text) and text[at].isspace():
            at += 1
        if not text.startswith(form, at):
            break
        spans.append((at, at + len(form)))
        at += len(form)
    if len(spans) == len(units) and not text[at:].strip():
        return text, spans
    rebuilt, spans = "", []
    for unit in units:
        form = unit[0]["form"]
        spans.append((len(rebuilt), len(rebuilt) + len(form)))
        rebuilt += form
        if (unit[0]["misc"] or {}).get("SpaceAfter") != "No":
            rebuilt += " "
    return rebuilt.rstrip(), spans
