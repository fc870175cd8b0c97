"""Rivals in the English frames: what could be taken for the right word, and where that stands.

For each half three lists: what comes before both words of a pair, between them, behind both. Some begin with a
preposition, some do not. A rival's slots are filled from the lists that the right word comes from.
"""

from __future__ import annotations

from headscope.heads.relations.sentences.frames import Rivals

__all__ = ["ACTORS", "DETERMINED", "DOERS", "OTHERS", "PERSONS", "THINGS"]

# Another person, before, between and behind.
PERSONS: tuple[Rivals, Rivals] = (
    (
        ("near the {person3}", "there {stood} a {person3} , and", "with this {person3}", "the {person3} {slept} , and"),
        ("near the {person3}", ", not the {person3} ,", "with this {person3}", "and not the {person3}"),
        ("near the {person3}", ", not the {person3}", "with this {person3}", ", and the {person3} {slept}"),
    ),
    (
        ("by our {person3}", "here {stood} a {person3} , so", "behind each {person3}", "a {person3} {slept} , but"),
        ("by our {person3}", ", but no {person3} ,", "behind a {person3}", "rather than the {person3}"),
        ("by our {person3}", ", but no {person3}", "behind each {person3}", ", so a {person3} {slept}"),
    ),
)
# Another person with an adjective.
OTHERS: tuple[Rivals, Rivals] = tuple(  # type: ignore[assignment]
    tuple(tuple(text.replace("{person3}", "{adj2} {person3}") for text in texts) for texts in rivals)
    for rivals in PERSONS
)
# Another person who does something else.
ACTORS: tuple[Rivals, Rivals] = (
    (
        (
            "near the {person3} who {acted3} ,",
            "though the {person3} {acted3} ,",
            "with this {person3} who {acted3} ,",
            "the {person3} {acted3} , and",
        ),
        (
            "near the {person3} who {acted3}",
            ", though the {person3} {acted3} ,",
            "with this {person3} who {acted3}",
            ", if the {person3} {acted3} ,",
        ),
        (
            "near the {person3} who {acted3}",
            ", though the {person3} {acted3}",
            "with this {person3} who {acted3}",
            ", and the {person3} {acted3}",
        ),
    ),
    (
        (
            "by our {person3} that {acted3} ,",
            "while a {person3} {acted3} ,",
            "behind each {person3} that {acted3} ,",
            "a {person3} {acted3} , but",
        ),
        (
            "by our {person3} that {acted3}",
            ", while a {person3} {acted3} ,",
            "behind each {person3} that {acted3}",
            ", unless a {person3} {acted3} ,",
        ),
        (
            "by our {person3} that {acted3}",
            ", while a {person3} {acted3}",
            "behind each {person3} that {acted3}",
            ", but a {person3} {acted3}",
        ),
    ),
)
# The same, and something that it is done to.
DOERS: tuple[Rivals, Rivals] = (
    (
        (
            "near the {person3} who {took3} the {thing3} ,",
            "though the {person3} {took3} some {thing3} ,",
            "with this {person3} who {took3} this {thing3} ,",
            "the {person3} {took3} the {thing3} , and",
        ),
        (
            "near the {person3} who {took3} the {thing3} ,",
            ", though the {person3} {took3} some {thing3} ,",
            "with this {person3} who {took3} this {thing3} ,",
            ", if the {person3} {took3} the {thing3} ,",
        ),
        (
            "near the {person3} who {took3} the {thing3}",
            ", though the {person3} {took3} some {thing3}",
            "with this {person3} who {took3} this {thing3}",
            ", and the {person3} {took3} the {thing3}",
        ),
    ),
    (
        (
            "by our {person3} that {took3} a {thing3} ,",
            "while a {person3} {took3} each {thing3} ,",
            "behind each {person3} that {took3} that {thing3} ,",
            "a {person3} {took3} our {thing3} , but",
        ),
        (
            "by our {person3} that {took3} a {thing3} ,",
            ", while a {person3} {took3} each {thing3} ,",
            "behind each {person3} that {took3} that {thing3} ,",
            ", unless a {person3} {took3} our {thing3} ,",
        ),
        (
            "by our {person3} that {took3} a {thing3}",
            ", while a {person3} {took3} each {thing3}",
            "behind each {person3} that {took3} that {thing3}",
            ", but a {person3} {took3} our {thing3}",
        ),
    ),
)
# Another thing with an adjective, before and behind.
THINGS: tuple[Rivals, Rivals] = (
    (
        (
            "near the {adj2} {thing2}",
            "there was a {adj2} {thing2} , and",
            "with some {adj2} {thing2}",
            "the {adj2} {thing2} was there , and",
        ),
        (),
        (
            "near the {adj2} {thing2}",
            ", not the {adj2} {thing2}",
            "with some {adj2} {thing2}",
            ", and the {adj2} {thing2} was there",
        ),
    ),
    (
        (
            "by our {adj2} {thing2}",
            "here was a {adj2} {thing2} , so",
            "behind each {adj2} {thing2}",
            "a {adj2} {thing2} was here , but",
        ),
        (),
        (
            "by our {adj2} {thing2}",
            ", but no {adj2} {thing2}",
            "behind each {adj2} {thing2}",
            ", so a {adj2} {thing2} was here",
        ),
    ),
)
# Another noun with its determiner, before and behind.
DETERMINED: tuple[Rivals, Rivals] = (
    (
        (
            "near {det2} {person2}",
            "there {stood} {det2} {person2} , and",
            "with {det2} {person2}",
            "{det2} {person2} {acted2} , and",
        ),
        (),
        ("near {det2} {person2}", ", not {det2} {person2}", "with {det2} {person2}", ", and {det2} {person2} {acted2}"),
    ),
    (
        (
            "by {det2} {person2}",
            "here {stood} {det2} {person2} , so",
            "behind {det2} {person2}",
            "{det2} {person2} {acted2} , but",
        ),
        (),
        (
            "by {det2} {person2}",
            ", but not {det2} {person2}",
            "behind {det2} {person2}",
            ", so {det2} {person2} {acted2}",
        ),
    ),
)
