"""Roles of heads made by hand, and where there is too little evidence for one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from headscope import AttentionMatrix, masks
from headscope.heads import roles
from headscope.heads.atlas.measuring import columns_of
from headscope.heads.atlas.profiler import profile
from headscope.heads.corpus import TextBatch, batches
from headscope.heads.measures import AttentionBatch, Ratio, Visibility, standard, take
from headscope.heads.measures.sums import MeasureSums, weights_of
from headscope.heads.roles import ROLES, find_roles
from headscope.models.loading import Loaded
from tests.heads.test_measures import batch_of, piece, values
from tests.options import one_thread  # noqa: F401  (for the whole module)
from tests.tiny_atlas import PLAN, documents


def one_hot_heads(positions: list[list[int]], length: int, strength: float = 30.0) -> AttentionMatrix:
    """A head for each list: query i attends to key positions[head][i] almost only; −1: to all keys uniformly."""
    key = torch.eye(length).expand(1, len(positions), -1, -1)
    query = torch.zeros(1, len(positions), length, length)
    for head, targets in enumerate(positions):
        for i, j in enumerate(targets):
            if j >= 0:
                query[0, head, i, j] = strength
    return AttentionMatrix(query, key, mask=masks.causal(), scale=1.0)


def roles_of(
    matrix: AttentionMatrix, plain: TextBatch, repeated: AttentionMatrix, twice: TextBatch, *, causal: bool = True
) -> list[set[str]]:
    """The roles of heads made by hand, computed as those of a model."""
    sums, null = MeasureSums(), MeasureSums()
    count = matrix.shape[1]
    for number in range(6):
        for weights, batch in ((matrix, plain), (repeated, twice)):
            visibility = Visibility(batch, masks.causal() if causal else None, count)
            measures = [measure for measure in standard() if measure.reads(batch)]
            document_weights = weights_of([(f"{'repeat:' if batch is twice else ''}{number}", number % 2)])
            for total, attention in (
                (sums, AttentionBatch(weights, visibility)),
                (null, AttentionBatch(visibility.uniform, visibility)),
            ):
                total.add(take(measures, attention), 0, 1, document_weights)
    evidence = find_roles(sums, null)
    return [{row.role for row in evidence if row.head == head} for head in range(count)]


def test_heads_made_by_hand_get_their_role_and_no_other() -> None:
    length, period = 41, 20
    plain = batch_of(length)
    (twice,) = batches([piece(2 * period + 1, end=False, period=period)])
    before = [max(0, i - 1) for i in range(length)]
    current = list(range(length))
    first = [0] * length
    uniform = [-1] * length
    far = [(i * 7) % (i + 1) for i in range(length)]
    again = [i - period + 1 if i > period else 0 for i in range(length)]
    same = [i - period if i > period else 0 for i in range(length)]
    stops = [max((j for j in range(i) if j % 5 == 4), default=0) for i in range(length)]
    heads = [before, current, first, uniform, far, stops]
    on_plain = one_hot_heads([*heads, far, far], length)
    on_twice = one_hot_heads([before, current, first, uniform, far, far, again, same], length)
    evidence = roles_of(on_plain, plain, on_twice, twice)
    wanted = [{"previous token"}, {"self"}, {"sink"}, {"uniform"}, set(), {"delimiter"}, {"induction"}, {"duplicate"}]
    assert evidence == wanted


def test_a_next_token_head_of_an_encoder_gets_its_role() -> None:
    length = 41
    (twice,) = batches([piece(41, end=False, period=20)])
    key = torch.eye(length).expand(1, 1, -1, -1)
    after = 30 * torch.eye(length)[[min(i + 1, length - 1) for i in range(length)]].expand(1, 1, -1, -1)
    matrix = AttentionMatrix(after, key, scale=1.0)
    assert roles_of(matrix, batch_of(length), matrix, twice, causal=False) == [{"next token"}]


def test_a_head_with_little_weight_on_text_has_no_role_from_it() -> None:
    """The token before gets 4 % of its weight, the first token 96 %."""
    length = 41
    key = torch.eye(length).expand(1, 1, -1, -1)
    query = torch.zeros(1, 1, length, length)
    for i in range(2, length):
        query[0, 0, i, 0], query[0, 0, i, i - 1] = 30.0 + math.log(24), 30.0
    matrix = AttentionMatrix(query, key, mask=masks.causal(), scale=1.0)
    (twice,) = batches([piece(41, end=False, period=20)])
    assert roles_of(matrix, batch_of(length), matrix, twice) == [{"sink"}]


def test_a_head_with_a_learned_sink_has_no_role_from_its_little_weight_on_text() -> None:
    """The token before gets 4 % of its weight, a learned sink 96 %."""
    length = 41
    key = torch.eye(length).expand(1, 1, -1, -1)
    query = torch.zeros(1, 1, length, length)
    for i in range(2, length):
        query[0, 0, i, i - 1] = 30.0
    for sink, wanted in ((-math.inf, {"previous token"}), (30.0 + math.log(24), set())):
        matrix = AttentionMatrix(query, key, mask=masks.causal(), scale=1.0, sinks=torch.tensor([sink]))
        (twice,) = batches([piece(41, end=False, period=20)])
        assert roles_of(matrix, batch_of(length), matrix, twice) == [wanted]
        visibility = Visibility(batch_of(length), masks.causal(), 1)
        measured = values(take(standard(), AttentionBatch(matrix, visibility)))
        assert float(measured["text"]) == pytest.approx(0.04 if sink > 0 else 1, abs=1e-5)


def test_evidence_counts_the_rows_behind_the_score() -> None:
    """38 of 41 rows see two text keys or more; of repeats it is the 20 rows of the second copy. Three texts report."""
    length, period = 41, 20
    (twice,) = batches([piece(length, end=False, period=period)])
    before = one_hot_heads([[max(0, i - 1) for i in range(length)]], length)
    again = one_hot_heads([[i - period + 1 if i > period else 0 for i in range(length)]], length)
    sums, null = MeasureSums(), MeasureSums()
    for number in range(6):
        for weights, batch in ((before, batch_of(length)), (again, twice)):
            visibility = Visibility(batch, masks.causal(), 1)
            measures = [measure for measure in standard() if measure.reads(batch)]
            document_weights = weights_of([(f"{number}", number % 2)])
            for total, attention in (
                (sums, AttentionBatch(weights, visibility)),
                (null, AttentionBatch(visibility.uniform, visibility)),
            ):
                total.add(take(measures, attention), 0, 1, document_weights)
    assert {row.role: row.examples for row in find_roles(sums, null)} == {"previous token": 3 * 39, "induction": 3 * 20}


def test_a_head_is_reported_on_the_half_that_did_not_pick_it() -> None:
    """Strong where it was picked, weak elsewhere: no role; strong on both: the score is the other half's."""
    sums, null = MeasureSums(), MeasureSums()
    for number in range(8):
        half = number % 2
        numerator = torch.tensor([[0.9, 0.9 - 0.2 * half]]) if half == 0 else torch.tensor([[0.1, 0.7]])
        document_weights = weights_of([(f"doc {number}", half)])
        sums.add({"first": Ratio(numerator, torch.ones(1, 2))}, 0, 1, document_weights)
        null.add({"first": Ratio(torch.full((1, 1), 0.1), torch.ones(1, 1))}, 0, 1, document_weights[:2])
    (row,) = find_roles(sums, null, halves={f"doc {number}": number % 2 for number in range(8)})
    assert (row.role, row.head, row.documents) == ("sink", 1, 4)
    assert (row.picked, row.score, row.null) == (pytest.approx(0.9), pytest.approx(0.7), pytest.approx(0.1))


