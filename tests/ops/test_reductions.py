"""Reductions: in one pass and alone, online and buffered, over extreme scores, blocks and masks; your own."""

import copy
import math
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor

from headscope import AttentionMatrix, MultiHeadAttention, masks, record, reductions
from headscope.ops.kernels import tiles
from headscope.ops.reductions import Block, Entropy, Groups, Mass, Max, Offsets, Pool, Received, Reduction, TopK
from tests import reference
from tests.ops.cases import (
    SIZES,
    VARIANTS,
    Variant,
    assert_is,
    assert_largest,
    fresh,
    make,
)
from tests.options import MASKS, one_thread, unchecked  # noqa: F401
from tests.reference import FINFO_MIN, operands


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_online_reductions_equal_their_definitions(variant: Variant, tiny: None) -> None:
    """Each reduction alone on a matrix without known rows; then all at once."""
    case = make(variant, (2, 6, 5, 300))
    ids = torch.arange(300) * 5 // 3 % 4 - 1
    chosen = [reductions.Entropy(), Mass(), reductions.Max(), reductions.TopK(3), reductions.Offsets(3)]
    chosen.append(reductions.Groups(ids))
    with unchecked():
        for answers in ([fresh(case).reduce(reduction)[0] for reduction in chosen], fresh(case).reduce(*chosen)):
            entropy, mass, largest, best, offsets, groups = answers
            assert_is(entropy, reference.entropy(case.p))
            assert_is(mass, case.p.sum(-1))
            assert_largest(reductions.WeightsAt(*(x.unsqueeze(-1) for x in largest)), case, 1)
            assert_largest(best, case, 3)
            assert_is(offsets, reference.offsets(case.p, 3))
            assert_is(groups, reference.groups(case.p, ids, 3))
        matrix = fresh(case)
        matrix.entropy()
        assert_is(matrix.received(), reference.received(case.p))  # with the normalizer of the pass before
        assert_is(matrix.logsumexp, case.logsumexp)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_buffered_reductions_equal_their_definitions(variant: Variant, tiny: None) -> None:
    case = make(variant, (2, 6, 5, 300))
    with unchecked():
        received, entropy = fresh(case).reduce(reductions.Received(), reductions.Entropy())
        assert_is(received, reference.received(case.p))
        assert_is(entropy, reference.entropy(case.p))


def test_sink_takes_all_of_a_row_of_finfo_min() -> None:
    query, key, _ = operands()
    sinks = torch.linspace(-1, 1, 6)
    for reduction in (reductions.Entropy(), reductions.Received()):
        matrix = AttentionMatrix(query, key, bias=torch.full((7, 11), FINFO_MIN), sinks=sinks)
        assert not matrix.reduce(reduction)[0].any()
        assert_is(matrix.logsumexp, sinks.double().view(1, 6, 1).expand(2, 6, 7))


@pytest.mark.parametrize("step", [0.05, 1.0, 30.0, -1.0])
def test_reduce_recenters_scores_that_grow_from_block_to_block(step: float, tiny: None) -> None:
    """Scores exceed what their blocks were centred on by up to 9,000 nats: nothing overflows, nothing is lost."""
    query = torch.tensor([1.0, 0.5, 2.0]).view(1, 1, 3, 1).double()
    key = (torch.arange(300) * step).view(1, 1, 300, 1).double()
    p = reference.weights(query, key, scale=1.0)
    chosen = reductions.Entropy(), Mass(), reductions.Max()
    entropy, mass, largest = AttentionMatrix(query, key, scale=1.0).reduce(*chosen)
    assert_is(entropy, reference.entropy(p))
    assert_is(mass, p.sum(-1))
    assert_is(largest.values, p.amax(-1))


