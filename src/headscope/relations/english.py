"""English sentences for eight relations.

A relation's frames are its skeletons, each with every insertion of its list. Half 0 and half 1 have their own
skeletons, insertions and word lists: they share function words alone. A skeleton's pair has one order; most
relations have skeletons in both orders, because a decoder sees only what stands before.
"""

from __future__ import annotations

from collections.abc import Callable

from headscope.relations.english_words import (
    BEFORE_NOUN,
    COMPOUND,
    FUNCTION_WORDS,
    KINDS,
    LISTS,
    MANNER,
    PLACE,
    WHO,
)
from headscope.relations.frames import Frame, combine, fill_all
from headscope.relations.pairs import Example, Relation

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
    skeletons = (
        (
            "The {a}/t {stood} near the {d} * until {p}/s {moved} .",
            "Near the {d} {stood} the {a}/t * until {p}/s {moved} .",
            "We {saw} the {a}/t and the {d} * before {p}/s {moved} again .",
            "We {saw} the {d} and the {a}/t * before {p}/s {moved} again .",
            "With the {d} {stood} some {adj} {a}/t * and then {p}/s {moved} .",
            "The {adj} {a}/t {stood} with our {d} * , and then {p}/s {moved} .",
        ),
        (
            "I {saw} the {a}/t but not the {d} * when {p}/s {moved} .",
            "I {saw} not only the {d} but also the {a}/t * when {p}/s {moved} .",
            "Behind the {d} {stood} the {a}/t * while {p}/s {moved} .",
            "The {a}/t {stood} behind the {d} * while {p}/s {moved} .",
            "By the {adj} {d} {stood} the {a}/t * , but later {p}/s {moved} .",
            "That {a}/t {stood} by the {adj} {d} * , but later {p}/s {moved} .",
        ),
    )
    return combine("coreference", skeletons[half], MANNER[half], KINDS)


def _cause(half: int) -> list[Frame]:
    skeletons = (
        (
            "Because/t the {person} {slept} * , the {person2} {moved}/s .",
            "Because/t of the {thing} the {adj} {person} * {moved}/s .",
            "And because/t the {person} {took} the {thing} * , we all {moved}/s .",
            "The {person} {moved}/s * because/t the {person2} {slept} .",
            "The {person} {took}/s the {thing} * because/t of the {person2} .",
            "We {slept}/s * , and all because/t the {person} {moved} .",
        ),
        (
            "It was because/t the {person} {slept} * that the {person2} {moved}/s .",
            "Just because/t the {person} {took} the {thing} * , our {person2} {slept}/s .",
            "When , because/t of our {person} * , the {person2} {moved}/s , I {slept} .",
            "The {person} {moved}/s * , but only because/t the {person2} {slept} .",
            "I {slept}/s * just because/t every {person} {moved} .",
            "Each {person} {took}/s the {thing} * only because/t I {slept} .",
        ),
    )
    return combine("cause", skeletons[half], PLACE[half])


def _subject_verb(half: int) -> list[Frame]:
    before = (
        (
            "The {person}/t * {moved}/s .",
            "In the {place3} the {adj} {person}/t * then {took}/s the {thing} .",
            "We {saw} that the {person}/t * had {slept}/s .",
        ),
        (
            "Our {person}/t * {moved}/s .",
            "By the {place3} some {adj} {person}/t * later {took}/s the {thing} .",
            "I {saw} that each {person}/t * had {slept}/s .",
        ),
    )
    after = (
        (
            "Near the {place3} {stood}/s * the {person}/t .",
            "With the {thing} {stood}/s * , as before , the {adj} {person}/t .",
            "In this {place3} {slept}/s * some {person}/t and the {person2} .",
        ),
        (
            "Behind the {place3} {stood}/s * a {person}/t .",
            "On the {thing} {stood}/s * , as ever , each {adj} {person}/t .",
            "By that {place3} {slept}/s * our {person}/t , but no {person2} .",
        ),
    )
    relation = "subject-verb"
    return combine(relation, before[half], WHO[half]) + combine(relation, after[half], PLACE[half])


def _object_verb(half: int) -> list[Frame]:
    after = (
        (
            "The {person} {took}/t * the {thing}/s .",
            "We {took}/t * some {adj} {thing}/s with the {person} .",
            "In the {place3} the {person} {saw}/t * the very {adj} {thing}/s .",
        ),
        (
            "Our {person} {took}/t * a {thing}/s .",
            "I {took}/t * each {adj} {thing}/s by the {person} .",
            "By the {place3} some {person} {saw}/t * that rather {adj} {thing}/s .",
        ),
    )
    before = (
        (
            "The {thing}/s that the {person} * {took}/t was very {adj} .",
            "It was the {thing}/s that this {adj} {person} * {took}/t .",
            "This was the {thing}/s , and the {person} * then {took}/t it .",
        ),
        (
            "That {thing}/s our {person} * {took}/t later .",
            "Not the {thing2} but the {thing}/s was that which each {person} * {took}/t .",
            "The {adj} {thing}/s , as ever , our {adj2} {person} * {took}/t .",
        ),
    )
    relation = "object-verb"
    return combine(relation, after[half], PLACE[half]) + combine(relation, before[half], WHO[half])


