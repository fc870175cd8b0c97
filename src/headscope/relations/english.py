"""English sentences for eight relations.

A relation's frames are its skeletons, each with every insertion of its list. Half 0 and half 1 have their own
skeletons, insertions and word lists: they share function words alone. A skeleton's pair has one order; most
relations have skeletons in both orders, because a decoder sees only what stands before.

Where another word of the right word's class could be taken for it, it stands before both words of the pair in a third
of the skeletons of an order, between them in a third, behind both in a third, and comes from the same word list. So
the nearest word of a class, the first and the last are each the right one in half of the pairs that have a rival.
"""

from __future__ import annotations

from collections.abc import Callable

from headscope.relations.english_words import (
    BEFORE_NOUN,
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
            "The {adj} {a}/t {stood} with our {d} * and then {p}/s {moved} .",
        ),
        (
            "I {saw} the {a}/t but not the {d} * when {p}/s {moved} .",
            "I {saw} not only the {d} but also the {a}/t * when {p}/s {moved} .",
            "Behind the {d} {stood} the {a}/t * while {p}/s {moved} .",
            "The {a}/t {stood} behind the {d} * while {p}/s {moved} .",
            "By the {adj} {d} {stood} the {a}/t * but later {p}/s {moved} .",
            "The {a}/t {stood} by the {adj} {d} * but later {p}/s {moved} .",
        ),
    )
    return combine("coreference", skeletons[half], MANNER[half], KINDS, NOUNS)


def _cause(half: int) -> list[Frame]:
    skeletons = (
        (
            "Because/t the {person} {acted} * , the {person2} {acted2}/s .",
            "Because/t the {person} {acted} * , the {person2} {acted2}/s near the {person3} who {acted3} .",
            "And because/t the {person} {acted} * , we all {acted2}/s .",
            "Because/t of the {thing} * the {person} who {acted} {acted2}/s .",
            "The {person} who {acted} {acted2}/s * because/t the {person2} {acted3} .",
            "The {person} {acted}/s near the {person3} who {acted2} * because/t the {person2} {acted3} .",
            "The {person} who {acted} {acted2}/s * because/t of the {person2} .",
            "We {acted}/s * with the {person} who {acted2} , and all because/t the {person2} {acted3} .",
        ),
        (
            "It was because/t the {person} {acted} * that the {person2} {acted2}/s .",
            "It was because/t the {person} {acted} * that the {person2} {acted2}/s by the {person3} that {acted3} .",
            "Just because/t the {person} {acted} * , our {person2} {acted2}/s .",
            "Only because/t of our {person} * a {person2} that {acted} {acted2}/s .",
            "The {person} that {acted} {acted2}/s * , but only because/t the {person2} {acted3} .",
            "The {person} {acted}/s by the {person3} that {acted2} * , but only because/t the {person2} {acted3} .",
            "Each {person} that {acted} {acted2}/s * only because/t I {acted3} .",
            "I {acted}/s * by the {person} that {acted2} , just because/t every {person2} {acted3} .",
        ),
    )
    return combine("cause", skeletons[half], PLACE[half], classes=KINDS_OF_WORDS)


