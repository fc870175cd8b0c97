"""Relations: counts on sentences with known pairs, and the scores and roles that follow from them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers import models as token_models
from torch import Tensor
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headscope.errors import HeadscopeError
from headscope.heads.atlas.measuring import measure
from headscope.heads.corpus import Document, cut
from headscope.heads.examples import PairExamples
from headscope.heads.relations import (
    Example,
    Pair,
    RelationCounts,
    can_read,
    count_relations,
    evaluate,
    score,
    scores,
)
from headscope.heads.relations.counts import Tally
from headscope.heads.relations.evaluate import directed_pairs, words_of_tokens
from headscope.heads.relations.hits import count_controls, pair_weights, strongest_words
from headscope.heads.statistics import cluster_bootstrap
from headscope.models.loading import Loaded
from headscope.models.tokens import tokenize
from headscope.watching.recording import record
from tests import tiny
from tests.sentences import ENGLISH, one_per_frame, sentences_of
from tests.tiny_atlas import tokenizer_of

# Counting


def example(words: str, *pairs: tuple[int, int], relation: str = "r", cluster: str = "c", half: int = 1) -> Example:
    spans, at = [], 0
    for word in words.split():
        spans.append((at, at + len(word)))
        at += len(word) + 1
    marked = tuple(Pair(relation, source, target) for source, target in pairs)
    return Example(words, tuple(spans), marked, cluster, half, "en")


def hits_by_hand(rows: list[list[float]], query: int, gold: int, causal: bool) -> list[bool]:
    """One pair in a map of [heads][words]: one text, one row."""
    word_map = torch.tensor(rows)[None, :, None, :]
    where = [torch.tensor([n]) for n in (0, 0, query, gold)]
    present = torch.ones(1, len(rows[0]), dtype=torch.bool)
    gold_weight, other_weight, _ = pair_weights(word_map, *where, present, causal=causal)
    hits: list[bool] = (gold_weight > other_weight)[0].tolist()
    return hits


def test_candidates_are_all_but_the_query_and_in_a_decoder_those_before_it() -> None:
    rows = [[0.2, 0.1, 0.6, 0.1], [0.1, 0.2, 0.3, 0.4]]
    assert hits_by_hand(rows, query=2, gold=0, causal=True) == [True, False]
    assert hits_by_hand(rows, query=2, gold=1, causal=True) == [False, True]
    assert hits_by_hand(rows, query=2, gold=0, causal=False) == [True, False]
    assert hits_by_hand(rows, query=2, gold=1, causal=False) == [False, False]
    assert hits_by_hand(rows, query=2, gold=3, causal=False) == [False, True]


def test_a_tie_is_no_hit() -> None:
    rows = [[0.3, 0.3, 0.4], [0.0, 0.0, 0.0], [0.3, 0.2, 0.3]]
    assert hits_by_hand(rows, query=2, gold=0, causal=True) == [False, False, True]
    assert hits_by_hand(rows, query=1, gold=0, causal=False) == [False, False, False]


def test_words_without_tokens_are_no_candidates() -> None:
    word_map = torch.tensor([[[[0.2, 0.5, 0.3, 0.0]]]])
    where = [torch.tensor([n]) for n in (0, 0, 3, 2)]
    present = torch.tensor([[True, False, True, True]])
    gold_weight, other_weight, other_word = pair_weights(word_map, *where, present, causal=True)
    assert (gold_weight.item(), other_weight.item(), other_word.item()) == (pytest.approx(0.3), pytest.approx(0.2), 0)


def test_directed_pairs_have_tokens_and_two_candidates() -> None:
    e = example("a b c d", (3, 0), (0, 2), (1, 0), (2, 2))
    everything = [(q.reverse, q.query, q.gold) for q in directed_pairs(e, [True] * 4, causal=False)]
    assert everything == [(False, 3, 0), (True, 0, 3), (False, 0, 2), (True, 2, 0), (False, 1, 0), (True, 0, 1)]
    back = [(q.reverse, q.query, q.gold) for q in directed_pairs(e, [True] * 4, causal=True)]
    assert back == [(False, 3, 0), (True, 2, 0)]  # b has only a to choose from
    gone = [(q.reverse, q.query, q.gold) for q in directed_pairs(e, [True, False, True, True], causal=True)]
    assert gone == [(False, 3, 0)]  # and now c has only a


def test_words_of_tokens_are_those_that_they_overlap_most() -> None:
    tokens = tokenize("It's well-known", word_level(["It", "'", "s", "well", "-", "known"]), start_token_id=0)
    assert tokens.offsets[1:] == ((0, 2), (2, 3), (3, 4), (5, 9), (9, 10), (10, 15))
    assert words_of_tokens(tokens, [(0, 2), (2, 4), (5, 15)]) == [-1, 0, 1, 1, 2, 2, 2]
    assert words_of_tokens(tokens, [(0, 4), (5, 7), (7, 15)]) == [-1, 0, 0, 0, 1, 2, 2]  # "well": 2 and 2, the first
    assert words_of_tokens(tokens, [(0, 4), (5, 6), (6, 12)]) == [-1, 0, 0, 0, 2, 2, 2]


def word_level(words: list[str]) -> Any:
    return tokenizer_of(words, pre_tokenizers.BertPreTokenizer())


def letter_level() -> Any:
    """A tokenizer that cuts every word into its letters, in the vocabulary of the tiny models."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,-"
    cut = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    return tokenizer_of(letters, pre_tokenizers.Sequence(cut))


