"""Heads that are right by luck: their words are of the right class, at the right place, or always the same."""

from __future__ import annotations

import zlib
from functools import cache

import pytest
import torch
from torch import Tensor

from headscope.heads.relations import (
    Example,
    RelationCounts,
    RelationScore,
    count_class_baseline,
    count_controls,
    count_hits,
    scores,
    strongest_words,
)
from headscope.heads.relations.counts import direction_of
from headscope.heads.relations.evaluate import directed_pairs
from headscope.heads.relations.hits import class_ids
from headscope.heads.relations.score import LEAD, LEVEL
from headscope.heads.relations.sentences.languages import load_language
from tests.sentences import CHINESE, ENGLISH, one_a_frame

FAVOURITES = 3
PREPOSITIONS = {
    "near",
    "with",
    "by",
    "behind",
    "like",
    "in",
    "from",
    "of",
    "to",
    "as",
    "在",
    "从",
    "由",
    "给",
    "像",
    "如",
}
ELSE = ("nearest before, else after", "nearest after, else before")
RELATIVES = {"who", "that", "which", "whom"}
ENGLISH_LISTS = load_language("english").words
WORD_LISTS = ("man", "woman", "thing")  # whose words stand in one class


def placed(query: int, words: list[int]) -> dict[str, int]:
    """The word that stands at each place, seen from the query."""
    before, after = [j for j in words if j < query], [j for j in words if j > query]
    ways = {
        "first": words[:1],
        "second": words[1:2],
        "last but one": words[-2:-1],
        "last": words[-1:],
        "nearest": sorted(words, key=lambda j: abs(j - query))[:1],
        "nearest before": before[-1:],
        "nearest after": after[:1],
        "nearest before, else after": before[-1:] or after[:1],
        "nearest after, else before": after[:1] or before[-1:],
    }
    return {way: chosen[0] for way, chosen in ways.items() if chosen}


@cache
def said(example: Example) -> tuple[str, ...]:
    """Its words in small letters."""
    return tuple(example.word(i).lower() for i in range(len(example.words)))


@cache
def in_phrase(example: Example) -> tuple[bool, ...]:
    """Which words stand behind a preposition, or its determiner and adjectives."""
    return tuple(j not in outside(example, [j]) for j in range(len(example.words)))


def outside(example: Example, words: list[int]) -> list[int]:
    """Those that are not behind a preposition, or its determiner and adjectives."""
    kept = []
    for j in words:
        i = j - 1
        while i >= 0 and example.class_of(i) in ("determiner", "adjective"):
            i -= 1
        if i < 0 or said(example)[i] not in PREPOSITIONS:
            kept.append(j)
    return kept


@cache
def place_of(order: int, word: str) -> int:
    """Where a word stands in an order of all words there are."""
    return zlib.crc32(f"{order} {word}".encode())


def chosen(example: Example, query: int, words: list[int]) -> dict[str, int]:
    """For each way to choose among words of a class the word that is chosen; nothing if there are none."""
    if not words:
        return {}
    found, spoken, inside = placed(query, words), said(example), in_phrase(example)
    main = [j for j in words if j == 0 or spoken[j - 1] not in RELATIVES]
    for which, kept in (("outside phrases", [j for j in words if not inside[j]]), ("not after who", main)):
        there = placed(query, kept)
        found |= {f"{way} {which}": there[way] for way in ("first", *ELSE) if way in there}
    second = spoken[0] in PREPOSITIONS and len(words) > 1
    found["by the first word"] = words[second]

    def first_of(order: int, among: list[int]) -> int:
        """By an order of all words there are: some words are liked more than others, in every sentence."""
        return min(among, key=lambda j: place_of(order, spoken[j]))

    found |= {f"order {number}": first_of(number, words) for number in range(FAVOURITES)}
    for name in WORD_LISTS:
        liked = [j for j in words if spoken[j] in ENGLISH_LISTS[example.half][name]]
        found[f"from {name}"] = first_of(0, liked or words)
    return found