@pytest.mark.parametrize("also", [reductions.Max(), reductions.Received()])
@pytest.mark.parametrize("shift", [0.0, 25.0, 60.0, 200.0, -25.0, -60.0, -200.0, 1e4])
def test_reduce_restarts_centred_without_counting_a_block_twice(shift: float, also: Reduction, tiny: None) -> None:
    """What was counted before a tile's sums turned out too large or too small is not counted twice."""
    query, key, _ = operands()
    rows = torch.zeros(7, 1)
    rows[5:] = shift  # the last rows: others are done before
    query = torch.cat([query, rows.expand(2, 6, 7, 1)], -1)
    key = torch.cat([key, torch.ones_like(key[..., :1])], -1)
    visible = torch.ones(2, 1, 7, 11, dtype=torch.bool)
    visible[1, :, 2] = False
    p = reference.weights(query, key, visible=visible, scale=1.0)
    entropy, other = AttentionMatrix(query, key, mask=visible, scale=1.0).reduce(Entropy(), also)
    close = {"atol": 2e-3 if shift > 1e3 else 1e-4, "rtol": 0}
    torch.testing.assert_close(entropy.double(), reference.entropy(p), **close)
    expected = p.amax(-1) if isinstance(also, reductions.Max) else p.sum(-2)
    torch.testing.assert_close(
        (other.values if isinstance(also, reductions.Max) else other).double(), expected, **close
    )


def test_online_reduction_must_have_rescale() -> None:
    class Forgot(Mass):
        rescale = reductions.Reduction.rescale

    query, key, _ = operands()
    with pytest.raises(NotImplementedError, match=r"Forgot has online = True, but no rescale\(\)"):
        AttentionMatrix(query, key).reduce(Forgot())


def test_rows_of_finfo_min_are_uniform() -> None:
    query, key, value = operands()
    bias = torch.zeros(7, 11)
    bias[2] = FINFO_MIN
    matrix = AttentionMatrix(query, key, bias=bias)
    assert_is(matrix @ value, reference.attend(reference.weights(query, key, bias=bias), value))
    assert_is(matrix.entropy()[:, :, 2], torch.full((2, 6), math.log(11), dtype=torch.float64))
    assert_is(matrix[:, :, 2], torch.full((2, 6, 11), 1 / 11, dtype=torch.float64))
    assert_is(matrix.max().values[:, :, 2], torch.full((2, 6), 1 / 11, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("how", ["fresh", "known", "with gradients"])
def test_entropy_is_never_below_zero(how: str, dtype: torch.dtype) -> None:
    query, key, value = operands(queries=200, keys=300, dtype=dtype)
    matrix = AttentionMatrix(query.mul(30).requires_grad_(how == "with gradients"), key)
    if how == "known":
        matrix @ value
    entropy = matrix.entropy().detach()
    assert float(entropy.min()) >= 0
    assert float(entropy.min()) < 1e-6
    assert float(entropy.max()) > 0.1


def test_rows_with_very_low_scores_ignore_earlier_hidden_keys(tiny: None) -> None:
    query, key = torch.full((1, 1, 4, 5), 20.0), torch.full((1, 1, 300, 5), -20.0)
    visible = torch.ones(4, 300, dtype=torch.bool)
    visible[1, :200] = False
    matrix = AttentionMatrix(query, key, mask=visible)
    counts = torch.tensor([300.0, 100, 300, 300], dtype=torch.float64)
    assert_is(copy.copy(matrix).received()[0, 0, :200], torch.full((200,), 3 / 300, dtype=torch.float64))
    assert_is(matrix.entropy()[0, 0], counts.log())
    assert_is(matrix.dense()[0, 0, 1], visible[1].double() / 100)


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_topk_finds_the_largest_at_the_edges_of_blocks(k: int) -> None:
    positions = [0, 31, 32, 63, 64, 671, 672, 699, 350]
    for first in range(len(positions)):
        largest_keys = [positions[(first + n * 4) % len(positions)] for n in range(k)]
        key = torch.zeros(1, 1, 700, 1)
        key[0, 0, largest_keys, 0] = torch.arange(k, 0, -1.0)
        values, indices = AttentionMatrix(torch.ones(1, 1, 2, 1), key).topk(k)
        assert indices[0, 0, 1].tolist() == largest_keys
        assert_is(values[0, 0, 0], torch.softmax(key.double().flatten(), 0)[largest_keys])
        assert int(AttentionMatrix(torch.ones(1, 1, 2, 1), key).max().indices[0, 0, 0]) == largest_keys[0]


@pytest.mark.parametrize("width", [100, 128, 700, 704, 1500])
@pytest.mark.parametrize("known", [False, True])
def test_max_finds_the_largest_in_every_chunk(width: int, known: bool) -> None:
    """By chunks of 32 if the width is a multiple of 32, else by a plain maximum."""
    positions = [n for n in (0, 31, 32, 63, 64, 99, 127, 671, 699, 703, 1499) if n < width]
    key = torch.zeros(1, 1, width, 1)
    query = torch.ones(1, 1, 3, 1) * torch.tensor([1.0, 2.0, 3.0])[:, None]
    for place in positions:
        key.zero_()[0, 0, place, 0] = 2.0
        matrix = AttentionMatrix(query, key)
        if known:
            matrix @ torch.ones(width, 1)
        values, indices = matrix.max()
        assert indices[0, 0].tolist() == [place] * 3
        expected = torch.softmax(query.double() @ key.double().transpose(-1, -2), -1)[0, 0, :, place]
        assert_is(values[0, 0], expected)


def test_entropy_of_large_scores_is_exact() -> None:
    """The formula lse − Σ P s would be the difference of two numbers near 10⁵."""
    random = torch.Generator().manual_seed(0)
    query, key = torch.full((1, 1, 50, 1), 1e3), 100 + 1e-3 * torch.randn(1, 1, 50, 1, generator=random)
    matrix = AttentionMatrix(query, key)
    scores = query.double() @ key.double().transpose(-1, -2)
    weights = scores.softmax(-1)
    torch.testing.assert_close(matrix.entropy().double(), -torch.xlogy(weights, weights).sum(-1), atol=5e-3, rtol=0)
    together = AttentionMatrix(query, key).reduce(Entropy(), Mass())[
        0
    ]  # its sums may round as the memory's alignment has it
    torch.testing.assert_close(matrix.entropy(), together, atol=1e-5, rtol=0)


@pytest.mark.parametrize("how", ["alone", "waiting", "rows known", "sinks"])
def test_rows_ignore_hidden_scores_far_above_the_visible(how: str) -> None:
    query, key, value = operands(queries=70, keys=70)
    key[:, :, 40:] *= 1e4
    visible = torch.ones(70, 70, dtype=torch.bool).tril()
    visible[:, 40:] = False
    sinks = torch.linspace(-1, 1, 6) if how == "sinks" else None
    matrix = AttentionMatrix(query, key, mask=visible, sinks=sinks)
    if how == "rows known":
        matrix @ value
    chosen: list[Reduction] = [Entropy(), Max(), Received()] + [TopK(2)] * (how == "waiting")
    result = matrix.reduce(*chosen) if how != "alone" else [AttentionMatrix(query, key, mask=visible).entropy()]
    scores = query.double() @ key.double().repeat_interleave(2, 1).transpose(-1, -2) / 5**0.5
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, 6, 1, 1).expand(2, 6, 70, 1)], -1)
    weights = scores.softmax(-1)[..., :70]
    assert_is(result[0], -torch.xlogy(weights, weights).sum(-1))
    if how != "alone":
        assert_is(result[1].values, weights.amax(-1))
        assert_is(result[2], weights.sum(-2))