def loaded(model: torch.nn.Module, tokenizer: Any, context: int | None = None, causal: bool = True) -> Loaded:
    return Loaded("tiny", model, tokenizer, 0, context, causal, "a test")


def same(left: RelationCounts, right: RelationCounts) -> bool:
    assert left.keys == right.keys
    assert left.heads == right.heads
    for key in left.keys:
        one, other = left.tally(*key), right.tally(*key)
        assert one.clusters == other.clusters
        for name in ("hits", "pairs", "offsets", "contested", "contested_hits", "controls", "class_baseline"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=1e-5)
    return True


SOME = (
    one_per_frame(sentences_of("coreference", 0))[::12]
    + one_per_frame(sentences_of("cause", 1))[::9]
    + one_per_frame(sentences_of("cause", 0))[::12]
)


@pytest.fixture(scope="module")
def letters() -> Loaded:
    return loaded(tiny.llama(), letter_level())


@pytest.fixture(scope="module")
def counted(letters: Loaded) -> RelationCounts:
    return count_relations(letters, SOME)


def test_hits_match_a_plain_computation(letters: Loaded, counted: RelationCounts) -> None:
    total: dict[tuple[str, bool], Tensor] = {}
    for e in SOME:
        tokens = tokenize(e.text, letters.tokenizer, start_token_id=0)
        with torch.no_grad(), record(letters.model) as recording:
            letters.model(torch.tensor([tokens.ids]))
        weights = torch.cat(recording.to_attentions()).double()  # [layers, H, T, T]
        members = [[t for t, (a, b) in enumerate(tokens.offsets) if t and start <= a < end] for start, end in e.words]
        words = torch.stack([weights[..., m].sum(-1) for m in members], -1)
        words = torch.stack([words[..., m, :].mean(-2) for m in members], -2)
        for reverse in (False, True):
            query, gold = (e.pairs[0].source, e.pairs[0].target)[:: -1 if reverse else 1]
            if 2 <= query > gold:
                hit = words[..., query, :query].argmax(-1) == gold
                key = e.pairs[0].relation, reverse
                total[key] = total.get(key, torch.zeros(2, 6)) + hit
    assert len(total) == 3
    for (relation, reverse), wanted in total.items():
        direction = relation + " (reverse)" * reverse
        got = sum(counted.tally(relation, direction, half).hits.sum(0) for half in (0, 1))
        torch.testing.assert_close(got, wanted.double())
    assert sum(hits.sum() for hits in total.values()) > 5


def test_padding_and_batches_change_nothing(letters: Loaded, counted: RelationCounts) -> None:
    progress: list[tuple[int, int]] = []
    alone = count_relations(letters, SOME, batch_tokens=1, on_progress=lambda done, of: progress.append((done, of)))
    assert same(alone, counted)
    assert progress == [(i, len(SOME)) for i in range(1, len(SOME) + 1)]


