"""What the English frames are filled with: word lists and insertions, a set for each half.

The halves share no content word; function words may stand in both. An insertion of each length makes the two
words of a pair stand at many distances.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = [
    "ADJECTIVES",
    "CLAUSE",
    "COMPOUND",
    "FUNCTION_WORDS",
    "KINDS",
    "KINDS_OF_WORDS",
    "LISTS",
    "MANNER",
    "NOUNS",
    "PLACE",
    "WHO",
]


def _words(listed: str) -> frozenset[str]:
    return frozenset(listed.split())


FUNCTION_WORDS = _words(
    """a after again all also and another as at because before behind but by each ever every first from had
    has he here i if in indeed is it just later like long near neither no nor not of on once only or our rather
    she so some than that the then there they this though to unless until very was we when which while who with"""
)

# The class of a slot's words, and of words: those of one class are rivals of each other.
KINDS_OF_WORDS: Mapping[str, str] = {
    **dict.fromkeys(("{man}", "{woman}", "{person}"), "person"),
    **{f"{{{name}}}": name for name in ("thing", "place")},
    **dict.fromkeys(
        ("{acted}", "{gave}", "{given}", "{got}", "{moved}", "{saw}", "{slept}", "{stood}", "{took}"), "verb"
    ),
    "{adj}": "adjective",
    "{adv}": "adverb",
    **dict.fromkeys(("he", "she", "it", "they", "we", "i"), "pronoun"),
    **dict.fromkeys(("{det}", "the", "a", "this", "some", "every", "each", "no", "our", "another"), "determiner"),
}
# The same where any noun could be meant.
NOUNS: Mapping[str, str] = {
    word: "noun" if kind in ("person", "thing", "place") else kind for word, kind in KINDS_OF_WORDS.items()
}


def _lists(**lists: str) -> dict[str, list[str]]:
    return {name: words.split() for name, words in lists.items()}


LISTS: tuple[Mapping[str, list[str]], ...] = (
    _lists(
        man="king uncle father boy waiter monk",
        woman="queen aunt mother girl waitress nun",
        person="farmer doctor teacher baker sailor lawyer",
        thing="letter basket hammer lamp ball cup",
        place="garden kitchen village station church market",
        det="the this every some",
        adj="little small heavy bright strange dirty",
        adv="slowly quietly silently patiently",
        stood="stood sat",
        moved="moved vanished returned",
        slept="slept laughed waited smiled",
        acted="moved vanished returned slept laughed waited smiled",
        saw="saw noticed remembered",
        took="carried lifted painted broke",
        gave="gave handed sold sent",
        given="given handed sold sent",
        got="received bought",
    ),
    _lists(
        man="prince brother grandfather son duke hero",
        woman="princess sister grandmother daughter duchess heroine",
        person="nurse sculptor soldier driver judge pilot",
        thing="book box knife chair key plate",
        place="forest library office harbour school castle",
        det="that each another our",
        adj="new large light dark plain clean",
        adv="quickly calmly carefully gladly",
        stood="remained rested",
        moved="disappeared dropped turned",
        slept="cried arrived shouted coughed",
        acted="disappeared dropped turned cried arrived shouted coughed",
        saw="watched spotted described",
        took="cleaned opened pushed hid",
        gave="lent offered passed brought",
        given="lent offered passed brought",
        got="accepted borrowed",
    ),
)

# Who a pronoun stands for, who else is there, and the pronoun. Any two kinds stand both ways: none is right more often.
KINDS: tuple[Mapping[str, str], ...] = tuple(
    {"{a}": a, "{d}": d, "{p}": p}
    for a, d, p in (
        ("{man}", "{woman}", "he"),
        ("{woman}", "{man}", "she"),
        ("{thing}", "{man}", "it"),
        ("{man}", "{thing}", "he"),
        ("{woman}", "{thing}", "she"),
        ("{thing}", "{woman}", "it"),
    )
)

# How something is done, without a noun: from no word to eight.
MANNER = (
    (
        "",
        "{adv}",
        "very {adv}",
        "{adv} and {adv2}",
        "very {adv} and {adv2}",
        ", {adv} and {adv2} ,",
        ", very {adv} and {adv2} ,",
        ", not {adv} but very {adv2} indeed ,",
    ),
    (
        "",
        "{adv}",
        "so {adv}",
        "{adv} or {adv2}",
        ", {adv} as ever ,",
        "not so {adv} but rather {adv2}",
        ", though not so {adv} ,",
        "neither so {adv} nor all so {adv2} as ever",
    ),
)
# Where something is done.
PLACE = (
    (
        "",
        "{adv}",
        "{adv} again",
        "in the {place}",
        "in the {adj4} {place}",
        "{adv} in the {adj4} {place}",
        "in the {place} of the {place2}",
        "{adv} in the {adj4} {place} of the {place2}",
    ),
    (
        "",
        "{adv}",
        "so {adv}",
        "behind the {place}",
        "{adv} behind the {place}",
        "behind the {adj4} {place} as ever",
        "behind the {place} by the {place2}",
        "behind the {adj4} , {adj5} {place} by the {place2}",
    ),
)
# Where a person is from, without another person, thing or verb.
WHO = (
    (
        "",
        "there",
        "from the {place}",
        "from the {adj4} {place}",
        "from the very {adj4} {place}",
        "from the {place} of the {place2}",
        "from the {adj4} {place} of the {place2}",
        "from the {adj4} and {adj5} {place} of the {place2}",
    ),
    (
        "",
        "there",
        "by the {place}",
        "behind that {adj4} {place}",
        "by the {adj4} , {adj5} {place}",
        "behind the {place} by that {place2}",
        "by the {adj4} {place} behind the {place2}",
        "behind that rather {adj4} {place} by the {place2}",
    ),
)
# What a person did, without a noun.
CLAUSE = (
    (
        "",
        "who {slept4}",
        "who {slept4} {adv}",
        "who {slept4} very {adv}",
        "who {slept4} {adv} and {adv2}",
        "who {slept4} very {adv} and {adv2}",
        ", who {slept4} {adv} and very {adv2} ,",
        "who then {slept4} {adv} and very {adv2} indeed",
    ),
    (
        "",
        "that {slept4}",
        "that {slept4} so {adv}",
        "that {slept4} , though {adv} ,",
        "that {slept4} {adv} or {adv2}",
        "that {slept4} not so {adv} but {adv2}",
        ", that {slept4} as {adv} as ever ,",
        ", that later {slept4} not {adv} but rather {adv2} ,",
    ),
)
# What may stand between a determiner and its noun.
ADJECTIVES = (
    (
        "",
        "{adj}",
        "very {adj}",
        "{adj} , {adj2}",
        "{adj} , very {adj2}",
        "very {adj} , very {adj2}",
        "{adj} , {adj2} and very {adj3}",
        "very {adj} , {adj2} and also {adj3}",
    ),
    (
        "",
        "{adj}",
        "rather {adj}",
        "{adj} but {adj2}",
        "{adj} but rather {adj2}",
        "not {adj} but rather {adj2}",
        "{adj} but not rather {adj2}",
        "{adj} , though not {adj2} , but {adj3}",
    ),
)
# What may stand between an adjective and its noun: how it was made, and a noun that says what it is for, as in "the
# heavy letter basket", "the heavy and slowly made letter basket".
COMPOUND = (
    ("", "{thing3}", "{thing3} and {thing4}", "and {adv} made {thing3}", "and very {adv} made {thing3}"),
    ("", "{thing3}", "{thing3} or {thing4}", "but {adv} built {thing3}", "but not so {adv} built {thing3}"),
)
