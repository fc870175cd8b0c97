"""Sentence frames filled from word lists, so that the pair is known by construction.

A frame is a line of words set apart by spaces. ``{place}`` is a slot, filled from the word list "place";
``{place2}`` is filled from the same list with another word. ``/s`` marks the word that should look and ``/t``
the word that it should look at: "The {person}/t in the {place} {slept}/s ." A ``*`` in a skeleton is where an
insertion goes; with insertions of many lengths no fixed distance fits the pair. Word classes are known by slot
("{person}") or by word ("he").
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from headscope.relations.pairs import Example, Pair

__all__ = ["Filled", "Frame", "combine", "fill", "fill_all"]

_SLOT = re.compile(r"\{([a-z_]+)(\d*)\}")
_CLOSING = frozenset(",.;:!?")  # no space before these

WordLists = Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame, and which relation its marked pair has.

    Attributes:
        relation: The relation's name.
        template: The line of words, as this file's docstring describes it.
        variants: Replacements in the template, for instance which noun a pronoun stands for; the
            fillings take turns in them. One empty variant if there are none.
        classes: The class of a slot's words, or of a word in small letters.
    """

    relation: str
    template: str
    variants: tuple[tuple[tuple[str, str], ...], ...] = ((),)
    classes: Mapping[str, str] = field(default_factory=dict)


def combine(
    relation: str,
    skeletons: Sequence[str],
    insertions: Sequence[str],
    variants: Sequence[Mapping[str, str]] = ({},),
    classes: Mapping[str, str] | None = None,
) -> list[Frame]:
    """Every skeleton with every insertion in the place of its ``*``.

    >>> [frame.template for frame in combine("r", ["it * fell ."], ["", "then"])]
    ['it fell .', 'it then fell .']
    """
    chosen = tuple(tuple(variant.items()) for variant in variants)
    return [
        Frame(relation, " ".join(skeleton.replace("*", insertion).split()), chosen, classes or {})
        for skeleton in skeletons
        for insertion in insertions
    ]


class Filled(NamedTuple):
    """A sentence: its text, the spans and the classes of its words, and the places of the marked words."""

    text: str
    words: list[tuple[int, int]]
    classes: list[str]
    source: int
    target: int


def fill(
    template: str,
    lists: WordLists,
    rng: random.Random,
    *,
    spaced: bool = True,
    classes: Mapping[str, str] | None = None,
) -> Filled:
    """The sentence of a template.

    Args:
        template: The frame's line.
        lists: The words of each slot.
        rng: Chooses the words; none is used twice in a sentence.
        spaced: Whether the language puts spaces between words.
        classes: As in `Frame`; "" for what is not in it.

    >>> lists = {"cat": ["cat"], "sat": ["sat"]}
    >>> filled = fill("The {cat}/t {sat}/s .", lists, random.Random(0), classes={"{cat}": "animal"})
    >>> filled.text, filled.classes, filled.source, filled.target
    ('The cat sat.', ['', 'animal', '', ''], 2, 1)
    """
    words: list[str] = []
    kinds: list[str] = []
    marks: dict[str, int] = {}
    used: set[str] = set()
    for item in template.split():
        body, slash, mark = item.partition("/")
        if slash:
            marks[mark] = len(words)
        match = _SLOT.fullmatch(body)
        kinds.append((classes or {}).get(f"{{{match[1]}}}" if match else body.lower(), ""))
        if match:
            body = rng.choice([word for word in lists[match[1]] if word not in used])
            used.add(body)
        words.append(body)
    text, spans = "", []
    for word in words:
        if text and spaced and word not in _CLOSING:
            text += " "
        spans.append((len(text), len(text) + len(word)))
        text += word
    return Filled(text, spans, kinds, marks["s"], marks["t"])


def fill_all(
    halves: Sequence[Sequence[Frame]],
    lists: Sequence[WordLists],
    *,
    language: str,
    fillings: int = 3,
    seed: int = 0,
    spaced: bool = True,
) -> list[Example]:
    """Sentences of all frames of both halves, each half with its own word lists; always the same ones."""
    examples = []
    for half, (frames, words) in enumerate(zip(halves, lists, strict=True)):
        numbers: dict[str, int] = {}
        for frame in frames:
            number = numbers[frame.relation] = numbers.get(frame.relation, 0) + 1
            cluster = f"{frame.relation} frame {half}.{number}"
            rng = random.Random(zlib.crc32(f"{seed} {cluster}".encode()))
            seen: set[str] = set()
            for turn in range(fillings * 20):
                template = frame.template
                for old, new in frame.variants[(number + turn) % len(frame.variants)]:
                    template = template.replace(old, new)
                made = fill(template, words, rng, spaced=spaced, classes=frame.classes)
                if made.text not in seen:
                    seen.add(made.text)
                    spans, classes = tuple(made.words), tuple(made.classes)
                    pair = Pair(frame.relation, made.source, made.target)
                    examples.append(Example(made.text, spans, (pair,), cluster, half, language, classes))
                if len(seen) == fillings:
                    break
    return examples
