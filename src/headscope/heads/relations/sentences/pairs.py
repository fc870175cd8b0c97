"""Sentences in which it is known which word belongs to which."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Example", "Pair", "Relation"]


@dataclass(frozen=True, slots=True)
class Pair:
    """The word `source` has this relation to the word `target`.

    Attributes:
        relation: The relation's name.
        source: Index of the word that should look, in `Example.words`.
        target: Index of the word that it should look at.
    """

    relation: str
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Example:
    """A sentence with the pairs that are known in it.

    Attributes:
        text: The sentence.
        words: Start and end of each word in characters, in order, none overlapping another. A mark is a word.
        pairs: What is known.
        cluster: The frame or the document that it comes from. Sentences of one cluster are alike.
        half: 0 or 1. Heads are picked on one half and reported on the other.
        language: "en", "zh"; empty if it is not known.
        classes: For each word its class, such as its part of speech; empty if it has none. Words of one class are
            rivals: a head that looks at any of them has not found the right one. None known: an empty tuple.

    >>> example = Example("It fell.", ((0, 2), (3, 7), (7, 8)), (Pair("nsubj", 0, 1),), "doc 1", 0, "en")
    >>> example.word(1)
    'fell'
    """

    text: str
    words: tuple[tuple[int, int], ...]
    pairs: tuple[Pair, ...]
    cluster: str
    half: int
    language: str
    classes: tuple[str, ...] = ()

    def word(self, index: int) -> str:
        """The text of a word."""
        start, end = self.words[index]
        return self.text[start:end]

    def class_of(self, index: int) -> str:
        """The class of a word; empty if it has none."""
        return self.classes[index] if self.classes else ""


@dataclass(frozen=True, slots=True)
class Relation:
    """A relation that ships with sentences for it.

    Attributes:
        name: Its name, as in `Pair.relation`.
        about: One sentence: which word should look at which.
        language: "en" or "zh".
        source: Where the relation was studied in attention heads, or what this definition rests on.
    """

    name: str
    about: str
    language: str
    source: str