def test_batches_are_halved_with_a_note_where_memory_is_short(
    letters: Loaded, counted: RelationCounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, notes, done = evaluate._count_batch, list[str](), list[int]()

    def small(loaded: Loaded, batch: list[Any]) -> RelationCounts:
        if len(batch) > 2:
            torch.empty(1 << 60)  # as it fails on a CPU
        return whole(loaded, batch)

    monkeypatch.setattr(evaluate, "_count_batch", small)
    halved = count_relations(letters, SOME, on_note=notes.append, on_progress=lambda now, of: done.append(now))
    assert same(halved, counted)
    assert done == sorted(done)
    assert done[-1] == len(SOME)
    assert set(notes) == {"Not enough memory for whole batches of sentences: smaller ones were used."}
    assert notes

    def never(loaded: Loaded, batch: list[Any]) -> RelationCounts:
        raise MemoryError

    monkeypatch.setattr(evaluate, "_count_batch", never)
    with pytest.raises(MemoryError):
        count_relations(letters, SOME)


def test_parts_add_up_to_the_whole(letters: Loaded, counted: RelationCounts) -> None:
    first, second = count_relations(letters, SOME[::2]), count_relations(letters, SOME[1::2])
    merged = RelationCounts()
    merged.merge(first)
    merged.merge(second)
    assert same(merged, counted)
    assert merged.examples == counted.examples == len(SOME)
    with pytest.raises(ValueError, match=r"2 layers with \[6\] heads, and has 3 layers with \[5\]"):
        RelationCounts([5, 5, 5]).merge(counted)


def test_counts_survive_a_file(counted: RelationCounts) -> None:
    tensors, names = counted.to_tensors()
    again = RelationCounts.from_tensors(load(save(tensors)), json.loads(json.dumps(names)))
    assert same(again, counted)
    assert (again.examples, again.skipped) == (counted.examples, counted.skipped)
    with pytest.raises(ValueError, match=r"'0\.pairs' of shape .* got none"):
        RelationCounts.from_tensors({"0.hits": tensors["0.hits"]}, names)


def test_a_long_text_is_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"{a}{b}" for a in "abcdefghijklmnopqr" for b in "abcdefghijklmnopqr"]  # 324 words
    pairs = [(i, i - 1 - i % 7) for i in range(8, 324)]
    e = example(" ".join(words), *pairs)
    model = loaded(tiny.llama(max_position_embeddings=1024), letter_level())
    whole = count_relations(model, [e])
    assert whole.tally("r", "r", 1).pairs.tolist() == [316]
    parts = RelationCounts()
    for start in range(0, 316, 100):
        parts.merge(count_relations(model, [example(e.text, *pairs[start : start + 100])]))
    assert same(whole, parts)
    monkeypatch.setattr(evaluate, "_ROWS_AT_ONCE", 1000)
    assert same(whole, count_relations(model, [e]))


def test_texts_that_are_too_long_are_skipped_and_counted(letters: Loaded) -> None:
    short, long = example("a b c d", (3, 0)), example("a b c d e f g", (6, 0))
    counts = count_relations(loaded(letters.model, letters.tokenizer, context=7), [short, long])
    assert (counts.examples, counts.skipped) == (1, 1)
    assert counts.tally("r", "r", 1).pairs.tolist() == [1]
    nothing = count_relations(loaded(letters.model, letters.tokenizer, context=3), [short, long])
    assert (nothing.examples, nothing.skipped, nothing.keys) == (0, 2, ())
    assert scores(nothing) == []


def test_sentences_that_the_tokenizer_drops_are_left_out_with_a_note(letters: Loaded) -> None:
    odd = Example("\u200b", ((0, 1),), (), "odd", 1, "")
    bare = word_level(["a", "b", "c", "d"])
    bare.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    notes: list[str] = []
    model = loaded(letters.model, bare)
    counts = count_relations(model, [odd, example("a b c d", (3, 0))], on_note=notes.append)
    assert counts.examples == 1
    assert notes == ["Sentences of which the tokenizer keeps nothing were left out: 1."]
    assert can_read(model, ["\u200b", "a b"]) == (True, "")


# Examples


