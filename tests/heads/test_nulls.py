"""The nulls of relation roles: heads that attend to the right class, position or word whatever the pair get no role."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import cache, partial

import pytest
import torch
from torch import Tensor

from headscope.heads.relations import Example, RelationCounts, RelationScore, score, scores
from headscope.heads.relations.counts import direction_of
from headscope.heads.relations.evaluate import directed_pairs
from headscope.heads.relations.hits import (
    class_ids,
    count_class_baseline,
    count_controls,
    pair_weights,
    strongest_words,
)
from headscope.heads.relations.score import LEAD, LEVEL
from headscope.heads.relations.sentences.languages import load_language
from headscope.heads.statistics import cluster_bootstrap
from tests.sentences import CHINESE, ENGLISH, one_per_frame

PREPOSITIONS = {"near", "with", "by", "behind", "like", "in", "from", "of", "to", "as", *"在从由给像如"}
RELATIVES = {"who", "that", "which", "whom"}
ENGLISH_LISTS = load_language("english").words
SENTENCES_AT_ONCE = 32


def padded(rows: Sequence[Sequence[int]], value: int = -1) -> Tensor:
    """Rows of unlike length as one tensor."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


@cache
def lower_words(example: Example) -> list[str]:
    return [example.text[start:end].lower() for start, end in example.words]


def in_phrase(example: Example) -> list[bool]:
    """Which words stand behind a preposition, or its determiner and adjectives."""
    words, inside = lower_words(example), []
    for j in range(len(words)):
        i = j - 1
        while i >= 0 and example.classes[i] in ("determiner", "adjective"):
            i -= 1
        inside.append(i >= 0 and words[i] in PREPOSITIONS)
    return inside