def test_topk_finds_all_ties() -> None:
    key = torch.zeros(1, 1, 700, 1)
    key[0, 0, [40, 45, 300, 301, 690], 0] = 2.0
    indices = AttentionMatrix(torch.ones(1, 1, 2, 1), key).topk(5).indices
    assert sorted(indices[0, 0, 0].tolist()) == [40, 45, 300, 301, 690]


@pytest.mark.parametrize("known", [False, True])
def test_topk_returns_minus_one_past_the_visible_keys(known: bool) -> None:
    query, key, value = operands(queries=700, keys=700)
    matrix = AttentionMatrix(query, key, mask=masks.causal())
    if known:
        matrix @ value
    values, indices = matrix.topk(5)
    for row in range(7):
        count = min(5, row + 1)
        assert bool((indices[:, :, row, :count] >= 0).all())
        assert bool((indices[:, :, row, count:] == -1).all())
        assert bool((values[:, :, row, count:] == 0).all())
    empty = AttentionMatrix(query, key, mask=masks.prefix(0)).max()
    assert bool((empty.values == 0).all())
    assert bool((empty.indices == -1).all())


def test_reductions_give_the_same_together_and_alone(tiny: None) -> None:
    case = make(Variant("causal"), (2, 6, 5, 300))
    ids = torch.arange(300) // 7
    chosen: list[Reduction] = [
        Entropy(), Max(), TopK(4), Received(), Received(mean=True), Offsets(2), Groups(ids), Pool(2, ids, "max"), Mass()
    ]  # fmt: skip
    for answer, reduction in zip(case.matrix.reduce(*chosen), chosen, strict=True):
        alone = case.matrix.reduce(reduction)[0]
        for one, other in zip(
            torch.utils._pytree.tree_leaves(answer), torch.utils._pytree.tree_leaves(alone), strict=True
        ):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