def test_token_examples_are_the_largest_and_smallest_weights_on_text(letters: Loaded) -> None:
    text = "The cat sat on the mat and the dog slept"
    collected = measure(letters, cut(letters, Document("a text", lambda: text), 0), ()).token_examples
    tokens = tokenize(text, letters.tokenizer, start_token_id=0)
    with torch.no_grad(), record(letters.model) as recording:
        letters.model(torch.tensor([tokens.ids]))
    letter = [text[start:end] for start, end in tokens.offsets]
    for layer, head in ((0, 0), (1, 4)):
        weights = recording.to_attentions()[layer][0, head, :, 1:]  # the start token is a sink
        largest = weights[2:].max(-1)  # rows with two text keys
        rows = sorted(range(len(largest.values)), key=lambda row: -float(largest.values[row]))
        pairs = [(letter[row + 2], letter[1 + int(largest.indices[row])]) for row in rows]
        best, worst = (side[layer, head] for side in (collected.largest, collected.smallest))
        assert [(example.token, example.target) for example in best] == list(dict.fromkeys(pairs))[:4]
        assert [(example.token, example.target) for example in worst] == list(dict.fromkeys(pairs[::-1]))[:4]
        assert best[0].weight == pytest.approx(float(largest.values[rows[0]]), abs=1e-4)
        assert worst[0].weight == pytest.approx(float(largest.values[rows[-1]]), abs=1e-4)
        row, key = rows[0] + 2, 1 + int(largest.indices[rows[0]])
        assert (best[0].distance, best[0].document) == (key - row, "a text")
        assert text[: tokens.offsets[row][0]].rstrip().endswith(best[0].before)


def test_token_examples_of_two_texts_are_those_of_the_batch(letters: Loaded) -> None:
    texts = {"one": "The cat sat on the mat", "two": "A dog slept and slept and it was a good dog"}
    pieces = [piece for name, text in texts.items() for piece in cut(letters, Document(name, lambda t=text: t), 0)]
    together, first, second = (measure(letters, part, ()).token_examples for part in (pieces, pieces[:1], pieces[1:]))
    first.merge(second)
    for ours, theirs in ((first.largest, together.largest), (first.smallest, together.smallest)):
        for head, examples in ours.items():
            weights = [example.weight for example in examples]
            assert weights == pytest.approx([example.weight for example in theirs[head]], abs=2e-4)


@pytest.mark.parametrize("reverse", [False, True])
def test_pair_examples_are_right_where_they_count_as_hits(letters: Loaded, reverse: bool) -> None:
    """Words of other bounds than the tokenizer's own, which a treebank has, too."""
    halves = [example("ab cd ef gh ij", (3, 0), (2, 1), (4, 2)), example("ij ab gh k l", (1, 3), (0, 4))]
    odd = Example("abcd ef", ((0, 2), (2, 4), (5, 7)), (Pair("r", 2, 1), Pair("r", 2, 0)), "c", 1, "en")
    counts = count_relations(letters, [*halves, odd])
    direction = "r (reverse)" if reverse else "r"
    hits = counts.tally("r", direction, 1).hits.sum(0)
    assert hits.any()
    for layer in range(hits.shape[0]):
        for head in range(hits.shape[1]):
            shown = counts.pair_examples.of_head(direction, layer, head)
            assert len(shown) == counts.tally("r", direction, 1).pairs.sum()  # all, as there are few
            assert sum(pair.hit for pair in shown) == hits[layer, head]
            margins = [pair.weight - pair.other_weight for pair in shown]
            assert margins == sorted(margins, reverse=True)


def test_pair_examples_are_the_clearest_of_the_second_half(letters: Loaded) -> None:
    rows = [" ".join(f"{a}{b}" for b in "abcdef") for a in "ghijklmn"]
    sentences = [example(text, (5, 1), half=half) for text in rows for half in (0, 1)]
    collected = count_relations(letters, sentences).pair_examples
    one_by_one = [count_relations(letters, [e]).pair_examples for e in sentences[1::2]]
    assert count_relations(letters, sentences[::2]).pair_examples.pairs == []
    for head in range(6):
        alone = sorted((part.of_head("r", 1, head)[0] for part in one_by_one), key=lambda e: e.other_weight - e.weight)
        shown = collected.of_head("r", 1, head)
        assert [e.text for e in shown] == [e.text for e in [*alone[:3], *alone[-3:]]]
        assert [e.weight for e in shown] == pytest.approx([e.weight for e in [*alone[:3], *alone[-3:]]], abs=1e-5)
        assert [e.other for e in shown] == [e.other for e in [*alone[:3], *alone[-3:]]]