def best(among: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The word with the smallest key among some, [..., K] bool to [...], and whether there is one."""
    return key.masked_fill(~among, 1 << 60).argmin(-1), among.any(-1)


def at_positions(among: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The words at each position, seen from the query: among [..., Q, K]."""
    keys = torch.arange(among.shape[-1])
    queries = keys[:, None]
    (first, any_word), (last, _) = best(among, keys), best(among, -keys)
    before, has_before = best(among & (keys < queries), -keys)
    after, has_after = best(among & (keys > queries), keys)
    return {
        "first": (first, any_word),
        "second": best(among & (keys != first[..., None]), keys),
        "last but one": best(among & (keys != last[..., None]), -keys),
        "last": (last, any_word),
        "nearest": best(among, (keys - queries).abs()),  # of equals the first
        "nearest before": (before, has_before),
        "nearest after": (after, has_after),
        "nearest before, else after": (torch.where(has_before, before, after), any_word),
        "nearest after, else before": (torch.where(has_after, after, before), any_word),
    }


def strategies(examples: Sequence[Example], among: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """For each way to choose among words [B, G, Q, K]: the chosen word, and whether there is one, [B, G, Q]."""
    words = [lower_words(e) for e in examples]

    def per_key(value: Callable[[Example, list[str], int], int]) -> Tensor:
        rows = [[value(e, w, j) for j in range(len(w))] for e, w in zip(examples, words, strict=True)]
        return padded(rows)[:, None, None]

    ways = at_positions(among)
    outside = padded([[not inside for inside in in_phrase(e)] for e in examples], 0)[:, None, None].bool()
    main = per_key(lambda e, w, j: j == 0 or w[j - 1] not in RELATIVES) == 1
    for name, some in (("outside phrases", among & outside), ("not after who", among & main)):
        positions = at_positions(some)
        for way in ("first", "nearest before, else after", "nearest after, else before"):
            ways[f"{way} {name}"] = positions[way]
    (first, any_word), (second, has_second) = ways["first"], ways["second"]
    preposition = torch.tensor([w[0] in PREPOSITIONS for w in words])[:, None, None]
    ways["by the first word"] = torch.where(preposition & has_second, second, first), any_word
    orders = [per_key(lambda _, w, j, n=n: zlib.crc32(f"{n} {w[j]}".encode())) for n in range(3)]  # of all words
    ways |= {f"order {number}": best(among, order) for number, order in enumerate(orders)}
    for name in ("man", "woman", "thing"):  # lists whose words stand in one class
        listed = among & (per_key(lambda e, w, j, name=name: w[j] in ENGLISH_LISTS[e.half][name]) == 1)
        ways[f"from {name}"] = best(torch.where(listed.any(-1, keepdim=True), listed, among), orders[0])
    return ways


def members(example: Example, kind: str) -> list[bool]:
    """The words of a class; those that are 'because'; any."""
    pairs = zip(lower_words(example), example.classes, strict=True)
    return [kind in ("any", its_class) or kind == word == "because" for word, its_class in pairs]


def count_maps(
    counts: RelationCounts, examples: Sequence[Example], word_map: Tensor, query_sets: Tensor, *, causal: bool
) -> None:
    """Count what heads with these weights between words, [B, H, W, W], hit in the pairs of some sentences.

    Each stands for A heads, [B, A, W] bool: one that attends so from some words, and uniformly from all others.
    """
    lengths = torch.tensor([len(e.words) for e in examples])
    columns = torch.arange(word_map.shape[-1])
    present = columns < lengths[:, None]
    words, classes = columns.where(present, -1), padded([class_ids(e).tolist() for e in examples])
    pairs = [(i, p) for i, e in enumerate(examples) for p in directed_pairs(e, [True] * len(e.words), causal=causal)]
    if not pairs:
        return
    text, query, gold = torch.tensor([(i, p.query, p.gold) for i, p in pairs]).unbind(1)
    asks = query_sets[text, :, query][:, :, None]  # [N, A, 1]
    gold_weight, other_weight, _ = pair_weights(word_map, query, text, query, gold, present, causal=causal)
    hits = ((gold_weight > other_weight)[:, None] & asks).flatten(1).double()
    chosen = strongest_words(word_map, words, present, causal=causal)[:, None]  # [B, 1, H, W]
    chosen = chosen.where(query_sets[:, :, None] | (chosen == -2), -1).flatten(1, 2)
    controls = count_controls(chosen, words, text, query, gold, classes, causal=causal).double()
    baseline, contested = count_class_baseline(word_map, query, text, query, gold, present, classes, causal=causal)
    baseline = (baseline[:, None] * asks).flatten(1).double()
    for n, (i, pair) in enumerate(pairs):
        key = (pair.relation, direction_of(pair.relation, pair.reverse), examples[i].half)
        class_baseline = baseline[n][None] if contested[n] else None
        offset = pair.gold - pair.query
        counts.add(key, examples[i].cluster, hits[n][None], offset, controls[n][None], class_baseline)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False], ids=["decoder", "encoder"])
