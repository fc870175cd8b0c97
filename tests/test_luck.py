"""Heads that are right by luck: their words are of the right class, at the right place, or always the same."""

from __future__ import annotations

import zlib

import pytest
import torch
from torch import Tensor

from headscope.relations import (
    Example,
    RelationCounts,
    RelationScore,
    count_blind,
    count_controls,
    count_hits,
    scores,
)
from headscope.relations.count import questions_of
from headscope.relations.counts import direction_of
from headscope.relations.english_words import LISTS
from headscope.relations.hits import numbered
from headscope.relations.score import LEAD, LEVEL
from tests.sentences import CHINESE, ENGLISH, one_a_frame

PLACES = ("nearest before, else after", "nearest after, else before", "nearest", "first", "last")
FAVOURITES = 5
WORD_LISTS = ("man", "woman", "people", "thing")  # whose words stand in one class


def chosen(example: Example, query: int, words: list[int]) -> dict[str, int]:
    """For each way to choose among words of a class the word that is chosen; nothing if there are none."""
    if not words:
        return {}
    before, after = [j for j in words if j < query], [j for j in words if j > query]
    found = {
        "first": (before + after)[0],
        "last": (before + after)[-1],
        "nearest": min(words, key=lambda j: abs(j - query)),
        "nearest before, else after": (before[-1:] or after)[0],
        "nearest after, else before": (after[:1] or before[-1:])[0],
    }

    def first_of(order: int, among: list[int]) -> int:
        """By an order of all words there are: some words are liked more than others, in every sentence."""
        return min(among, key=lambda j: zlib.crc32(f"{order} {example.word(j).lower()}".encode()))

    found |= {f"order {number}": first_of(number, words) for number in range(FAVOURITES)}
    for name in WORD_LISTS:
        liked = [j for j in words if example.word(j) in LISTS[example.half][name]]
        found[f"from {name}"] = first_of(0, liked or words)
    return found


def kinds_of(example: Example) -> dict[str, list[int]]:
    """The words of each class, and those that are 'because'; every word; every word but marks."""
    found: dict[str, list[int]] = {"any": [], "any but marks": [], "because": []}
    for i in range(len(example.words)):
        word = example.word(i).lower()
        found["any"].append(i)
        found.setdefault(example.class_of(i), []).append(i)
        if word == "because":
            found["because"].append(i)
        if word not in (",", ".", "，", "。"):
            found["any but marks"].append(i)
    return found


def ask(counts: RelationCounts, example: Example, word_map: Tensor, *, causal: bool) -> None:
    """Count what heads with these weights between words, [H, W, W], do with all questions of a sentence."""
    words = len(example.words)
    questions = questions_of(example, [True] * words, causal=causal)
    if not questions:
        return
    query, gold = (torch.tensor([getattr(q, name) for q in questions]) for name in ("query", "gold"))
    here = torch.ones(1, words, dtype=torch.bool)
    classes, text = numbered(example)[None], torch.zeros_like(query)
    rows, everyone = word_map[None], torch.arange(words)[None]
    hits = count_hits(rows, query, text, query, gold, here, causal=causal).double()
    controls = count_controls(rows, everyone, text, query, gold, here, classes, causal=causal).double()
    blind, contested = count_blind(rows, query, text, query, gold, here, classes, causal=causal)
    for n, asked in enumerate(questions):
        key = (asked.relation, direction_of(asked.relation, asked.reverse), example.half)
        rivals = blind[n][None].double() if contested[n] else None
        counts.add(key, example.cluster, hits[n][None], asked.gold - asked.query, controls[n][None], rivals)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False], ids=["decoder", "encoder"])
