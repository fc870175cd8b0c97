"""English sentences for eight relations.

A relation's frames are cores, each with its rival in every place that it can have. The rival is another word of the
right word's class, from the same word list; it stands before both words of the pair in a third of the frames (at ^),
between them in a third (at +), behind both in a third (at =), now behind a preposition and now not. So the first, the
last and the nearest word of a class are each the right one in about half of the pairs, and how a sentence begins does
not tell which. Each core with its rival is a case of its own; insertions (at *) and words vary within it.

Half 0 and half 1 have their own cores, rivals, insertions and word lists: they share function words alone. A pair has
one order in a core; most relations have cores in both, because a decoder sees only what stands before.
"""

from __future__ import annotations

from collections.abc import Callable

from headscope.heads.relations.sentences.english_rivals import ACTORS, DETERMINED, DOERS, OTHERS, PERSONS, THINGS
from headscope.heads.relations.sentences.english_words import (
    ADJECTIVES,
    CLAUSE,
    COMPOUND,
    FUNCTION_WORDS,
    KINDS,
    KINDS_OF_WORDS,
    LISTS,
    MANNER,
    NOUNS,
    PLACE,
    WHO,
)
from headscope.heads.relations.sentences.frames import Frame, combine, either_way, fill_all, place
from headscope.heads.relations.sentences.pairs import Example, Relation

__all__ = ["FUNCTION_WORDS", "RELATIONS", "english"]

_CLARK = "Clark et al. 2019, arXiv 1906.04341"
_VOITA = "Voita et al. 2019, arXiv 1905.09418"

RELATIONS: dict[str, Relation] = {
    name: Relation(name, about, "en", source)
    for name, about, source in (
        ("coreference", "A pronoun looks at the noun before it that it stands for, not at another one.", _CLARK),
        ("cause", "The verb of a consequence looks at the word 'because' that gives its reason.", "defined here"),
        ("subject-verb", "A verb looks at the noun that is its subject.", _VOITA),
        ("object-verb", "A noun that is an object looks at its verb.", _CLARK),
        ("determiner-noun", "A determiner (the, this, every) looks at its noun.", _CLARK),
        ("adjective-noun", "An adjective looks at the noun that it describes.", _VOITA),
        ("giver-receiver", "The one who receives something looks at the one who gives it.", "defined here"),
        ("before-after", "The verb of a later event looks at the verb of the earlier one.", "defined here"),
    )
}


def _coreference(half: int) -> list[Frame]:
    """Two nouns, each of which is the right one in every place."""
    openings = (
        (
            "the {x} {stood} near the {y}",
            "near the {x} {stood} the {y}",
            "we {saw} the {adj} {x} with the {y}",
            "we {saw} this {x} , not the {y}",
        ),
        (
            "a {x} {stood} behind the {y}",
            "behind the {x} {stood} a {y}",
            "I {saw} our {adj} {x} by the {y}",
            "I {saw} the {x} , but no {y}",
        ),
    )
    endings = (
        ("* until {p}/s {moved} .", "* before {p}/s {moved} again .", ", * and then {p}/s {moved} ."),
        ("* when {p}/s {moved} .", "* while {p}/s {moved} .", ", * but later {p}/s {moved} ."),
    )
    skeletons = either_way(openings[half], endings[half])
    return combine("coreference", skeletons, MANNER[half], KINDS, NOUNS)


def _cause(half: int) -> list[Frame]:
    cores = (
        (
            "^ because/t the {person} {acted} * + , the {person2} {acted2}/s = .",
            "^ because/t of the {thing} * + the {person} {acted}/s = .",
            "^ it was because/t we {acted} * + that the {adj} {person} {acted2}/s = .",
            "^ the {person} {acted}/s * + , because/t the {person2} {acted2} = .",
            "^ some {adj} {person} {acted}/s * + , because/t of the {thing} = .",
            "^ we {acted}/s * + , and all because/t the {person} {acted2} = .",
        ),
        (
            "^ just because/t a {person} {acted} * + , our {person2} {acted2}/s = .",
            "^ only because/t of our {thing} * + a {person} {acted}/s = .",
            "^ it is because/t each {person} {acted} * + that I {acted2}/s = .",
            "^ our {person} {acted}/s * + , but only because/t a {person2} {acted2} = .",
            "^ that {adj} {person} {acted}/s * + , only because/t of our {thing} = .",
            "^ I {acted}/s * + , just because/t each {person} {acted2} = .",
        ),
    )
    return combine("cause", place(cores[half], ACTORS[half]), PLACE[half], classes=KINDS_OF_WORDS)