def test_pair_examples_survive_a_file(letters: Loaded) -> None:
    odd = Example(" ab, cd ef", ((1, 3), (5, 7), (8, 10)), (Pair("r", 2, 1), Pair("r", 2, 0)), "c", 1, "en")
    pairs = count_relations(letters, [odd, example("a b c d", (3, 0))]).pair_examples
    tensors, data = pairs.to_state()
    again = PairExamples.from_state(load(save(tensors)), json.loads(json.dumps(data)))
    assert again.pairs == pairs.pairs
    for ours, theirs in zip(pairs.of_head("r", 1, 2), again.of_head("r", 1, 2), strict=True):
        assert replace(theirs, weight=ours.weight, other_weight=ours.other_weight) == ours
        assert (theirs.weight, theirs.other_weight) == pytest.approx((ours.weight, ours.other_weight), abs=1e-3)
    with pytest.raises(ValueError, match="do not fit their sentences"):
        PairExamples.from_state(tensors, data | {"pairs": data["pairs"][:1]})
    with pytest.raises(ValueError, match="of a sentence that is not there"):
        PairExamples.from_state(tensors, data | {"sentences": data["sentences"][:1]})


def test_counts_without_a_cluster_keep_the_pair_examples_of_other_directions(letters: Loaded) -> None:
    one = example("a b c d", (3, 0), relation="one", cluster="first")
    two = example("e f g h", (3, 1), relation="two", cluster="second")
    counts = count_relations(letters, [one, two]).without({"first"})
    assert [pair.text for pair in counts.pair_examples.pairs] == [two.text]
    assert counts.pair_examples.of_head("one", 0, 0) == []
    assert [e.gold for e in counts.pair_examples.of_head("two", 0, 0)] == ["f"]


def test_attention_that_is_not_between_the_tokens_is_refused(letters: Loaded) -> None:
    class Halved(torch.nn.Module):
        """A model that reads every second token."""

        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner, self.config = inner, inner.config

        @property
        def device(self) -> torch.device:
            return torch.device("cpu")

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return self.inner(input_ids[:, ::2], attention_mask=attention_mask[:, ::2])

    with pytest.raises(HeadscopeError, match=r"tiny has attention of shape \(1, 6, 4, 4\), .* 1 texts of 8 tokens"):
        count_relations(loaded(Halved(letters.model), letters.tokenizer), [example("a b c d e f g", (6, 0))])


# Scores


def counts_from(hits: dict[int, list[int]], offsets: dict[int, list[int]], pairs: int = 4) -> RelationCounts:
    """Counts of a model with two layers, of 2 heads and 1: head 1.0 hits `hits[half][cluster]` of the pairs.

    `offsets[half]` is the offset of every pair in a cluster.
    """
    counts = RelationCounts([2, 1])
    for half in hits:
        for cluster, (good, offset) in enumerate(zip(hits[half], offsets[half], strict=True)):
            for pair in range(pairs):
                hit = torch.zeros(2, 2)
                hit[1, 0] = pair < good
                hit[0, 1] = offset == -2  # a head that always attends two words back
                counts.add(("r", "r", half), f"{half} {cluster}", hit, offset)
    return counts


def bound(score: float) -> float:
    """The p of cluster_score_test."""
    return 0.25 / (0.5 * math.erfc(1)) * 0.5 * math.erfc(score / 2**0.5)


PICKS, PICK_OFFSETS = [4, 2, 4, 4, 4, 4], [-1, -2, -3, -4, -5, -6]


def test_a_head_is_compared_with_the_best_fixed_offset() -> None:
    counts = counts_from({0: PICKS, 1: [4] * 30}, {0: PICK_OFFSETS, 1: [-2] * 10 + [-3] * 9 + [-4] * 11})
    rows = scores(counts)
    assert [(row.layer, row.head) for row in rows] == [(0, 0), (0, 1), (1, 0)]  # 1.1 is no head
    best = rows[2]
    assert (best.accuracy, best.pairs, best.clusters, best.picked_accuracy) == (1.0, 120, 30, 22 / 24)
    # On the half that picks the offset is -6, the first of equals: differences 4, 2, 4, 4, 4, 0, T = 18 ÷ √68.
    assert best.picked_p == pytest.approx(bound(18 / 68**0.5))
    assert (best.baseline, best.baseline_offset) == (11 * 4 / 120, -4)
    assert (best.low, best.high) == (1.0, 1.0)
    # 19 clusters with a difference of 4, 11 with 0: T = 76 ÷ √304
    assert best.p == pytest.approx(bound(76 / 304**0.5))
    assert best.p_holm == best.p  # the only one that was picked
    assert [row.p_holm for row in rows[:2]] == [1, 1]
    assert best.role
    assert rows[1].accuracy == pytest.approx(1 / 3)
    assert rows[1].low < 1 / 3 < rows[1].high
    assert not rows[1].role
    assert rows[0].p > 0.5
    assert scores(counts, half=0)[2].accuracy == 22 / 24