class Nested(reductions.Reduction):
    """Sums rows, and reduces another matrix meanwhile."""

    def __init__(self, other: AttentionMatrix) -> None:
        self.other, self.answers = other, list[Tensor]()

    def start(self, shape: tuple[int, int, int, int], like: Tensor) -> Tensor:
        return like.new_zeros(shape[:3])

    def update(self, state: Tensor, block: reductions.Block) -> None:
        before = block.weights.clone(), block.centered.clone()
        self.answers.append(fresh_entropy(self.other))
        assert torch.equal(block.weights, before[0])
        assert torch.equal(block.centered, before[1])
        state[block.at].add_(block.weights.sum(-1))


def fresh_entropy(matrix: AttentionMatrix) -> Tensor:
    return AttentionMatrix(matrix.operands.query, matrix.operands.key).entropy()


def test_reduction_may_reduce_another_matrix_inside_update() -> None:
    """Buffers are reused from pass to pass, but never by two passes at a time."""
    case, other = make(Variant("causal")), make(Variant())
    expected = fresh_entropy(other.matrix)
    reduction = Nested(other.matrix)
    assert_is(fresh(case).reduce(reduction)[0], case.p.sum(-1))
    assert reduction.answers
    for answer in reduction.answers:
        assert torch.equal(answer, expected)


def test_buffers_are_reused_in_and_out_of_inference_mode() -> None:
    """A tensor made in that mode could not be written into outside of it."""
    case = make(Variant("causal"))
    with torch.inference_mode():
        inside = fresh(case).entropy()
    assert torch.equal(inside, fresh(case).entropy())


def test_reduction_may_be_used_for_many_matrices() -> None:
    reduction = TopK(2)
    first, second = make(Variant()), make(Variant("causal"))
    assert_largest(first.matrix.reduce(reduction)[0], first, 2)
    assert_largest(second.matrix.reduce(reduction)[0], second, 2)


@pytest.mark.parametrize("sizes", [SIZES, (2, 6, 5, 300)], ids=str)
def test_reduction_of_the_docstring_works(sizes: tuple[int, int, int, int], tiny: None) -> None:
    assert reductions.__doc__ is not None
    source = textwrap.dedent(reductions.__doc__.split("::", 1)[1])
    names: dict[str, Any] = {"Reduction": Reduction}
    exec(source, names)
    case = make(Variant("causal"), sizes)
    far = reference.visible_where(lambda b, h, i, j: i - j > 2, *sizes)
    assert_is(case.matrix.reduce(names["FarMass"](2))[0], (case.p * far).sum(-1))


class Cells(Reduction):
    """How often each cell is read."""

    def start(self, shape: tuple[int, int, int, int], like: Tensor) -> Tensor:
        return like.new_zeros(shape)

    def update(self, state: Tensor, block: Block) -> None:
        state[block.batch, block.heads, block.rows, block.keys] += 1
        rows = torch.arange(state.shape[2])[block.rows] + state.shape[3] - state.shape[2]
        assert block.q_idx.flatten().equal(rows)
        assert block.kv_idx.equal(torch.arange(state.shape[3])[block.keys])
        hidden = block.weights[block.log_weights < -1e29]
        assert not bool(hidden.any())


@pytest.mark.parametrize("mask_name", MASKS)
def test_reduce_reads_every_visible_cell_once(mask_name: str, tiny: None) -> None:
    case = make(Variant(mask_name), (2, 6, 5, 300))
    with unchecked():
        cells = case.matrix.reduce(Cells())[0]
    assert float(cells.max()) <= 1
    assert bool((cells[case.visible] == 1).all())


class CellCount(Reduction):
    """How many cells of the matrix are read."""

    def start(self, shape: tuple[int, int, int, int], like: Tensor) -> list[int]:
        return []

    def update(self, state: list[int], block: Block) -> None:
        state.append(block.weights.numel())

    def finish(self, state: list[int]) -> int:
        return sum(state)