def _subject_verb(half: int) -> list[Frame]:
    before = (
        (
            "^ the {person}/t * + {acted}/s = .",
            "^ some {adj} {person}/t * + then {acted}/s = .",
            "^ this {person}/t * + had {acted}/s = .",
        ),
        (
            "^ our {person}/t * + {acted}/s = .",
            "^ a {adj} {person}/t * + later {acted}/s = .",
            "^ each {person}/t * + has just {acted}/s = .",
        ),
    )
    after = (
        (
            "^ in this {place3} {acted}/s * + some {person}/t = .",
            "^ then {acted}/s * + the {adj} {person}/t = .",
            "^ near the {place3} {acted}/s * + this {person}/t = .",
        ),
        (
            "^ by that {place3} {acted}/s * + a {person}/t = .",
            "^ later {acted}/s * + our {adj} {person}/t = .",
            "^ behind the {place3} {acted}/s * + each {person}/t = .",
        ),
    )
    made = combine("subject-verb", place(before[half], ACTORS[half]), WHO[half], classes=KINDS_OF_WORDS)
    return made + combine("subject-verb", place(after[half], ACTORS[half]), PLACE[half], classes=KINDS_OF_WORDS)


def _object_verb(half: int) -> list[Frame]:
    after = (
        (
            "^ the {person} {took}/t * + the {thing}/s = .",
            "^ we {took}/t * + some {adj} {thing}/s = .",
            "^ this {person} then {took}/t * + this {thing}/s = .",
        ),
        (
            "^ our {person} {took}/t * + a {thing}/s = .",
            "^ I {took}/t * + each {adj} {thing}/s = .",
            "^ that {person} later {took}/t * + that {thing}/s = .",
        ),
    )
    before = (
        (
            "^ it was the {thing}/s that the {person} * + {took}/t = .",
            "^ this was some {thing}/s that some {adj} {person} * + {took}/t = .",
            "^ the {adj} {thing}/s that this {person} * + {took}/t was there = .",
        ),
        (
            "^ it is that {thing}/s which our {person} * + {took}/t = .",
            "^ here was a {thing}/s which each {adj} {person} * + {took}/t = .",
            "^ our {adj} {thing}/s which a {person} * + {took}/t was here = .",
        ),
    )
    made = combine("object-verb", place(after[half], DOERS[half]), PLACE[half], classes=KINDS_OF_WORDS)
    return made + combine("object-verb", place(before[half], DOERS[half]), WHO[half], classes=KINDS_OF_WORDS)


def _determiner_noun(half: int) -> list[Frame]:
    cores = (
        (
            "^ {det}/s * {person}/t {acted} = .",
            "^ we {saw} {det}/s * {person}/t = .",
            "^ it was {det}/s * {person}/t who {acted} = .",
            "^ near this {place} {acted} {det}/s * {person}/t = .",
        ),
        (
            "^ {det}/s * {person}/t later {acted} = .",
            "^ I {saw} {det}/s * {person}/t = .",
            "^ it is {det}/s * {person}/t that {acted} = .",
            "^ by our {place} {acted} {det}/s * {person}/t = .",
        ),
    )
    return combine("determiner-noun", place(cores[half], DETERMINED[half]), ADJECTIVES[half], classes=KINDS_OF_WORDS)


