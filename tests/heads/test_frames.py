"""Constructed sentences: frames, word lists, distractors, and what varies between sentences."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from itertools import pairwise

import pytest

from headscope.heads.relations import Example, constructed_relations
from headscope.heads.relations.sentences.frames import combine, fill, place
from headscope.heads.relations.sentences.languages import load_language
from tests.sentences import CHINESE, ENGLISH, FRAMES, sentences_of

RELATIONS = sorted(constructed_relations())


def test_fill_takes_words_of_the_list_and_none_twice() -> None:
    lists = {"cat": ["cat", "dog"], "sat": ["sat"]}
    for seed in range(5):
        text, spans, _, source, target = fill("{cat} , {cat2}/t and I {sat}/s .", lists, random.Random(seed))
        assert text in ("Cat, dog and I sat.", "Dog, cat and I sat.")
        assert [text[a:b] for a, b in spans][source] == "sat"
        assert text[slice(*spans[target])] == text[5:8]
    assert fill("我/t {p}/s 。", {"p": ["她"]}, random.Random(0), spaced=False)[:2] == (
        "我她。",
        [(0, 1), (1, 2), (2, 3)],
    )


def test_combine_gives_each_skeleton_some_insertions() -> None:
    skeletons = ["a * b", "* c", "d * , e", "f * ."]
    frames = combine("r", skeletons, ["", "x", ", y ,"], most=3)
    assert [f.template for f in frames[:6]] == ["a b", "a x b", "a , y , b", "c", "x c", ", y , c"]
    assert [f.template for f in frames[6:]] == ["d , e", "d x , e", "d , y , e", "f .", "f x .", "f , y ."]
    assert [f.skeleton for f in frames] == [s for s in skeletons for _ in range(3)]
    some = combine("r", [f"{n} *" for n in range(40)], [str(n) for n in range(8)])
    assert len(some) == 80
    assert len({f.template.split()[1] for f in some}) == 8


def test_place_puts_a_distractor_at_each_mark_of_a_core() -> None:
    assert place(["^ a + b = .", "^ c = ."], (["x", "y"], ["z"], [])) == [
        "x a b .",
        "y a b .",
        "a z b .",
        "x c .",
        "y c .",
    ]


@pytest.mark.parametrize("relation", ["giver-receiver", "before-after", "subject-verb", "object-verb"])
def test_distractors_stand_before_between_and_behind_equally_often(relation: str) -> None:
    """Another word of the target's class and list, in a third of the sentences before, between and behind."""
    for half in (0, 1):
        positions: Counter[int] = Counter()
        for e in sentences_of(relation, half):
            pair = e.pairs[0]
            first, last = sorted((pair.source, pair.target))
            kind = e.classes[pair.target]
            distractors = [i for i in range(len(e.words)) if e.classes[i] == kind and i not in (first, last)]
            if relation == "giver-receiver":
                assert len(distractors) == 1
            positions.update((i > first) + (i > last) for i in distractors[:1])
        assert max(positions.values()) - min(positions.values()) <= sum(positions.values()) / 10


@pytest.mark.parametrize("relation", RELATIONS)
def test_each_half_has_enough_frames_and_fillings(relation: str) -> None:
    for half in (0, 1):
        frames = Counter(e.cluster for e in sentences_of(relation, half))
        assert len(frames) >= 20
        assert min(frames.values()) >= 4
        assert len({e.text for e in sentences_of(relation, half)}) == sum(frames.values())


def test_a_core_with_its_distractor_is_one_cluster() -> None:
    sizes = {
        "coreference": 24,
        "determiner-noun": 32,
        "adjective-noun": 60,
        "coreference-zh": 24,
        "giver-receiver-zh": 54,
    }
    for relation in RELATIONS:
        for half in (0, 1):
            clusters = Counter(e.cluster for e in sentences_of(relation, half))
            assert len(clusters) == sizes.get(relation, 72)
            assert set(clusters.values()) == {4}  # two insertions, filled twice


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("order", ["any", "source behind", "target behind"])
def test_no_fixed_offset_finds_the_pair(relation: str, half: int, order: str) -> None:
    offsets = [e.pairs[0].target - e.pairs[0].source for e in sentences_of(relation, half)]
    in_order = [d for d in offsets if order == "any" or (d < 0) == (order == "source behind")]
    counted = Counter(in_order)
    if in_order:
        assert max(counted.values()) / len(in_order) <= 0.5
        assert len(counted) >= 5
    else:
        assert relation in ("coreference", "coreference-zh", "determiner-noun")  # these have one order