def _subject_verb(half: int) -> list[Frame]:
    before = (
        (
            "Near the {person2} who {acted} the {person}/t * {acted2}/s .",
            "With the {person2} who {acted} some {adj} {person}/t * then {acted2}/s .",
            "The {person}/t near the {person2} who {acted} * {acted2}/s .",
            "This {adj} {person}/t with the {person2} who {acted} * then {acted2}/s .",
            "The {person}/t * {acted}/s near the {person2} who {acted2} .",
            "The {adj} {person}/t * had {acted}/s with the {person2} who {acted2} .",
        ),
        (
            "By our {person2} that {acted} a {person}/t * {acted2}/s .",
            "Behind each {person2} that {acted} the {adj} {person}/t * later {acted2}/s .",
            "Our {person}/t by the {person2} that {acted} * {acted2}/s .",
            "That {adj} {person}/t behind a {person2} that {acted} * later {acted2}/s .",
            "Our {person}/t * {acted}/s by a {person2} that {acted2} .",
            "Another {adj} {person}/t * had {acted}/s behind each {person2} that {acted2} .",
        ),
    )
    after = (
        (
            "Near the {person2} who {stood2} {stood}/s * the {person}/t .",
            "In this {place3} with the {person2} who {acted} {acted2}/s * some {person}/t .",
            "Near the {place3} {stood}/s * with the {person2} who {stood2} the {person}/t .",
            "In this {place3} {acted}/s * near the {person2} who {acted2} some {person}/t .",
            "Near the {place3} {stood}/s * the {person}/t with the {person2} who {stood2} .",
            "In this {place3} {acted}/s * some {person}/t near the {person2} who {acted2} .",
        ),
        (
            "Behind a {person2} that {stood2} {stood}/s * our {person}/t .",
            "By that {place3} behind each {person2} that {acted} {acted2}/s * a {person}/t .",
            "Behind the {place3} {stood}/s * by the {person2} that {stood2} a {person}/t .",
            "By that {place3} {acted}/s * behind our {person2} that {acted2} another {person}/t .",
            "Behind the {place3} {stood}/s * a {person}/t by the {person2} that {stood2} .",
            "By that {place3} {acted}/s * each {person}/t behind our {person2} that {acted2} .",
        ),
    )
    made = combine("subject-verb", before[half], WHO[half], classes=KINDS_OF_WORDS)
    return made + combine("subject-verb", after[half], PLACE[half], classes=KINDS_OF_WORDS)


def _object_verb(half: int) -> list[Frame]:
    after = (
        (
            "Near the {person2} who {took2} the {thing2} the {person} {took}/t * the {thing}/s .",
            "With the {person2} who {saw2} this {thing2} we {saw}/t * some {adj} {thing}/s .",
            "The {person} {took}/t * with the {person2} who {took2} the {thing2} the {thing}/s .",
            "We {saw}/t * near the {person2} who {saw2} this {thing2} the very {adj} {thing}/s .",
            "The {person} {took}/t * the {thing}/s with the {person2} who {took2} the {thing2} .",
            "We {saw}/t * some {adj} {thing}/s near the {person2} who {saw2} this {thing2} .",
        ),
        (
            "By our {person2} that {took2} a {thing2} the {person} {took}/t * each {thing}/s .",
            "Behind each {person2} that {saw2} that {thing2} I {saw}/t * another {adj} {thing}/s .",
            "Our {person} {took}/t * by the {person2} that {took2} a {thing2} the {thing}/s .",
            "I {saw}/t * behind a {person2} that {saw2} that {thing2} each rather {adj} {thing}/s .",
            "Our {person} {took}/t * a {thing}/s by the {person2} that {took2} the {thing2} .",
            "I {saw}/t * another {adj} {thing}/s behind a {person2} that {saw2} each {thing2} .",
        ),
    )
    before = (
        (
            "Near the {person2} who {took2} the {thing2} was the {thing}/s that the {person} * {took}/t .",
            "With the {person2} who {saw2} this {thing2} was the {thing}/s that this {adj} {person} * {saw}/t .",
            "The {thing}/s that the {person} with the {person2} who {took2} the {thing2} * {took}/t was {adj} .",
            "It was the {thing}/s that this {adj} {person} near the {person2} who {saw2} some {thing2} * {saw}/t .",
            "The {thing}/s that the {person} * {took}/t was with the {person2} who {took2} the {thing2} .",
            "It was the {thing}/s that this {adj} {person} * {saw}/t near the {person2} who {saw2} some {thing2} .",
        ),
        (
            "By our {person2} that {took2} a {thing2} was the {thing}/s which a {person} * {took}/t .",
            "Behind each {person2} that {saw2} that {thing2} was a {thing}/s which our {adj} {person} * {saw}/t .",
            "That {thing}/s which the {person} by a {person2} that {took2} the {thing2} * {took}/t was {adj} .",
            "It was a {thing}/s which each {adj} {person} behind our {person2} that {saw2} a {thing2} * {saw}/t .",
            "That {thing}/s which the {person} * {took}/t was by a {person2} that {took2} the {thing2} .",
            "It was a {thing}/s which each {adj} {person} * {saw}/t behind our {person2} that {saw2} a {thing2} .",
        ),
    )
    made = combine("object-verb", after[half], PLACE[half], classes=KINDS_OF_WORDS)
    return made + combine("object-verb", before[half], WHO[half], classes=KINDS_OF_WORDS)