def test_every_role_has_a_column_with_intervals() -> None:
    evidence = {column.name for column in columns_of(standard()) if column.evidence}
    assert {role.column for role in ROLES} <= evidence
    assert all(role.source for role in ROLES)


def test_roles_need_texts_in_both_halves(tiny_decoder: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    uniform = next(role for role in roles.ROLES if role.name == "uniform")
    monkeypatch.setattr(roles, "ROLES", (replace(uniform, threshold=0.1),))  # every head has it
    plan = replace(PLAN, repeats=0, worth=0)
    for count, message in (
        (2, "1 to pick heads (needed: 1), 1 to confirm them (needed: 2)"),
        (3, "2 to pick heads"),
        (4, None),
    ):
        atlas = profile(tiny_decoder, texts=documents()[:count], plan=plan)
        assert any("Too few texts" in note and f": {message}" in note for note in atlas.notes) == (message is not None)
        assert any("Too few texts" in note for note in atlas.notes) == (message is not None)
        assert bool(atlas.roles()) == (message is None)
    names = ("owl", "sea", "bus", "cat")
    alone = [profile(tiny_decoder, texts=documents(name), plan=plan) for name in names]
    assert [atlas.info["documents"] for atlas in alone] == [{"owl": 1}, {"sea": 1}, {"bus": 1}, {"cat": 0}]
    assert not any(atlas.roles() for atlas in alone)
    merged = alone[0].merge(alone[1]).merge(alone[2]).merge(alone[3])
    assert merged.roles()
    assert not any("Too few texts" in note for note in merged.notes)