@pytest.mark.parametrize("examples", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_heads_for_a_class_and_a_position_have_no_role(
    examples: list[Example], causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From any word, or the words of one class alone: to the first, the last, the nearest … word of a class; the one
    that comes first in an order of all words, or is of one list; those in main clauses alone, or in no phrase; and the
    first or the second, as the sentence's first word has it. Judged as if ten heads had been picked.
    """
    monkeypatch.setattr(score, "cluster_bootstrap", partial(cluster_bootstrap, replicates=1))  # of intervals
    sentences = one_per_frame(examples)
    kinds = sorted({kind for e in sentences for kind in e.classes} - {""} | {"because"})
    counts, ways = RelationCounts(), list[str]()
    for start in range(0, len(sentences), SENTENCES_AT_ONCE):
        some = sentences[start : start + SENTENCES_AT_ONCE]
        sets = torch.stack([padded([members(e, kind) for e in some], 0) for kind in ["any", *kinds]], 1).bool()
        keys = torch.arange(sets.shape[-1])
        among = sets[:, 1:, None] & (keys < keys[:, None] if causal else keys != keys[:, None])
        chosen = strategies(some, among)
        ways = list(chosen)
        where, exists = (torch.stack([way[which] for way in chosen.values()], 2) for which in (0, 1))  # [B, G, ways, Q]
        maps = torch.zeros(*where.shape, len(keys)).scatter_(-1, where[..., None], exists[..., None].float())
        counts.heads = (sets.shape[1] * len(kinds) * len(ways),)
        count_maps(counts, some, maps.flatten(1, 2), sets, causal=causal)
    heads = [(query_kind, gold_kind, way) for query_kind in ["any", *kinds] for gold_kind in kinds for way in ways]
    rows = scores(counts)
    assert len({row.direction for row in rows}) >= (2 if examples is CHINESE else 12)
    with_role = [row for row in rows if is_good(row, 10) and not by_nature(row, heads[row.head][2])]
    assert [(row.direction, heads[row.head], row.accuracy, row.null, row.class_baseline) for row in with_role] == []


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
    beats_class = not row.contested or row.contested_accuracy >= row.class_baseline + LEAD
    return row.picked_p < LEVEL and row.p * tests < LEVEL and leads and beats_class


@pytest.mark.parametrize("causal", [True, False], ids=["decoder", "encoder"])
def test_heads_that_are_always_right_have_each_role_among_50(causal: bool) -> None:
    sentences = [*ENGLISH, *CHINESE]
    counts = RelationCounts([2])
    for start in range(0, len(sentences), 256):
        some = sentences[start : start + 256]
        width = max(len(e.words) for e in some)
        word_map = torch.zeros(len(some), 2, width, width)
        for i, example in enumerate(some):
            for pair in example.pairs:
                word_map[i, 0, pair.source, pair.target] = word_map[i, 1, pair.target, pair.source] = 1
        count_maps(counts, some, word_map, torch.ones(len(some), 1, width, dtype=torch.bool), causal=causal)
    for row in scores(counts):
        right = row.head == row.direction.endswith("(reverse)")
        assert row.accuracy == right
        assert is_good(row, 50) == right, row


@pytest.mark.parametrize("causal", [True, False], ids=["decoder", "encoder"])
def test_count_maps_with_query_sets_equals_written_out_maps(causal: bool) -> None:
    """The short cut of `count_maps` against the map in which the other words' rows are zero."""
    sentences = one_per_frame(ENGLISH)[::40]
    width = max(len(e.words) for e in sentences)
    random = torch.Generator().manual_seed(width)
    word_map = torch.rand(len(sentences), 5, width, width, generator=random)
    query_sets = torch.rand(len(sentences), 3, width, generator=random) < 0.7
    short, written = RelationCounts([15]), RelationCounts([15])
    count_maps(short, sentences, word_map, query_sets, causal=causal)
    zeroed = (word_map[:, None] * query_sets[:, :, None, :, None]).flatten(1, 2)
    count_maps(written, sentences, zeroed, torch.ones_like(query_sets[:, :1]), causal=causal)
    assert len(written.keys) > 12
    for key in written.keys:
        for name in ("hits", "controls", "contested_hits", "class_baseline"):
            both = (getattr(counts.tally(*key), name) for counts in (short, written))
            torch.testing.assert_close(*both, msg=lambda text, name=name: f"{name}: {text}")


def test_class_baseline_is_a_uniform_draw_from_the_candidates_of_the_class() -> None:
    """Words 0 to 4 of the classes a, b, a, none, a; the gold word of 4 is 0, that of 3 is 1."""
    classes = torch.tensor([[0, 1, 0, -1, 0]])
    rows = torch.zeros(1, 3, 5, 5)
    rows[0, 0, 4, 0], rows[0, 1, 4, 2], rows[0, 2, 4, 1] = 0.9, 0.9, 0.9
    rows[0, :, 3, 1] = 0.9
    query, gold, text = torch.tensor([4, 3]), torch.tensor([0, 1]), torch.tensor([0, 0])
    here = torch.ones(1, 5, dtype=torch.bool)
    baseline, contested = count_class_baseline(rows, query, text, query, gold, here, classes, causal=True)
    assert baseline[0].tolist() == [0.5, 0.5, 0]  # the gold word or its distractor: one of two
    assert contested.tolist() == [True, False]  # word 1 is the only one of its class
    without_tokens = here.clone()
    without_tokens[0, 2] = False  # so it is no distractor
    assert not count_class_baseline(rows, query, text, query, gold, without_tokens, classes, causal=True)[1].any()
    none = torch.full_like(classes, -1)
    assert not count_class_baseline(rows, query, text, query, gold, here, none, causal=True)[1].any()


def test_controls_are_the_other_words_of_the_query_class() -> None:
    """Words 0 to 5. Query 5, gold word 0. Words 2 and 4 attend to it, word 3 does not, word 1 has one candidate."""
    rows = torch.zeros(1, 1, 6, 6)
    rows[0, 0, 1, 0], rows[0, 0, 2, 0], rows[0, 0, 3, 1], rows[0, 0, 4, 0] = 0.9, 0.9, 0.9, 0.9
    query, gold, text = torch.tensor([5]), torch.tensor([0]), torch.tensor([0])
    here, everyone = torch.ones(1, 6, dtype=torch.bool), torch.arange(6)[None]
    chosen = strongest_words(rows, everyone, here, causal=True)
    assert chosen.tolist() == [[[-2, -2, 0, 1, 0, -1]]]  # word 5 attends uniformly

    def control(classes: list[int]) -> float:
        return float(count_controls(chosen, everyone, text, query, gold, torch.tensor([classes]), causal=True))

    assert control([-1, -1, -1, 1, -1, 1]) == 0  # word 3 alone
    assert control([-1, -1, 1, 1, -1, 1]) == 0.5
    assert control([-1, 1, -1, 1, -1, 1]) == 0
    assert control([-1, 2, 2, -1, -1, 1]) == pytest.approx(2 / 3)  # no other word of its class: all
    assert control([-1] * 6) == pytest.approx(2 / 3)


def test_controls_leave_out_words_that_cannot_see_the_gold_word() -> None:
    """Word 5 of a decoder asks for word 3, and so does word 4; word 2 is of its class, and stands before word 3."""
    rows = torch.zeros(1, 1, 6, 6)
    rows[0, 0, 4, 3], rows[0, 0, 2, 1] = 0.9, 0.9
    query, gold, text = torch.tensor([5]), torch.tensor([3]), torch.tensor([0])
    here, everyone = torch.ones(1, 6, dtype=torch.bool), torch.arange(6)[None]
    chosen = strongest_words(rows, everyone, here, causal=True)
    classes = torch.tensor([[-1, -1, 1, -1, -1, 1]])
    assert float(count_controls(chosen, everyone, text, query, gold, classes, causal=True)) == 1


def test_controls_of_an_encoder_are_those_on_the_side_of_the_query() -> None:
    """Words 0 to 4 in an encoder: all words before word 3 attend to it, and those behind it do not."""
    rows = torch.zeros(1, 1, 5, 5)
    rows[0, 0, :3, 3], rows[0, 0, 4, 0] = 0.9, 0.9
    query, gold, text = torch.tensor([0]), torch.tensor([3]), torch.tensor([0])
    here, everyone = torch.ones(1, 5, dtype=torch.bool), torch.arange(5)[None]
    chosen = strongest_words(rows, everyone, here, causal=False)
    assert float(count_controls(chosen, everyone, text, query, gold, torch.full((1, 5), -1), causal=False)) == 1


def test_role_needs_a_lead_over_the_class_baseline_in_contested_pairs() -> None:
    counts = RelationCounts([3])
    for half in (0, 1):
        for cluster in range(40):
            hits = torch.tensor([[1.0, 1.0, float(cluster % 2)]])
            baseline = torch.tensor([[0.5, 1 - LEAD / 2, 0.5]])
            class_baseline = baseline if cluster < 20 else None
            counts.add(("r", "r", half), f"{half} {cluster}", hits, -2 - cluster % 20, None, class_baseline)
    right, short_lead, half_right = scores(counts)
    assert (right.contested, right.contested_accuracy, right.class_baseline) == (20, 1, 0.5)
    assert right.role
    assert short_lead.p_holm < LEVEL
    assert not short_lead.role  # its lead is too small
    assert half_right.accuracy == half_right.contested_accuracy == half_right.class_baseline == 0.5
    assert not half_right.role
    assert half_right.p == 1
    assert short_lead.null == pytest.approx(1 - LEAD / 4)  # half of the pairs are not contested
    assert half_right.null == half_right.class_null == 0.5
