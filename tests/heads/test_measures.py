"""Measures against their definitions on dense matrices, and on heads made by hand whose answer is known."""

import math

import pytest
import torch
from torch import Tensor

from headscope import AttentionMatrix, masks
from headscope.heads.atlas.measuring import _rule, columns_of
from headscope.heads.corpus import Piece, TextBatch, batches
from headscope.heads.measures import AttentionBatch, Column, Measure, Ratio, Visibility, standard, take
from headscope.heads.measures.products import Distance
from headscope.heads.measures.sums import MeasureSums, document_weights, weights_of
from headscope.heads.roles import ROLES, find_roles
from headscope.ops.kernels import tiles
from headscope.ops.reductions import Block, Reduction
from tests.options import one_thread  # noqa: F401  (for the whole module)

HEADS, SIZE = 6, 5


def piece(length: int, *, end: bool, name: str = "a", half: int = 0, period: int = 0) -> Piece:
    """A text with a start token, and an end token if wanted; every fifth token is a delimiter."""
    sinks = tuple(i == 0 or (end and i == length - 1) for i in range(length))
    delimiters = tuple(i % 5 == 4 and not sinks[i] for i in range(length))
    return Piece(tuple(range(length)), sinks, delimiters, name, half, period=period)


def batch_of(*lengths: int, end: bool = False) -> TextBatch:
    (batch,) = batches([piece(n, end=end, name=f"doc {n}") for n in lengths], tokens=1 << 30)
    return batch


def attention_of(batch: TextBatch, mask: masks.Mask | None, seed: int = 0) -> AttentionBatch:
    random = torch.Generator().manual_seed(seed)
    rows, length = batch.ids.shape
    query, key, value = (torch.randn(rows, n, length, SIZE, generator=random) for n in (HEADS, 3, 3))
    weight = torch.randn(11, HEADS * SIZE, generator=random)
    return AttentionBatch(AttentionMatrix(2 * query, key, mask=mask), Visibility(batch, mask, HEADS), value, weight)


def values(found: dict[str, Ratio]) -> dict[str, Tensor]:
    """Each measure over the batch: [H]."""
    return {name: ratio.numerator.sum(0) / ratio.denominator.sum(0) for name, ratio in found.items()}