def kinds_of(example: Example) -> dict[str, list[int]]:
    """The words of each class, and those that are 'because'; every word."""
    found: dict[str, list[int]] = {"any": list(range(len(example.words))), "because": []}
    for i in found["any"]:
        found.setdefault(example.class_of(i), []).append(i)
        if example.word(i).lower() == "because":
            found["because"].append(i)
    return found


def ask(counts: RelationCounts, example: Example, word_map: Tensor, askers: Tensor, *, causal: bool) -> None:
    """Count what heads with these weights between words, [H, W, W], do with all questions of a sentence.

    Each is A heads, [A, W] bool: one that looks so from some words, and from others at all words alike.
    """
    words = len(example.words)
    questions = directed_pairs(example, [True] * words, causal=causal)
    if not questions:
        return
    query, gold = (torch.tensor([getattr(q, name) for q in questions]) for name in ("query", "gold"))
    here = torch.ones(1, words, dtype=torch.bool)
    classes, text = class_ids(example)[None], torch.zeros_like(query)
    rows, everyone = word_map[None], torch.arange(words)[None]
    by_asker = askers[:, query].T[:, :, None]  # [N, A, 1]
    hits = (count_hits(rows, query, text, query, gold, here, causal=causal)[:, None] & by_asker).flatten(1).double()
    look = strongest_words(rows, everyone, here, causal=causal)[:, None]  # [1, 1, H, W]
    looks = look.where(askers[:, None] | (look == -2), -1).flatten(1, 2)
    controls = count_controls(looks, everyone, text, query, gold, classes, causal=causal).double()
    blind, contested = count_class_baseline(rows, query, text, query, gold, here, classes, causal=causal)
    blind = (blind[:, None] * by_asker).flatten(1)
    for n, asked in enumerate(questions):
        key = (asked.relation, direction_of(asked.relation, asked.reverse), example.half)
        rivals = blind[n][None].double() if contested[n] else None
        counts.add(key, example.cluster, hits[n][None], asked.gold - asked.query, controls[n][None], rivals)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False], ids=["decoder", "encoder"])