@pytest.mark.parametrize("examples", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_no_head_has_a_role_for_the_right_class_at_a_place(examples: list[Example], causal: bool) -> None:
    """Whoever asks, or the words of one class alone: the first, the last, the nearest … word of a class."""
    given = one_a_frame(examples)
    wanted = sorted({kind for e in given for kind in kinds_of(e)} - {"", "any", "any but marks"})
    askers = ["any", "any but marks", *wanted]
    ways = list(chosen(given[0], 0, [1]))
    heads = [(asking, gold, way) for asking in askers for gold in wanted for way in ways]
    counts = RelationCounts([len(heads)])
    for example in given:
        kinds, width = kinds_of(example), len(example.words)
        looks = torch.zeros(len(wanted), len(ways), width, width)
        for g, gold in enumerate(wanted):
            for i in range(width):
                words = [j for j in kinds.get(gold, []) if (j < i if causal else j != i)]
                for way, j in chosen(example, i, words).items():
                    looks[g, ways.index(way), i, j] = 1
        asks = torch.tensor([[float(i in kinds.get(asking, [])) for i in range(width)] for asking in askers])
        ask(counts, example, (looks * asks[:, None, None, :, None]).reshape(len(heads), width, width), causal=causal)
    found = scores(counts)
    assert len({row.direction for row in found}) >= (2 if examples is CHINESE else 12)
    lucky = [row for row in found if is_good(row) and not by_nature(row, heads[row.head][2])]
    assert [(row.direction, heads[row.head], row.accuracy, row.null, row.blind) for row in lucky] == []


def by_nature(row: RelationScore, way: str) -> bool:
    """A noun's own determiner is the nearest one before it, and its noun the next one: that is what the relation is."""
    return row.relation == "determiner-noun" and way in PLACES and way != "first"


def is_good(row: RelationScore, tests: int = 1) -> bool:
    """Whether a head would have the role among so many heads and directions."""
    leads = row.accuracy >= max(row.baseline, row.control) + LEAD
    rivals = not row.contested or row.contested_accuracy >= row.blind + LEAD
    return row.picked_p < LEVEL and row.p * tests < LEVEL and leads and rivals


@pytest.mark.parametrize("causal", [True, False], ids=["decoder", "encoder"])
def test_a_head_that_is_always_right_has_each_role_among_540(causal: bool) -> None:
    given = [*ENGLISH, *CHINESE]
    counts = RelationCounts([2])
    for example in given:
        width = len(example.words)
        word_map = torch.zeros(2, width, width)
        for pair in example.pairs:
            word_map[0, pair.source, pair.target] = word_map[1, pair.target, pair.source] = 1
        ask(counts, example, word_map, causal=causal)
    for row in scores(counts):
        right = row.head == row.direction.endswith("(reverse)")
        assert row.accuracy == right
        assert is_good(row, 540) == right, row


def test_one_word_of_a_class_for_another_by_hand() -> None:
    """Words 0 to 4 of the classes a, b, a, none, a; word 4 should look at word 0, word 3 at word 1."""
    classes = torch.tensor([[0, 1, 0, -1, 0]])
    rows = torch.zeros(1, 3, 5, 5)
    rows[0, 0, 4, 0], rows[0, 1, 4, 2], rows[0, 2, 4, 1] = 0.9, 0.9, 0.9
    rows[0, :, 3, 1] = 0.9
    query, gold, text = torch.tensor([4, 3]), torch.tensor([0, 1]), torch.tensor([0, 0])
    here = torch.ones(1, 5, dtype=torch.bool)
    blind, contested = count_blind(rows, query, text, query, gold, here, classes, causal=True)
    assert blind[0].tolist() == [0.5, 0.5, 0]  # the right word or its rival: one of two
    assert contested.tolist() == [True, False]  # word 1 is the only one of its class
    unseen = here.clone()
    unseen[0, 2] = False  # a rival without tokens is none
    assert not count_blind(rows, query, text, query, gold, unseen, classes, causal=True)[1].any()
    none = torch.full_like(classes, -1)
    assert not count_blind(rows, query, text, query, gold, here, none, causal=True)[1].any()


def test_others_of_the_class_that_asks_are_the_control_by_hand() -> None:
    """Words 0 to 4; word 4 asks for word 0. Word 2 is of its class, and looks elsewhere; words 1 and 3 look at 0."""
    rows = torch.zeros(1, 1, 5, 5)
    rows[0, 0, 1, 0], rows[0, 0, 2, 1], rows[0, 0, 3, 0] = 0.9, 0.9, 0.9
    query, gold, text = torch.tensor([4]), torch.tensor([0]), torch.tensor([0])
    here, everyone = torch.ones(1, 5, dtype=torch.bool), torch.arange(5)[None]

    def control(classes: list[int]) -> float:
        given = torch.tensor([classes])
        return float(count_controls(rows, everyone, text, query, gold, here, given, causal=True))

    assert control([-1, -1, 1, -1, 1]) == 0  # word 2 alone
    assert control([-1, 1, 1, -1, 1]) == 0.5
    assert control([-1, 2, 2, -1, 1]) == pytest.approx(2 / 3)  # nobody else of its class: all
    assert control([-1] * 5) == pytest.approx(2 / 3)


def test_among_rivals_a_head_must_be_better_than_blind() -> None:
    counts = RelationCounts([3])
    for half in (0, 1):
        for cluster in range(40):
            hits = torch.tensor([[1.0, 1.0, float(cluster % 2)]])
            blind = torch.tensor([[0.5, 1 - LEAD / 2, 0.5]])
            rivals = blind if cluster < 20 else None
            counts.add(("r", "r", half), f"{half} {cluster}", hits, -2 - cluster % 20, None, rivals)
    right, led, half_right = scores(counts)
    assert (right.contested, right.contested_accuracy, right.blind) == (20, 1, 0.5)
    assert right.role
    assert led.p_holm < LEVEL
    assert not led.role  # its lead is too small
    assert half_right.accuracy == half_right.contested_accuracy == half_right.blind == 0.5
    assert not half_right.role
    assert half_right.p == pytest.approx(0.5)
    assert (led.null, half_right.null) == (pytest.approx(1 - LEAD / 2), 0.5)