def _determiner_noun(half: int) -> list[Frame]:
    skeletons = (
        (
            "The/s * {person}/t {slept} .",
            "In this/s * {place}/t the {person} {slept} .",
            "The {person} {took} every/s * {thing}/t .",
            "We {saw} some/s * {people}/t near the {place} .",
            "The {person} {moved} and the/s * {person2}/t {slept} .",
            "It was this/s * {thing}/t that the {person} {took} .",
        ),
        (
            "That/s * {person}/t {slept} .",
            "By the/s * {place}/t I {slept} .",
            "I {took} another/s * {thing}/t .",
            "I {saw} no/s * {people}/t by the {place} .",
            "The {person} {moved} but each/s * {person2}/t {slept} .",
            "It was a {person} that {took} the/s * {thing}/t later .",
        ),
    )
    return combine("determiner-noun", skeletons[half], BEFORE_NOUN[half])


def _adjective_noun(half: int) -> list[Frame]:
    before = (
        (
            "The {person} {took} the {adj}/s * {thing}/t .",
            "In this very {adj}/s * {place}/t the {person} {slept} .",
            "Some {adj}/s * {thing}/t was in the {place} .",
            "We {saw} the {adj}/s * {thing}/t and the {person} .",
        ),
        (
            "I {took} that {adj}/s * {thing}/t .",
            "By our rather {adj}/s * {place}/t a {person} {slept} .",
            "Another {adj}/s * {thing}/t was by the {place} .",
            "A {person} {saw} each {adj}/s * {thing}/t but no {person2} .",
        ),
    )
    after = (
        (
            "The {person}/t * was {adj}/s .",
            "We {saw} that this {person}/t * was very {adj}/s .",
            "In the {place3} the {person}/t * was then {adj}/s and {adj2} .",
        ),
        (
            "Our {person}/t * was {adj}/s .",
            "I {saw} that each {person}/t * was so {adj}/s .",
            "By that {place3} a {person}/t * was not just {adj}/s but {adj2} .",
        ),
    )
    relation = "adjective-noun"
    return combine(relation, before[half], COMPOUND[half]) + combine(relation, after[half], WHO[half])


def _giver_receiver(half: int) -> list[Frame]:
    giver_first = (
        (
            "The {person}/t * {gave} the {thing} to the {person2}/s .",
            "In the {place3} the {person}/t * {gave} the {person2}/s some {thing} .",
            "It was the {person}/t * who then {gave} this {adj} {thing} to the {person2}/s .",
        ),
        (
            "A {person}/t * {gave} that {thing} to our {person2}/s .",
            "By the {place3} a {person}/t * {gave} each {person2}/s another {thing} .",
            "Our {person}/t * later {gave} that rather {adj} {thing} to a {person2}/s .",
        ),
    )
    receiver_first = (
        (
            "The {person2}/s * {got} the {thing} from the {person}/t .",
            "The {person2}/s * was {given} the {adj} {thing} by this {person}/t .",
            "This {person2}/s * was then {given} the {thing} , and by the {person}/t .",
        ),
        (
            "Our {person2}/s * {got} that {thing} from a {person}/t .",
            "Each {person2}/s * was {given} our {adj} {thing} by another {person}/t .",
            "A {person2}/s * was later {given} a {thing} , but only by our {adj} {person}/t .",
        ),
    )
    relation = "giver-receiver"
    return combine(relation, giver_first[half], WHO[half]) + combine(relation, receiver_first[half], WHO[half])


def _before_after(half: int) -> list[Frame]:
    skeletons = (
        (
            "After the {person} {slept}/t * , the {person2} {moved}/s .",
            "The {person} {slept}/t * and then the {person2} {took}/s the {thing} .",
            "The {person} {moved}/t * before the very {adj} {person2} {slept}/s .",
            "Before the {person} {slept}/s * , the {person2} {moved}/t .",
            "The {person} {moved}/s * after the {adj} {person2} {slept}/t .",
            "We {took}/s the {thing} * , but after the {person} {moved}/t .",
        ),
        (
            "Once the {person} {slept}/t * , our {person2} {moved}/s .",
            "First the {person} {slept}/t * , but later our {person2} {took}/s the {thing} .",
            "I {moved}/t * long before that {adj} {person2} {slept}/s .",
            "Long before the {person} {slept}/s * , a {person2} {moved}/t .",
            "I {moved}/s * only once each {adj} {person2} {slept}/t .",
            "Our {person} {took}/s a {thing} * just after the {person2} {moved}/t .",
        ),
    )
    return combine("before-after", skeletons[half], PLACE[half])


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
    The aunt stood near the waiter until she vanished.
    """
    halves = [[frame for make in _MAKERS for frame in make(half)] for half in (0, 1)]
    return fill_all(halves, LISTS, language="en")