@pytest.mark.parametrize("examples", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_no_head_has_a_role_for_the_right_class_at_a_place(examples: list[Example], causal: bool) -> None:
    """Whoever asks, or the words of one class alone: the first, the last, the nearest … word of a class; the one that
    comes first in an order of all words, or is of one list; those in main clauses alone, or in no phrase; and the
    first or the second, as the sentence's first word has it. Judged as if ten heads had been picked.
    """
    given = one_a_frame(examples)
    wanted = sorted({kind for e in given for kind in kinds_of(e)} - {"", "any"})
    askers = ["any", *wanted]
    ways = sorted({way for e in given for way in chosen(e, 2, [0, 1, *range(3, len(e.words))])})
    number = {way: n for n, way in enumerate(ways)}
    heads = [(asking, gold, way) for asking in askers for gold in wanted for way in ways]
    counts = RelationCounts([len(heads)])
    for example in given:
        kinds, width = kinds_of(example), len(example.words)
        looks = torch.zeros(len(wanted), len(ways), width, width)
        cells = [
            (g, number[way], i, j)
            for g, gold in enumerate(wanted)
            for i in range(width)
            for way, j in chosen(example, i, [j for j in kinds.get(gold, []) if (j < i if causal else j != i)]).items()
        ]
        looks[*torch.tensor(cells).unbind(-1)] = 1
        asks = torch.tensor([[i in kinds.get(asking, []) for i in range(width)] for asking in askers])
        ask(counts, example, looks.flatten(0, 1), asks, causal=causal)
    found = scores(counts)
    assert len({row.direction for row in found}) >= (2 if examples is CHINESE else 12)
    lucky = [row for row in found if is_good(row, 10) and not by_nature(row, heads[row.head][2])]
    assert [(row.direction, heads[row.head], row.accuracy, row.null, row.class_baseline) for row in lucky] == []


def by_nature(row: RelationScore, way: str) -> bool:
    """Whether this is what the relation is, or grammar enough to be right in three quarters of an encoder's pairs.

    A noun's own determiner, and its own adjective before it, is the nearest one. The first or nearest main verb, or
    noun in no phrase, is nearly the grammar itself.
    """
    if row.relation == "determiner-noun" or row.direction == "adjective-noun (reverse)":
        return way.startswith(("nearest", "last", "second"))
    return row.accuracy <= 0.75 and way.endswith(("not after who", "outside phrases"))


def is_good(row: RelationScore, tests: int = 1) -> bool:
    """Whether a head would have the role among so many heads and directions."""
    leads = row.accuracy >= max(row.baseline, row.control) + LEAD
    rivals = not row.contested or row.contested_accuracy >= row.class_baseline + LEAD
    return row.picked_p < LEVEL and row.p * tests < LEVEL and leads and rivals


@pytest.mark.parametrize("causal", [True, False], ids=["decoder", "encoder"])
def test_a_head_that_is_always_right_has_each_role_among_50(causal: bool) -> None:
    given = [*ENGLISH, *CHINESE]
    counts = RelationCounts([2])
    for example in given:
        width = len(example.words)
        word_map = torch.zeros(2, width, width)
        for pair in example.pairs:
            word_map[0, pair.source, pair.target] = word_map[1, pair.target, pair.source] = 1
        ask(counts, example, word_map, torch.ones(1, width, dtype=torch.bool), causal=causal)
    for row in scores(counts):
        right = row.head == row.direction.endswith("(reverse)")
        assert row.accuracy == right
        assert is_good(row, 50) == right, row


@pytest.mark.parametrize("causal", [True, False], ids=["decoder", "encoder"])
def test_heads_that_ask_from_some_words_alone_are_counted_as_if_written_out(causal: bool) -> None:
    """The short cut of `ask` against the map in which the other words' rows are zero."""
    for example in one_a_frame(ENGLISH)[::40]:
        width = len(example.words)
        random = torch.Generator().manual_seed(width)
        word_map = torch.rand(5, width, width, generator=random)
        askers = torch.rand(3, width, generator=random) < 0.7
        short, written = RelationCounts([15]), RelationCounts([15])
        ask(short, example, word_map, askers, causal=causal)
        every = torch.ones(1, width, dtype=torch.bool)
        ask(written, example, (word_map * askers[:, None, :, None]).flatten(0, 1), every, causal=causal)
        for key in written.keys:
            for name in ("hits", "controls", "contested_hits", "class_baseline"):
                both = (getattr(counts.tally(*key), name) for counts in (short, written))
                torch.testing.assert_close(*both, msg=lambda told, name=name: f"{name}: {told}")


def test_one_word_of_a_class_for_another_by_hand() -> None:
    """Words 0 to 4 of the classes a, b, a, none, a; word 4 should look at word 0, word 3 at word 1."""
    classes = torch.tensor([[0, 1, 0, -1, 0]])
    rows = torch.zeros(1, 3, 5, 5)
    rows[0, 0, 4, 0], rows[0, 1, 4, 2], rows[0, 2, 4, 1] = 0.9, 0.9, 0.9
    rows[0, :, 3, 1] = 0.9
    query, gold, text = torch.tensor([4, 3]), torch.tensor([0, 1]), torch.tensor([0, 0])
    here = torch.ones(1, 5, dtype=torch.bool)
    blind, contested = count_class_baseline(rows, query, text, query, gold, here, classes, causal=True)
    assert blind[0].tolist() == [0.5, 0.5, 0]  # the right word or its rival: one of two
    assert contested.tolist() == [True, False]  # word 1 is the only one of its class
    unseen = here.clone()
    unseen[0, 2] = False  # a rival without tokens is none
    assert not count_class_baseline(rows, query, text, query, gold, unseen, classes, causal=True)[1].any()
    none = torch.full_like(classes, -1)
    assert not count_class_baseline(rows, query, text, query, gold, here, none, causal=True)[1].any()


def test_others_of_the_class_that_asks_are_the_control_by_hand() -> None:
    """Words 0 to 5; word 5 asks for word 0, as words 2 and 4 do; word 3 looks elsewhere, and word 1 has no choice."""
    rows = torch.zeros(1, 1, 6, 6)
    rows[0, 0, 1, 0], rows[0, 0, 2, 0], rows[0, 0, 3, 1], rows[0, 0, 4, 0] = 0.9, 0.9, 0.9, 0.9
    query, gold, text = torch.tensor([5]), torch.tensor([0]), torch.tensor([0])
    here, everyone = torch.ones(1, 6, dtype=torch.bool), torch.arange(6)[None]
    looks = strongest_words(rows, everyone, here, causal=True)
    assert looks.tolist() == [[[-2, -2, 0, 1, 0, -1]]]  # word 5 looks at all alike

    def control(classes: list[int]) -> float:
        return float(count_controls(looks, everyone, text, query, gold, torch.tensor([classes]), causal=True))

    assert control([-1, -1, -1, 1, -1, 1]) == 0  # word 3 alone
    assert control([-1, -1, 1, 1, -1, 1]) == 0.5
    assert control([-1, 1, -1, 1, -1, 1]) == 0
    assert control([-1, 2, 2, -1, -1, 1]) == pytest.approx(2 / 3)  # nobody else of its class: all
    assert control([-1] * 6) == pytest.approx(2 / 3)


def test_words_that_cannot_see_the_right_word_are_no_control() -> None:
    """Word 5 of a decoder asks for word 3, and so does word 4; word 2 is of its class, and stands before word 3."""
    rows = torch.zeros(1, 1, 6, 6)
    rows[0, 0, 4, 3], rows[0, 0, 2, 1] = 0.9, 0.9
    query, gold, text = torch.tensor([5]), torch.tensor([3]), torch.tensor([0])
    here, everyone = torch.ones(1, 6, dtype=torch.bool), torch.arange(6)[None]
    looks = strongest_words(rows, everyone, here, causal=True)
    classes = torch.tensor([[-1, -1, 1, -1, -1, 1]])
    assert float(count_controls(looks, everyone, text, query, gold, classes, causal=True)) == 1


def test_a_head_that_looks_back_alone_is_compared_with_what_looks_back() -> None:
    """Word 0 to 4 in an encoder; all words before word 3 look at it, and those behind it do not."""
    rows = torch.zeros(1, 1, 5, 5)
    rows[0, 0, :3, 3], rows[0, 0, 4, 0] = 0.9, 0.9
    query, gold, text = torch.tensor([0]), torch.tensor([3]), torch.tensor([0])
    here, everyone = torch.ones(1, 5, dtype=torch.bool), torch.arange(5)[None]
    looks = strongest_words(rows, everyone, here, causal=False)
    assert float(count_controls(looks, everyone, text, query, gold, torch.full((1, 5), -1), causal=False)) == 1


def test_among_rivals_a_head_must_be_better_than_blind() -> None:
    counts = RelationCounts([3])
    for half in (0, 1):
        for cluster in range(40):
            hits = torch.tensor([[1.0, 1.0, float(cluster % 2)]])
            blind = torch.tensor([[0.5, 1 - LEAD / 2, 0.5]])
            rivals = blind if cluster < 20 else None
            counts.add(("r", "r", half), f"{half} {cluster}", hits, -2 - cluster % 20, None, rivals)
    right, led, half_right = scores(counts)
    assert (right.contested, right.contested_accuracy, right.class_baseline) == (20, 1, 0.5)
    assert right.role
    assert led.p_holm < LEVEL
    assert not led.role  # its lead is too small
    assert half_right.accuracy == half_right.contested_accuracy == half_right.class_baseline == 0.5
    assert not half_right.role
    assert half_right.p == 1
    assert led.null == pytest.approx(1 - LEAD / 4)  # in half of the pairs it has no rival
    assert half_right.null == half_right.class_null == 0.5