def _determiner_noun(half: int) -> list[Frame]:
    skeletons = (
        (
            "Near {det2} {person2} {slept} {det}/s * {person}/t .",
            "And {det}/s * {person}/t {slept} near {det2} {person2} .",
            "With {det2} {thing2} we {saw} {det}/s * {thing}/t .",
            "We {took} {det}/s * {thing}/t with {det2} {thing2} .",
            "It was with {det2} {thing2} that {det3} {person} {took} {det}/s * {thing}/t .",
            "Then {det}/s * {person}/t {took} {det2} {thing} near {det3} {person2} .",
        ),
        (
            "By {det2} {person2} {slept} {det}/s * {person}/t .",
            "But {det}/s * {person}/t {slept} by {det2} {person2} .",
            "Behind {det2} {thing2} I {saw} {det}/s * {thing}/t .",
            "I {took} {det}/s * {thing}/t by {det2} {thing2} .",
            "It was by {det2} {thing2} that {det3} {person} {took} {det}/s * {thing}/t later .",
            "Later {det}/s * {person}/t {took} {det2} {thing} behind {det3} {person2} .",
        ),
    )
    return combine("determiner-noun", skeletons[half], BEFORE_NOUN[half], classes=KINDS_OF_WORDS)


def _adjective_noun(half: int) -> list[Frame]:
    before = (
        (
            "Near the {thing2} {stood} the {adj}/s * {thing}/t .",
            "With some {thing2} we {saw} this very {adj}/s * {thing}/t .",
            "Some {adj}/s * {thing}/t was near the {thing2} .",
            "We {saw} the {adj}/s * {thing}/t and the {thing2} .",
        ),
        (
            "By that {thing2} {stood} our {adj}/s * {thing}/t .",
            "Behind each {thing2} I {saw} another rather {adj}/s * {thing}/t .",
            "A {adj}/s * {thing}/t was behind that {thing2} .",
            "I {saw} each {adj}/s * {thing}/t but no {thing2} .",
        ),
    )
    after = (
        (
            "Near the {adj2} {person2} the {person}/t * was {adj}/s .",
            "With this {adj2} {person2} the {person}/t * was then {adj}/s .",
            "The {person}/t near the {adj2} {person2} * was {adj}/s .",
            "This {person}/t with the {adj2} {person2} * was very {adj}/s .",
            "The {person}/t * was {adj}/s near the {adj2} {person2} .",
            "We {saw} that this {person}/t * was very {adj}/s with the {adj2} {person2} .",
        ),
        (
            "By our {adj2} {person2} a {person}/t * was {adj}/s .",
            "Behind each {adj2} {person2} the {person}/t * was rather {adj}/s .",
            "Our {person}/t by the {adj2} {person2} * was {adj}/s .",
            "That {person}/t behind a {adj2} {person2} * was so {adj}/s .",
            "Our {person}/t * was {adj}/s by the {adj2} {person2} .",
            "I {saw} that each {person}/t * was so {adj}/s behind a {adj2} {person2} .",
        ),
    )
    made = combine("adjective-noun", before[half], COMPOUND[half], classes=KINDS_OF_WORDS)
    return made + combine("adjective-noun", after[half], CLAUSE[half], classes=KINDS_OF_WORDS)