@pytest.mark.parametrize(("language", "examples"), [("english", ENGLISH), ("chinese", CHINESE)])
def test_the_halves_share_no_frame_and_no_content_word(language: str, examples: list[Example]) -> None:
    function = load_language(language).function_words
    halves: list[set[str]] = [set(), set()]
    shapes: list[set[tuple[str, ...]]] = [set(), set()]
    for e in examples:
        words = [e.word(i).casefold() for i in range(len(e.words))]
        halves[e.half] |= {word for word in words if word.isalpha()} - function
        shapes[e.half].add((e.pairs[0].relation, *(w if w in function or not w.isalpha() else "_" for w in words)))
    assert min(map(len, halves)) > 20
    assert not halves[0] & halves[1]
    assert not shapes[0] & shapes[1]  # what remains of a sentence without its content words
    assert not {e.cluster for e in examples if e.half == 0} & {e.cluster for e in examples if e.half == 1}


def test_words_stand_where_their_spans_say() -> None:
    for e in FRAMES:
        assert "".join(e.word(i) for i in range(len(e.words))) == e.text.replace(" ", "")
        assert all(a < b for a, b in e.words)
        assert all(first[1] <= second[0] for first, second in zip(e.words, e.words[1:], strict=False))


def test_a_pronoun_stands_behind_the_only_noun_that_fits_it() -> None:
    words = load_language("english").words
    men, women, things = ({word for lists in words for word in lists[slot]} for slot in ("man", "woman", "thing"))
    anyone = men | women | things
    for e in sentences_of("coreference", 0) + sentences_of("coreference", 1):
        pair = e.pairs[0]
        before = [e.word(i) for i in range(pair.source)]
        fits = {"he": men, "she": women}.get(e.word(pair.source))
        if fits is not None:
            assert [word for word in before if word in fits] == [e.word(pair.target)]
            assert [word for word in before if word in anyone - fits]  # and another that does not
    kinds = Counter(e.word(e.pairs[0].source) for e in sentences_of("coreference", 1))
    assert set(kinds) == {"he", "she", "it"}


def test_sources_and_targets_have_a_class() -> None:
    for e in FRAMES:
        for i in (e.pairs[0].source, e.pairs[0].target):
            assert e.classes[i] or e.word(i).lower() == "because"
    of_words = {"lamp": "thing", "moved": "verb", "baker": "person", "small": "adjective", "the": "determiner"}
    for word, kind in of_words.items():
        classes = {
            e.classes[i]
            for e in sentences_of("adjective-noun", 0) + sentences_of("cause", 0)
            for i in range(len(e.words))
            if e.word(i) == word
        }
        assert classes == {kind}, word


def test_english_sentences_are_english() -> None:
    for e in ENGLISH:
        words = [e.word(i).lower() for i in range(len(e.words))]
        for word, after in pairwise(words):
            assert word != "a" or after[0] not in "aeiou", e.text
        kinds = [e.classes[i] for i in range(len(e.words))]
        assert ("thing",) * 3 not in set(zip(kinds, kinds[1:], kinds[2:], strict=False)), e.text  # no piles of nouns


def test_marked_words_are_those_of_the_relation() -> None:
    for half in (0, 1):
        assert {e.word(e.pairs[0].target).lower() for e in sentences_of("cause", half)} == {"because"}
        assert {e.word(e.pairs[0].source) for e in sentences_of("coreference-zh", half)} == {"他", "她", "它"}
    for e in sentences_of("determiner-noun", 0):
        assert e.word(e.pairs[0].source).lower() in {"the", "this", "every", "some"}
    for half, giver in ((0, "我"), (1, "你")):
        assert giver in {e.word(e.pairs[0].target) for e in sentences_of("giver-receiver-zh", half)}


def test_sentences_are_those_of_the_shipped_atlases() -> None:
    """The same ones each time. If a word or a frame is added on purpose, profile the shipped atlases again."""
    digests = [hashlib.sha256(repr(examples).encode()).hexdigest()[:16] for examples in (ENGLISH, CHINESE)]
    assert digests == ["91739d9cb39682b9", "8e3aa2e82f71e5b6"]


def test_a_list_can_take_the_words_of_other_lists() -> None:
    for words in load_language("english").words:
        assert words["acted"] == words["moved"] + words["slept"]
