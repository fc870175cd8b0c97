"""A sentence with pairs of words that belong together, and the relations that they have."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pair:
    """The word `source` has this relation to the word `target`.

    Attributes:
        relation: The relation's name.
        source: Index of the word that should attend, in `Example.words`.
        target: Index of the word that it should attend to.
    """

    relation: str
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Example:
    """A sentence and its known pairs.

    Attributes:
        text: The sentence.
        words: Start and end of each word in characters, in order, none overlapping another. A mark is a word.
        pairs: Pairs of words that belong together.
        cluster: The frame or the document that it comes from. Sentences of one cluster are alike.
        half: 0 or 1. Heads are picked on one half and reported on the other.
        language: "en", "zh"; empty if it is not known.
        classes: For each word its class, such as its part of speech; "" if it has none. Words of the target's class are
            distractors: a head that attends to any of them has not found the target. Empty if no class is known.

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


@dataclass(frozen=True, slots=True)
class Relation:
    """A relation that ships with sentences for it.

    Attributes:
        name: Its name, as in `Pair.relation`.
        about: From which word to which.
        language: "en" or "zh".
        source: Where the relation was studied in attention heads, or what this definition rests on.
    """

    name: str
    about: str
    language: str
    source: str