def _adjective_noun(half: int) -> list[Frame]:
    before = (
        (
            "^ the {adj}/s * {thing}/t was there = .",
            "^ we {saw} some {adj}/s * {thing}/t = .",
            "^ near this {place} {stood} the very {adj}/s * {thing}/t = .",
        ),
        (
            "^ our {adj}/s * {thing}/t was here = .",
            "^ I {saw} each {adj}/s * {thing}/t = .",
            "^ by that {place} {stood} a rather {adj}/s * {thing}/t = .",
        ),
    )
    after = (
        (
            "^ the {person}/t * + was {adj}/s = .",
            "^ this {person}/t * + was then very {adj}/s = .",
            "^ in the {place} we {saw} that some {person}/t * + was {adj}/s = .",
        ),
        (
            "^ our {person}/t * + was {adj}/s = .",
            "^ that {person}/t * + was later rather {adj}/s = .",
            "^ by that {place} I {saw} that each {person}/t * + was {adj}/s = .",
        ),
    )
    made = combine("adjective-noun", place(before[half], THINGS[half]), COMPOUND[half], classes=KINDS_OF_WORDS)
    return made + combine("adjective-noun", place(after[half], OTHERS[half]), CLAUSE[half], classes=KINDS_OF_WORDS)


def _giver_receiver(half: int) -> list[Frame]:
    giver_first = (
        (
            "^ the {person}/t * + {gave} the {thing} to the {person2}/s = .",
            "^ in this {place3} some {person}/t * + {gave} this {person2}/s the {thing} = .",
            "^ it was the {person}/t * + who {gave} some {adj} {thing} to the {person2}/s = .",
        ),
        (
            "^ a {person}/t * + {gave} that {thing} to our {person2}/s = .",
            "^ by that {place3} our {person}/t * + {gave} each {person2}/s another {thing} = .",
            "^ it is that {person}/t * + who later {gave} a {adj} {thing} to the {person2}/s = .",
        ),
    )
    receiver_first = (
        (
            "^ the {person2}/s * + {got} the {thing} from the {person}/t = .",
            "^ in this {place3} some {person2}/s * + was {given} the {thing} by this {person}/t = .",
            "^ it was the {person2}/s * + who {got} some {adj} {thing} from the {person}/t = .",
        ),
        (
            "^ our {person2}/s * + {got} that {thing} from a {person}/t = .",
            "^ by that {place3} each {person2}/s * + was {given} another {thing} by our {person}/t = .",
            "^ it is that {person2}/s * + who later {got} a {adj} {thing} from the {person}/t = .",
        ),
    )
    skeletons = place(giver_first[half] + receiver_first[half], PERSONS[half])
    return combine("giver-receiver", skeletons, WHO[half], classes=KINDS_OF_WORDS)


def _before_after(half: int) -> list[Frame]:
    cores = (
        (
            "^ after the {person} {acted}/t * + , the {person2} {acted2}/s = .",
            "^ the {person} {acted}/t * + and then the {adj} {person2} {acted2}/s = .",
            "^ we {acted}/t * + , before the {person} {acted2}/s = .",
            "^ before the {person} {acted}/s * + , the {person2} {acted2}/t = .",
            "^ the {person} {acted}/s * + , after the {adj} {person2} {acted2}/t = .",
            "^ we {acted}/s * + , but after the {person} {acted2}/t = .",
        ),
        (
            "^ once the {person} {acted}/t * + , our {person2} {acted2}/s = .",
            "^ first a {person} {acted}/t * + , and later our {adj} {person2} {acted2}/s = .",
            "^ I {acted}/t * + , long before that {person} {acted2}/s = .",
            "^ long before our {person} {acted}/s * + , a {person2} {acted2}/t = .",
            "^ our {person} {acted}/s * + , just after each {adj} {person2} {acted2}/t = .",
            "^ I {acted}/s * + , once that {person} {acted2}/t = .",
        ),
    )
    return combine("before-after", place(cores[half], ACTORS[half]), PLACE[half], classes=KINDS_OF_WORDS)


_MAKERS: tuple[Callable[[int], list[Frame]], ...] = (
    _coreference,
    _cause,
    _subject_verb,
    _object_verb,
    _determiner_noun,
    _adjective_noun,
    _giver_receiver,
    _before_after,
)


def english() -> list[Example]:
    """The English sentences of all relations, both halves; the same ones each time.

    >>> print(english()[0].text)
    The monk stood near the waitress patiently until he moved.
    """
    halves = [[frame for make in _MAKERS for frame in make(half)] for half in (0, 1)]
    return fill_all(halves, LISTS, language="en")
