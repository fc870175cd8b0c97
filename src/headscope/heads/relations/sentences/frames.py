"""Sentence frames filled from word lists, so that the pair is known by construction.

A frame is a line of words set apart by spaces. ``{place}`` is a slot, filled from the word list "place";
``{place2}`` is filled from the same list with another word. ``/s`` marks the source, the word that should attend, and
``/t`` its target: "The {person}/t in the {place} {slept}/s ." A ``*`` in a skeleton is where an insertion goes; with
insertions of many lengths no fixed distance fits the pair. ``^``, ``+`` and ``=`` in a core are where a distractor may
stand, a word that could be taken for the target: before the pair, between its words, behind it.
Word classes are known by slot ("{person}") or by word ("he").
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from headscope.heads.relations.sentences.pairs import Example, Pair

_SLOT = re.compile(r"\{([a-z_]+)(\d*)\}")
_CLOSING = frozenset(",.;:!?")  # no space before these
_COMMAS, _MARKS = (",", "，"), (",", ".", "，", "。")

WordLists = Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame, and which relation its marked pair has.

    Attributes:
        relation: The relation's name.
        skeleton: The core with its distractor, before insertions: frames of one skeleton are one cluster.
        template: The line of words, as this file's docstring describes it.
        variants: Replacements in the template, for instance which noun a pronoun stands for; the
            fillings take turns in them. One empty variant if there are none.
        classes: The class of a slot's words, or of a word in small letters.
    """

    relation: str
    skeleton: str
    template: str
    variants: tuple[tuple[tuple[str, str], ...], ...] = ((),)
    classes: Mapping[str, str] = field(default_factory=dict)


def place(cores: Sequence[str], distractors: Sequence[Sequence[str]]) -> list[str]:
    """Every core with every distractor in the places that it has.

    Args:
        cores: Lines with the marks ``^``, ``+`` and ``=``, or some of them.
        distractors: What may stand before the pair, between its words, behind it.

    >>> place(["^ it + fell = ."], (["once"], ["then"], []))
    ['once it fell .', 'it then fell .']
    """
    skeletons = []
    for core in cores:
        for mark, texts in zip("^+=", distractors, strict=True):
            for text in texts if mark in core else ():
                words = core.replace(mark, text).split()
                skeletons.append(" ".join(word for word in words if word not in "^+="))
    return skeletons


def either_way(openings: Sequence[str], endings: Sequence[str]) -> list[str]:
    """Every opening with every ending; its nouns {x} and {y} are {a} (the target) and {d}, and the other way.

    >>> either_way(["{x} met {y}"], ["and left ."])
    ['{a}/t met {d} and left .', '{d} met {a}/t and left .']
    """
    return [
        f"{opening.replace('{x}', x).replace('{y}', y)} {ending}"
        for opening in openings
        for ending in endings
        for x, y in (("{a}/t", "{d}"), ("{d}", "{a}/t"))
    ]


def combine(
    relation: str,
    skeletons: Sequence[str],
    insertions: Sequence[str],
    variants: Sequence[Mapping[str, str]] = ({},),
    classes: Mapping[str, str] | None = None,
    most: int = 2,
) -> list[Frame]:
    """Every skeleton with some of the insertions in the place of its ``*``, other ones from skeleton to skeleton.

    >>> [frame.template for frame in combine("r", ["it * fell ."], ["", "then"])]
    ['it fell .', 'it then fell .']
    """
    chosen = tuple(tuple(variant.items()) for variant in variants)
    frames = []
    for skeleton in skeletons:
        first, count = zlib.crc32(skeleton.encode()), min(most, len(insertions))
        numbers = sorted((first + i * len(insertions) // count) % len(insertions) for i in range(count))
        for number in numbers:
            template = _tidy(skeleton.replace("*", insertions[number]).split())
            frames.append(Frame(relation, skeleton, template, chosen, classes or {}))
    return frames


def _tidy(words: Sequence[str]) -> str:
    """Without a comma beside another mark."""
    pairs = zip(words, [*words[1:], ""], strict=True)
    return " ".join(word for word, after in pairs if not (word in _COMMAS and after in _MARKS))


class Filled(NamedTuple):
    """A sentence: its text, the spans and classes of its words, and the indices of source and target."""

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
        words.append(body if words or not spaced else body[:1].upper() + body[1:])
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
    fillings: int = 2,
    seed: int = 0,
    spaced: bool = True,
) -> list[Example]:
    """Sentences of all frames of both halves, each half with its own word lists; the same ones each time.

    Args:
        halves: The frames of each half.
        lists: The word lists of each half.
        language: Of the sentences.
        fillings: How many sentences of each frame.
        seed: Another seed chooses other words.
        spaced: Whether the language puts spaces between words.
    """
    examples = []
    for half, (frames, words) in enumerate(zip(halves, lists, strict=True)):
        skeletons: dict[str, dict[str, int]] = {}  # of each relation, numbered from 1
        for number, frame in enumerate(frames):
            numbers = skeletons.setdefault(frame.relation, {})
            cluster = f"{frame.relation} frame {half}.{numbers.setdefault(frame.skeleton, len(numbers) + 1)}"
            rng = random.Random(zlib.crc32(f"{seed} {frame.relation} {half} {number}".encode()))
            texts: set[str] = set()
            for turn in range(fillings * 20):
                template = frame.template
                for old, new in frame.variants[(number * fillings + turn) % len(frame.variants)]:
                    template = template.replace(old, new)
                filled = fill(template, words, rng, spaced=spaced, classes=frame.classes)
                if filled.text not in texts:
                    texts.add(filled.text)
                    spans, classes = tuple(filled.words), tuple(filled.classes)
                    pair = Pair(frame.relation, filled.source, filled.target)
                    examples.append(Example(filled.text, spans, (pair,), cluster, half, language, classes))
                if len(texts) == fillings:
                    break
    return examples