def test_few_clusters_are_no_evidence_however_many_pairs() -> None:
    counts = RelationCounts([1])
    for cluster in range(3):
        for pair in range(500):
            counts.add(("r", "r", 1), str(cluster), torch.ones(1, 1), -2 - pair % 20)
    (row,) = scores(counts)
    assert row.accuracy == 1
    assert row.p == pytest.approx(bound(3**0.5))
    assert row.p > 0.05


def test_sentences_that_hardly_vary_give_no_role() -> None:
    rest = [*range(-30, -15), *range(15, 29)]
    for fixed, wanted in ((31, True), (29, False)):
        offsets = [-2] * fixed + rest + [29] * (31 - fixed)
        row = scores(counts_from({0: PICKS, 1: [4] * 60}, {0: PICK_OFFSETS, 1: offsets}))[2]
        assert row.p_holm < 0.05
        assert (row.too_fixed, row.role) == (wanted, not wanted)


def test_role_needs_both_halves() -> None:
    offsets = [-2] * 10 + [-3] * 9 + [-4] * 11
    for picks, wanted in (([4] * 6, True), ([4, 0, 0, 0, 0, 4], False)):
        row = scores(counts_from({0: picks, 1: [4] * 30}, {0: PICK_OFFSETS, 1: offsets}))[2]
        assert row.p < 0.05
        assert row.role == wanted


def test_pairs_far_apart_agree_with_no_offset() -> None:
    counts = counts_from({1: [4] * 4}, {1: [-2, -90, -90, -90]})
    row = scores(counts)[2]
    assert (row.baseline, row.baseline_offset, row.pairs) == (0.25, -2, 16)
    assert row.picked_accuracy != row.picked_accuracy  # NaN: nothing to pick on


def test_scores_refuse_a_third_half() -> None:
    with pytest.raises(ValueError, match="half=2: wanted 0 or 1"):
        scores(counts_from({1: [4]}, {1: [-2]}), half=2)


class Models(torch.nn.Module):
    """Models that run one after another on the same tokens: counted in one run, as layers side by side."""

    def __init__(self, models: list[torch.nn.Module]) -> None:
        super().__init__()
        self.models, self.config = torch.nn.ModuleList(models), models[0].config

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        for model in self.models:
            model(input_ids=input_ids, attention_mask=attention_mask)