def _giver_receiver(half: int) -> list[Frame]:
    giver_first = (
        (
            "Near the {person3} the {person}/t * {gave} the {thing} to the {person2}/s .",
            "With the {person3} some {person}/t * {gave} the {person2}/s the {thing} .",
            "The {person}/t * , not the {person3} , {gave} the {person2}/s some {thing} .",
            "It was the {person}/t * and not the {person3} who {gave} this {adj} {thing} to the {person2}/s .",
            "The {person}/t * {gave} this {person2}/s , not the {person3} , the {thing} .",
            "It was the {person}/t * who {gave} this {adj} {thing} to the {person2}/s near the {person3} .",
        ),
        (
            "By our {person3} a {person}/t * {gave} that {thing} to the {person2}/s .",
            "Behind each {person3} the {person}/t * {gave} our {person2}/s a {thing} .",
            "A {person}/t * , but no {person3} , {gave} each {person2}/s another {thing} .",
            "Our {person}/t * rather than the {person3} later {gave} that {adj} {thing} to a {person2}/s .",
            "A {person}/t * {gave} each {person2}/s , but no {person3} , another {thing} .",
            "Our {person}/t * later {gave} that rather {adj} {thing} to a {person2}/s by the {person3} .",
        ),
    )
    receiver_first = (
        (
            "Near the {person3} the {person2}/s * {got} the {thing} from the {person}/t .",
            "With the {person3} this {person2}/s * was {given} the {adj} {thing} by some {person}/t .",
            "The {person2}/s * , not the {person3} , {got} some {thing} from the {person}/t .",
            "The {person2}/s * and not the {person3} was then {given} the {thing} by this {person}/t .",
            "The {person2}/s * {got} the {thing} from the {person}/t , not from the {person3} .",
            "This {person2}/s * was then {given} the {adj} {thing} by the {person}/t near the {person3} .",
        ),
        (
            "By our {person3} the {person2}/s * {got} that {thing} from a {person}/t .",
            "Behind each {person3} a {person2}/s * was {given} our {adj} {thing} by another {person}/t .",
            "Each {person2}/s * , but no {person3} , {got} a {thing} from our {person}/t .",
            "A {person2}/s * rather than the {person3} was later {given} a {thing} by that {person}/t .",
            "Each {person2}/s * {got} that {thing} from our {person}/t , but from no {person3} .",
            "A {person2}/s * was later {given} the {adj} {thing} by another {person}/t behind the {person3} .",
        ),
    )
    made = combine("giver-receiver", giver_first[half], WHO[half], classes=KINDS_OF_WORDS)
    return made + combine("giver-receiver", receiver_first[half], WHO[half], classes=KINDS_OF_WORDS)


def _before_after(half: int) -> list[Frame]:
    earlier_first = (
        (
            "After the {person} who {acted} {acted2}/t * , the {person2} {acted3}/s .",
            "The {person} who {acted} {acted2}/t * before the {adj} {person2} {acted3}/s .",
            "After the {person} {acted}/t * , the {person2} who {acted2} {acted3}/s .",
            "The {person} {acted}/t * and then the {person2} who {acted2} {acted3}/s .",
            "The {person} {acted}/t * and then the {person2} {acted2}/s with the {person3} who {acted3} .",
            "The {person} {acted}/t * before the {adj} {person2} {acted2}/s near the {person3} who {acted3} .",
        ),
        (
            "Once the {person} that {acted} {acted2}/t * , our {person2} {acted3}/s .",
            "A {person} that {acted} {acted2}/t * long before that {adj} {person2} {acted3}/s .",
            "Once the {person} {acted}/t * , our {person2} that {acted2} {acted3}/s .",
            "First the {person} {acted}/t * , but later our {person2} that {acted2} {acted3}/s .",
            "First the {person} {acted}/t * , but later our {person2} {acted2}/s by the {person3} that {acted3} .",
            "I {acted}/t * long before that {adj} {person2} {acted2}/s behind a {person3} that {acted3} .",
        ),
    )
    later_first = (
        (
            "Before the {person} who {acted} {acted2}/s * , the {person2} {acted3}/t .",
            "The {person} who {acted} {acted2}/s * after the {adj} {person2} {acted3}/t .",
            "Before the {person} {acted}/s * , the {person2} who {acted2} {acted3}/t .",
            "The {person} {acted}/s * after the {adj} {person2} who {acted2} {acted3}/t .",
            "Before the {person} {acted}/s * , the {person2} {acted2}/t with the {person3} who {acted3} .",
            "We {acted}/s * , but after the {person} {acted2}/t near the {person2} who {acted3} .",
        ),
        (
            "Long before the {person} that {acted} {acted2}/s * , a {person2} {acted3}/t .",
            "A {person} that {acted} {acted2}/s * only once each {adj} {person2} {acted3}/t .",
            "Long before the {person} {acted}/s * , a {person2} that {acted2} {acted3}/t .",
            "I {acted}/s * only once each {adj} {person2} that {acted2} {acted3}/t .",
            "Long before the {person} {acted}/s * , a {person2} {acted2}/t by the {person3} that {acted3} .",
            "Our {person} {acted}/s * just after the {person2} {acted2}/t behind each {person3} that {acted3} .",
        ),
    )
    return combine("before-after", earlier_first[half] + later_first[half], PLACE[half], classes=KINDS_OF_WORDS)


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