def by_definition(attention: AttentionBatch) -> dict[str, Tensor]:
    """Every pattern measure from the dense matrix, cell by cell where that is clearest."""
    p = attention.matrix.dense().double()
    rows, heads, length, _ = p.shape
    text = attention.texts.valid & ~attention.texts.sinks
    seen = Visibility(attention.texts, attention.visibility.mask, HEADS).uniform.dense()[:, 0] > 0  # [B, L, S]
    index = torch.arange(length)
    sums: dict[str, Tensor] = {}
    norms = []
    weight = attention.out_weight.double().unflatten(1, (HEADS, SIZE))
    for h in range(heads):
        norms.append((attention.value.double()[:, h // 2] @ weight[:, h].T).norm(dim=-1))
    norm = torch.stack(norms, 1)

    def add(name: str, value: Tensor | float) -> None:
        sums[name] = sums.get(name, torch.zeros(heads, dtype=torch.float64)) + value

    for b in range(rows):
        received = torch.zeros(heads, length, dtype=torch.float64)
        queries_per_key = torch.zeros(length, dtype=torch.float64)
        for i in range(length):
            if not text[b, i] or int((seen[b, i] & text[b]).sum()) < 2:
                continue
            a = p[b, :, i]
            kept = a * text[b]
            add("rows", 1.0)
            add("on_text", kept.sum(-1))
            add("entropy", -torch.xlogy(a, a).sum(-1))
            add("possible", math.log(int(seen[b, i].sum())))
            add("confidence", kept.amax(-1))
            add("confidence_raw", a.amax(-1))
            add("distance", (kept * (index - i).abs()).sum(-1))
            add("distance_raw", (a * (index - i).abs()).sum(-1))
            add("text", (a * text[b]).sum(-1))
            add("sink", (a * (attention.texts.sinks & attention.texts.valid)[b]).sum(-1))
            add("first", a[:, 0])
            add("delimiter", (a * attention.texts.delimiters[b]).sum(-1))
            carried = a * norm[b]
            carried = carried / carried.sum(-1, keepdim=True)
            add("norm_sink", (carried * attention.texts.sinks[b]).sum(-1))
            add("norm_first", carried[:, 0])
            add("norm_delimiter", (carried * attention.texts.delimiters[b]).sum(-1))
            for d in range(-8, 9):
                if 0 <= i + d < length:
                    add(f"offset_mass{d:+d}", kept[:, i + d])
                    add(f"offset_mass{d:+d}_raw", a[:, i + d])
                    add(f"offset_hits{d:+d}", (kept.argmax(-1) == i + d).double())
                    if abs(d) < 2:
                        add(f"norm_offset{d:+d}", carried[:, i + d])
            received += a
            queries_per_key += seen[b, i]
        shares = torch.where(text[b], received / queries_per_key.clamp(min=1), 0)
        tenth = math.ceil(0.1 * int(text[b].sum()) - 1e-9)
        add("received_top", shares.sort(-1, descending=True).values[:, :tenth].sum(-1))
        add("received", shares.sum(-1))
    over = {"confidence": "on_text", "distance": "on_text", "entropy_share": "possible", "received_top": "received"}
    over |= {f"offset_mass{d:+d}": "on_text" for d in range(-8, 9)}
    sums["delimiter_raw"], sums["entropy_share"] = sums["delimiter"], sums["entropy"]
    over["delimiter"] = "on_text"
    helpers = {"rows", "on_text", "possible", "received"}
    return {name: value / sums[over.get(name, "rows")] for name, value in sums.items() if name not in helpers}


@pytest.mark.parametrize("kind", ["decoder", "encoder", "window", "alone"])
@pytest.mark.parametrize("blocks", ["whole", "small", "short"])
def test_every_measure_is_its_definition(kind: str, blocks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if blocks == "small":  # some rows, and 128 keys in a block: texts of 300 tokens cross several
        monkeypatch.setattr(tiles, "_BLOCK", 1 << 12)
        monkeypatch.setattr(tiles, "_ROWS", 64)
    lengths = {"whole": [23, 17, 9], "small": [300, 170, 9], "short": [14, 9, 5]}[blocks]
    lengths = lengths[:1] if kind == "alone" else lengths
    batch = batch_of(*lengths, end=kind == "encoder")
    mask = masks.padding(lengths)
    mask = {"decoder": mask & masks.causal(), "encoder": mask, "window": mask & masks.sliding_window(6)}.get(
        kind, masks.causal()
    )
    attention = attention_of(batch, mask)
    found, wanted = values(take(standard(), attention)), by_definition(attention)
    assert set(wanted) == {column.name for column in columns_of(standard())} - {"induction", "duplicate"}
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_distances_are_exact_far_into_a_text() -> None:
    """At position 60,000 float32 has two digits left behind the point."""
    length = 60_000
    query, key = torch.randn(2, 1, 1, length, 3, generator=torch.Generator().manual_seed(0))
    matrix = AttentionMatrix(query, key, mask=masks.sliding_window(4))
    (found,) = matrix.reduce(Distance(torch.ones(1, length, 1, dtype=torch.bool)))
    apart = torch.arange(-4, 5).abs().double()
    torch.testing.assert_close(found[..., 0].double(), matrix.offsets(4).double() @ apart, atol=3e-4, rtol=0)


def test_layers_share_what_their_masks_let_be_seen_and_no_more() -> None:
    """Each layer's mask is an object of its own; what follows from it is computed once for all that are alike."""
    alike = [masks.causal(), masks.causal() & masks.padding([5, 7]), masks.dense(torch.eye(9).bool()), None]
    again = [masks.causal(), masks.causal() & masks.padding([5, 7]), masks.dense(torch.eye(9).bool()), None]
    assert [_rule(mask) for mask in alike] == [_rule(mask) for mask in again]
    others = [masks.sliding_window(4), masks.causal() & masks.padding([5, 6]), masks.dense(torch.ones(9, 9).bool())]
    assert len({_rule(mask) for mask in alike + others}) == 7


def test_padding_and_neighbours_change_nothing() -> None:
    batch = batch_of(23, 17, end=True)
    attention = attention_of(batch, masks.padding([23, 17]))
    alone = batch_of(17, end=True)
    cut = AttentionMatrix(attention.matrix._scores.query[1:, :, :17], attention.matrix._scores.key[1:, :, :17])
    single = AttentionBatch(cut, Visibility(alone, None, HEADS), attention.value[1:, :, :17], attention.out_weight)
    both, one = take(standard(), attention), take(standard(), single)
    for name, ratio in one.items():
        torch.testing.assert_close(both[name].numerator[1:], ratio.numerator, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(both[name].denominator[1:], ratio.denominator, atol=1e-4, rtol=1e-5)


def made(positions: list[list[int]], length: int, strength: float = 30.0) -> AttentionMatrix:
    """A head for each list: query i looks at key positions[head][i], almost alone; −1: evenly at all."""
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
    """The roles of heads made by hand, by the same way as a model's."""
    sums, null = MeasureSums(), MeasureSums()
    count = matrix.shape[1]
    for number in range(6):
        for weights, batch in ((matrix, plain), (repeated, twice)):
            seen = Visibility(batch, masks.causal() if causal else None, count)
            asked = [measure for measure in standard() if measure.reads(batch)]
            given = weights_of([(f"{'repeat:' if batch is twice else ''}{number}", number % 2)])
            for into, attention in ((sums, AttentionBatch(weights, seen)), (null, AttentionBatch(seen.uniform, seen))):
                into.add(take(asked, attention), 0, 1, given)
    found = find_roles(sums, null)
    return [{row.role for row in found if row.head == head} for head in range(count)]


def test_heads_made_by_hand_get_their_role_and_no_other() -> None:
    length, period = 41, 20
    plain = batch_of(length)
    (twice,) = batches([piece(2 * period + 1, end=False, period=period)])
    before = [max(0, i - 1) for i in range(length)]
    own = list(range(length))
    first = [0] * length
    even = [-1] * length
    far = [(i * 7) % (i + 1) for i in range(length)]
    again = [i - period + 1 if i > period else 0 for i in range(length)]
    same = [i - period if i > period else 0 for i in range(length)]
    stops = [max((j for j in range(i) if j % 5 == 4), default=0) for i in range(length)]
    heads = [before, own, first, even, far, stops]
    on_plain = made([*heads, far, far], length)
    on_twice = made([before, own, first, even, far, far, again, same], length)
    found = roles_of(on_plain, plain, on_twice, twice)
    wanted = [{"previous token"}, {"self"}, {"sink"}, {"uniform"}, set(), {"delimiter"}, {"induction"}, {"duplicate"}]
    assert found == wanted


def test_a_head_of_an_encoder_that_looks_at_the_next_token() -> None:
    length = 41
    (twice,) = batches([piece(41, end=False, period=20)])
    key = torch.eye(length).expand(1, 1, -1, -1)
    after = 30 * torch.eye(length)[[min(i + 1, length - 1) for i in range(length)]].expand(1, 1, -1, -1)
    matrix = AttentionMatrix(after, key, scale=1.0)
    assert roles_of(matrix, batch_of(length), matrix, twice, causal=False) == [{"next token"}]


def test_a_head_with_little_weight_on_text_has_no_role_from_it() -> None:
    """It looks at the token before with 4 % of its weight, and at the first one with 96 %."""
    length = 41
    key = torch.eye(length).expand(1, 1, -1, -1)
    query = torch.zeros(1, 1, length, length)
    for i in range(2, length):
        query[0, 0, i, 0], query[0, 0, i, i - 1] = 30.0 + math.log(24), 30.0
    matrix = AttentionMatrix(query, key, mask=masks.causal(), scale=1.0)
    (twice,) = batches([piece(41, end=False, period=20)])
    assert roles_of(matrix, batch_of(length), matrix, twice) == [{"sink"}]


def test_a_head_with_a_learned_sink_has_no_role_from_its_little_weight_on_text() -> None:
    """It looks at the token before with 4 % of its weight; the rest goes to a logit that no token has."""
    length = 41
    key = torch.eye(length).expand(1, 1, -1, -1)
    query = torch.zeros(1, 1, length, length)
    for i in range(2, length):
        query[0, 0, i, i - 1] = 30.0
    for sink, wanted in ((-math.inf, {"previous token"}), (30.0 + math.log(24), set())):
        matrix = AttentionMatrix(query, key, mask=masks.causal(), scale=1.0, sinks=torch.tensor([sink]))
        (twice,) = batches([piece(41, end=False, period=20)])
        assert roles_of(matrix, batch_of(length), matrix, twice) == [wanted]
        seen = Visibility(batch_of(length), masks.causal(), 1)
        found = values(take(standard(), AttentionBatch(matrix, seen)))
        assert float(found["text"]) == pytest.approx(0.04 if sink > 0 else 1, abs=1e-5)


def test_evidence_says_how_many_rows_could_choose() -> None:
    """38 of 41 rows see two text keys or more; of repeats it is the 20 rows of the second copy. Three texts report."""
    length, period = 41, 20
    (twice,) = batches([piece(length, end=False, period=period)])
    before = made([[max(0, i - 1) for i in range(length)]], length)
    again = made([[i - period + 1 if i > period else 0 for i in range(length)]], length)
    sums, null = MeasureSums(), MeasureSums()
    for number in range(6):
        for weights, batch in ((before, batch_of(length)), (again, twice)):
            seen = Visibility(batch, masks.causal(), 1)
            asked = [measure for measure in standard() if measure.reads(batch)]
            given = weights_of([(f"{number}", number % 2)])
            for into, attention in ((sums, AttentionBatch(weights, seen)), (null, AttentionBatch(seen.uniform, seen))):
                into.add(take(asked, attention), 0, 1, given)
    assert {row.role: row.examples for row in find_roles(sums, null)} == {"previous token": 3 * 39, "induction": 3 * 20}


def test_a_head_is_reported_on_the_half_that_did_not_pick_it() -> None:
    """Strong where it was picked, weak elsewhere: no role; strong on both: the score is the other half's."""
    sums, null = MeasureSums(), MeasureSums()
    for number in range(8):
        half = number % 2
        found = torch.tensor([[0.9, 0.9 - 0.2 * half]]) if half == 0 else torch.tensor([[0.1, 0.7]])
        given = weights_of([(f"doc {number}", half)])
        sums.add({"first": Ratio(found, torch.ones(1, 2))}, 0, 1, given)
        null.add({"first": Ratio(torch.full((1, 1), 0.1), torch.ones(1, 1))}, 0, 1, given[:2])
    (row,) = find_roles(sums, null, halves={f"doc {number}": number % 2 for number in range(8)})
    assert (row.role, row.head, row.documents) == ("sink", 1, 4)
    assert (row.picked, row.score, row.null) == (pytest.approx(0.9), pytest.approx(0.7), pytest.approx(0.1))


def test_null_values_are_those_of_an_even_head() -> None:
    batch = batch_of(30)
    seen = Visibility(batch, masks.causal(), HEADS)
    found = values(take(standard(), AttentionBatch(seen.uniform, seen)))
    visible = torch.arange(2, 30, dtype=torch.float64) + 1  # row 1 sees one text key only and does not count
    torch.testing.assert_close(found["entropy"], visible.log().mean()[None], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["entropy_share"], torch.ones(1).double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["first"], (1 / visible).mean()[None], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found["norm_first"], found["first"], atol=1e-6, rtol=1e-5)


def test_sums_add_up_in_any_order_and_intervals_hold_the_value() -> None:
    whole, parts = MeasureSums(), [MeasureSums(), MeasureSums()]
    for number in range(12):
        numerator = torch.full((1, 2), 1.0 + number % 5)
        weights = weights_of([(f"doc {number}", number % 2)])
        for into in (whole, parts[number % 3 == 0]):
            into.add({"x": Ratio(numerator, torch.full((1, 2), 4.0))}, 1, 3, weights)
            into.documents[f"doc {number}"] = 4
    merged = MeasureSums()
    for part in reversed(parts):
        merged.merge(part)
    torch.testing.assert_close(merged.values["x"], whole.values["x"])
    assert merged.documents == whole.documents
    value = whole.value("x", 1)
    low, high = whole.interval("x")
    assert value[1, 0] == pytest.approx(sum(1 + n % 5 for n in range(1, 12, 2)) / 24)
    assert value[0].isnan().all()
    assert low[1, 0] < value[1, 0] < high[1, 0]
    assert document_weights("a", 0)[:2].tolist() == [1, 0]
    assert not document_weights("a", 0)[2:].any()
    assert document_weights("a", 1)[2:].mean() == pytest.approx(1, abs=0.3)
    other = MeasureSums({"x": torch.zeros(2, 2, 5, 5)})
    with pytest.raises(ValueError, match=r"x has sums \(102, 2, 3, 2\) here and \(2, 2, 5, 5\) there"):
        whole.merge(other)
    with pytest.raises(ValueError, match="no replicates are kept for 'x'"):
        other.interval("x")


class FarMass(Reduction):
    def start(self, shape: tuple[int, int, int, int], like: Tensor) -> Tensor:
        return like.new_zeros(shape[:3])

    def update(self, state: Tensor, block: Block) -> None:
        state[block.at] += (block.weights * (block.q_idx - block.kv_idx > 4)).sum(-1)


def test_sums_of_several_layers_at_once() -> None:
    """Layers that have the same sums may be added together."""
    ratio = Ratio(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2, 2))
    at_once, one_by_one = MeasureSums(), MeasureSums()
    at_once.add({"x": ratio}, [0, 2], 3, torch.ones(2, 2, dtype=torch.float64))
    for layer in (0, 2):
        one_by_one.add({"x": ratio}, layer, 3, torch.ones(2, 2, dtype=torch.float64))
    assert torch.equal(at_once.values["x"], one_by_one.values["x"])
    assert at_once.value("x")[2].tolist() == [2.0, 3.0]
    assert at_once.value("x")[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.float32, torch.float64])
def test_rows_are_counted_exactly_whatever_a_measure_gives(dtype: torch.dtype) -> None:
    attention = attention_of(batch_of(301), masks.causal())
    ones = torch.ones(attention.matrix.shape[:3], dtype=dtype)
    found = attention.over_rows(ones)
    assert found.dtype == torch.float64
    assert found.tolist() == [[299.0] * HEADS]  # which bfloat16 does not have


class Far(Measure):
    columns = (Column("far", "weight on keys more than 4 tokens back"),)

    def reductions(self, batch: AttentionBatch) -> dict[str, Reduction]:
        return {"far": FarMass()}

    def sums(self, batch: AttentionBatch) -> dict[str, Ratio]:
        return {"far": Ratio(batch.over_rows(batch.results["far"]), batch.row_count)}


def test_a_measure_of_ones_own() -> None:
    attention = attention_of(batch_of(23), masks.causal())
    p, index = attention.matrix.dense().double(), torch.arange(23)
    wanted = (p * (index[:, None] - index > 4)).sum(-1)[:, :, 2:].mean((0, 2))
    torch.testing.assert_close(values(take([*standard(), Far()], attention))["far"], wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="two measures have a column 'far'"):
        columns_of([Far(), Far()])


def test_unknown_projections_give_no_norms_rather_than_wrong_ones() -> None:
    attention = attention_of(batch_of(23), masks.causal())
    found = values(take(standard(), AttentionBatch(attention.matrix, attention.visibility, attention.value, None)))
    assert found["norm_sink"].isnan().all()
    assert not found["sink"].isnan().any()


def test_every_role_rests_on_a_column_with_intervals() -> None:
    evidence = {column.name for column in columns_of(standard()) if column.evidence}
    assert {role.column for role in ROLES} <= evidence
    assert all(role.source for role in ROLES)