class CountsOfLayers(RelationCounts):
    """The counts of some layers alone."""

    def __init__(self, tallies: dict[Any, Tally], layers: slice, heads: tuple[int, ...]) -> None:
        super().__init__(heads)
        self._tallies, self._layers = tallies, layers

    @property
    def keys(self) -> tuple[Any, ...]:
        return tuple(self._tallies)

    @property
    def relations(self) -> tuple[str, ...]:
        return tuple(sorted({relation for relation, _, _ in self._tallies}))

    def tally(self, relation: str, direction: str, half: int) -> Tally:
        empty = RelationCounts(self.heads).tally(relation, direction, half)
        tally = self._tallies.get((relation, direction, half), empty)
        by_head = ("hits", "controls", "contested_hits", "class_baseline")
        return replace(tally, **{name: getattr(tally, name)[:, self._layers] for name in by_head})


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False], ids=["decoder", "encoder"])
def test_random_weights_have_no_relation_role(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 models of 2 layers with 6 heads, each scored by itself."""
    monkeypatch.setattr(score, "cluster_bootstrap", partial(cluster_bootstrap, replicates=1))  # of intervals
    names = sorted({pair.relation for example in ENGLISH for pair in example.pairs})
    examples = [e for name in names for half in (0, 1) for e in one_per_frame(sentences_of(name, half))[::2]]
    words = sorted({e.word(i) for e in examples for i in range(len(e.words))})
    sizes: dict[str, Any] = {"vocab_size": len(words) + 2, "hidden_size": 24, "intermediate_size": 32}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 6, "initializer_range": 0.5}
    decoder, encoder = LlamaConfig(**sizes, num_key_value_heads=2, head_dim=4), BertConfig(**sizes)
    models: list[torch.nn.Module] = []
    for seed in range(20):
        torch.manual_seed(seed)
        models.append((LlamaForCausalLM(decoder).model if causal else BertModel(encoder)).eval())
    counts = count_relations(loaded(Models(models), word_level(words), causal=causal), examples, batch_tokens=16384)
    assert counts.heads == (6,) * 40
    tallies = {key: counts.tally(*key) for key in counts.keys}
    significant = 0  # after the correction, on the reported half alone
    for number in range(20):
        rows = scores(CountsOfLayers(tallies, slice(2 * number, 2 * number + 2), (6, 6)))
        assert {row.relation for row in rows} == set(names)
        assert [row for row in rows if row.role] == []
        significant += sum(row.p_holm < 0.05 and row.accuracy > row.baseline for row in rows)
    assert significant <= 8  # 5 % of 160 families of tests


def test_a_hand_built_coreference_head_gets_its_role() -> None:
    """A map that puts all weight on the gold word of every coreference pair, and another that attends one word back."""
    counts = RelationCounts([2])
    for e in sentences_of("coreference", 0) + sentences_of("coreference", 1):
        for pair in directed_pairs(e, [True] * len(e.words), causal=True):
            width = len(e.words)
            rows = torch.zeros(2, width)
            rows[0, pair.gold] = 1
            rows[1, pair.query - 1] = 1
            where = [torch.tensor([n]) for n in (0, 0, pair.query, pair.gold)]
            present = torch.ones(1, width, dtype=torch.bool)
            gold_weight, other_weight, _ = pair_weights(rows[None, :, None], *where, present, causal=True)
            key = ("coreference", "coreference", e.half)
            counts.add(key, e.cluster, (gold_weight > other_weight).double(), pair.gold - pair.query)
    assert [row.role for row in scores(counts)] == [True, False]


# Which languages a model reads


def test_can_read_needs_known_tokens(letters: Loaded) -> None:
    assert can_read(letters, ["The king slept", "I saw it"]) == (True, "")
    good, reason = can_read(letters, ["The king 睡"])
    assert not good
    assert reason == "12 % of the tokens are unknown to it, more than 5 %"


def test_can_read_refuses_chinese_in_bytes() -> None:
    inner = Tokenizer(token_models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model = loaded(torch.nn.Identity(), PreTrainedTokenizerFast(tokenizer_object=inner))
    assert can_read(model, ["我把苹果给了她。"]) == (
        False,
        "it needs 3.00 tokens per Chinese character, more than 1.2",
    )
    assert can_read(model, ["abc def"]) == (True, "")


def test_controls_by_hand() -> None:
    """Words 0 to 4. Query 4, gold word 1. Of the others that may see it, 2 and 3, one attends to it in head 0."""
    rows = torch.zeros(1, 2, 5, 5)
    rows[0, 0, 2, 1], rows[0, 0, 3, 2], rows[0, 0, 4, 1], rows[0, 0, 0, 1] = 0.9, 0.9, 0.9, 0.9
    rows[0, 1, 2:, 1] = 0.9
    where = torch.arange(5)[None], torch.tensor([0]), torch.tensor([4]), torch.tensor([1])
    present = torch.ones(1, 5, dtype=torch.bool)
    none = torch.full((1, 5), -1)
    chosen = strongest_words(rows, where[0], present, causal=True)
    assert chosen.tolist() == [[[-2, -2, 1, 2, 1], [-2, -2, 1, 1, 1]]]  # words 0 and 1 have fewer than two candidates
    assert count_controls(chosen, *where, none, causal=True).tolist() == [[0.5, 1.0]]
    chosen = strongest_words(rows, where[0], present, causal=False)
    assert count_controls(chosen, *where, none, causal=False)[0, 0] == pytest.approx(2 / 3)  # word 0 sees it as well


def test_a_head_whose_words_all_attend_to_the_gold_word_has_no_role() -> None:
    counts = RelationCounts([2])
    for half in (0, 1):
        for cluster in range(30):
            controls = torch.tensor([[1.0, 0.1]])
            counts.add(("r", "r", half), f"{half} {cluster}", torch.ones(1, 2), -2 - cluster % 20, controls)
    everywhere, here = scores(counts)
    assert everywhere.accuracy == here.accuracy == 1
    assert (everywhere.control, here.control) == (1, pytest.approx(0.1))
    assert here.role
    assert not everywhere.role
    assert everywhere.p_holm == 1