def test_reduce_skips_blocks_that_the_mask_hides() -> None:
    query, key = torch.randn(1, 2, 2048, 8), torch.randn(1, 1, 2048, 8)
    masks_and_shares = ((None, 1.0, 1.0), (masks.causal(), 0.5, 0.6), (masks.sliding_window(64), 65 / 2048, 0.1))
    for mask, least, most in masks_and_shares:
        (cells,) = AttentionMatrix(query, key, mask=mask).reduce(CellCount())
        assert least <= cells / (2 * 2048**2) <= most


@pytest.mark.parametrize("shared", [True, False])
def test_groups_too_many_for_an_indicator_are_summed_one_by_one(
    shared: bool, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headscope.ops.reductions.groups._INDICATOR", 8)
    case = make(VARIANTS[0], (2, 6, 5, 300))
    drawn = torch.Generator().manual_seed(4)
    ids = torch.randint(-1, 50, (1 if shared else 2, 300), generator=drawn)
    rows = torch.randint(-1, 4, (5,), generator=drawn)
    with unchecked():
        assert_is(fresh(case).reduce(Groups(ids, 60))[0], reference.groups(case.p, ids, 60))
        for how in ("mean", "mass"):
            expected = reference.pool(case.p, rows, ids, how)
            assert_is(fresh(case).pool(rows, ids, how), expected)


@pytest.mark.parametrize(
    ("reduction", "message"),
    [(Entropy, r"pass an object, Entropy\(…\)"), ("entropy", "'entropy' is not a reduction")],
)
def test_reduce_refuses_what_is_not_a_reduction(reduction: Any, message: str) -> None:
    query = torch.randn(1, 2, 3, 4)
    with unchecked(), pytest.raises(TypeError, match=message):
        AttentionMatrix(query, query).reduce(reduction)
    with unchecked(), pytest.raises(TypeError, match=message), record(torch.nn.Identity(), reduce=reduction):
        pass


def test_reduce_gives_results_under_the_names_of_a_mapping() -> None:
    query = torch.randn(1, 2, 3, 4)
    P = AttentionMatrix(query, query, mask=masks.causal())
    named = P.reduce({"e": Entropy(), "best": Max()})
    assert list(named) == ["e", "best"]
    torch.testing.assert_close(named["e"], P.entropy())
    assert torch.equal(named["best"].indices, P.max().indices)
    with record(layer := MultiHeadAttention(8, 2)) as recording:
        layer(torch.randn(1, 3, 8))
    with record(layer, reduce={"e": Entropy()}) as answers:
        layer(torch.randn(1, 3, 8))
    assert list(answers.answers[0].values) == ["e"]
    assert answers.answers[0].values["e"].shape == recording[0].entropy().shape
    wrong: Any = {"e": "entropy"}
    with unchecked(), pytest.raises(TypeError, match="'entropy' is not a reduction"):
        P.reduce(wrong)
    with unchecked(), pytest.raises(TypeError, match="'entropy' is not a reduction"), record(layer, reduce=wrong):
        pass
    with unchecked(), pytest.raises(TypeError, match="reductions by name go alone"):
        P.reduce(Entropy(), wrong)
    with pytest.raises(ValueError, match="got no reductions"):
        P.reduce({})


def test_mask_cells_are_shared_only_between_equal_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mask cells are reused for other heads only if the mask is the same for all of them."""
    monkeypatch.setattr(tiles, "_BLOCK", 1 << 14)  # one head at a time
    random = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 4, 100, 8, generator=random), torch.randn(1, 4, 100, 8, generator=random)
    visible = torch.rand(1, 4, 100, 100, generator=random) < 0.5
    (mass,) = AttentionMatrix(query, key, mask=visible).reduce(Groups(torch.arange(100) // 10))
    expected = (query @ key.transpose(-1, -2) / 8**0.5).masked_fill(~visible, -torch.inf).softmax(-1)
    assert_is(mass, expected.unflatten(-1, (10, 10)).sum(-1).double())


@pytest.mark.parametrize("queries", [20, 140])
def test_offsets_are_right_in_blocks_whose_keys_begin_after_the_rows(
    queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "_BLOCK", 1)  # blocks of 128 keys: the band of some rows lies in two of them
    monkeypatch.setattr(tiles, "_SMALL_BLOCK", 1)
    matrix = AttentionMatrix(torch.randn(1, 2, queries, 5), torch.randn(1, 2, 140, 5))
    assert_is(matrix.offsets(3), reference.offsets(matrix.dense().double(), 3))
