"""AttentionMatrix: every answer against its definition, over masks, biases, softcap, sinks, blocks, paths."""

import copy
import math
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from headscope import AttentionMatrix, masks, record, reductions
from headscope.ops.kernels import differentiable, fused, indexing, tiles
from headscope.ops.masks import Mask
from headscope.ops.reductions import Block, Entropy, Groups, Mass, Max, Offsets, Pool, Received, Reduction, TopK
from tests import reference
from tests.options import BIASES, MASKS, masked, one_thread, unchecked  # noqa: F401
from tests.reference import FINFO_MIN, operands

SIZES = (2, 6, 7, 11)


class Variant(NamedTuple):
    """What a matrix may have besides query and key."""

    mask: str = "none"
    bias: str = "none"
    softcap: float | None = None
    sinks: bool = False
    scale: float | None = None

    def __str__(self) -> str:
        given = {name: value for name, value in self._asdict().items() if value not in ("none", None, False)}
        return ", ".join(f"{name} {value}" for name, value in given.items()) or "plain"


VARIANTS = [
    *(Variant(mask) for mask in MASKS),
    *(Variant("none", bias) for bias in BIASES if bias != "none"),
    *(Variant("causal", bias) for bias in BIASES if bias != "none"),
    Variant(softcap=0.8),
    Variant(sinks=True),
    Variant(scale=-1.3),
    Variant("dense", softcap=0.8, sinks=True, scale=2.5),
    Variant("padding", "[B, 1, L, S]", softcap=1.5, sinks=True),
    Variant("nothing", "finfo.min", sinks=True),
    Variant("window", "-inf", softcap=3.0),
]


class Case(NamedTuple):
    """A matrix, a value for it, and its true weights."""

    matrix: AttentionMatrix
    value: Tensor
    p: Tensor
    visible: Tensor
    logsumexp: Tensor
    nonzero: Tensor  # cells whose weight is not vanishing


def make(
    variant: Variant, sizes: tuple[int, int, int, int] = SIZES, shared: int = 2, dtype: torch.dtype = torch.float32
) -> Case:
    batch, heads, queries, keys = sizes
    query, key, value = operands(batch, heads // shared, shared, queries, keys, dtype=dtype)
    mask, visible = masked(variant.mask, sizes)
    return describe(variant, query, key, value, mask, visible)


def describe(
    variant: Variant, query: Tensor, key: Tensor, value: Tensor, mask: Mask | Tensor | None, visible: Tensor
) -> Case:
    sizes = (*query.shape[:3], key.shape[2])
    bias = BIASES[variant.bias](sizes)
    sinks = torch.randn(sizes[1]) if variant.sinks else None
    common = {"bias": bias, "scale": variant.scale, "softcap": variant.softcap}
    matrix = AttentionMatrix(query, key, mask=mask, sinks=sinks, **common)
    s = reference.scores(query, key, visible=visible, **common)
    lse = reference.logsumexp(s, sinks)
    p = reference.weights(query, key, visible=visible, sinks=sinks, **common)
    return Case(matrix, value, p, visible, lse, (s - lse.unsqueeze(-1)).nan_to_num(nan=-torch.inf) > -1e29)


def assert_is(result: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert result.shape == expected.shape
    torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=tolerance)


def assert_largest(result: reductions.WeightsAt, case: Case, k: int) -> None:
    """Ties may come in any order: values are right, and lie where the indices say."""
    values, indices = result
    expected, positions = reference.topk(case.p, case.nonzero, k)
    assert_is(values, expected)
    assert (indices >= 0).equal(positions >= 0)
    assert_is(values, case.p.gather(-1, indices.clamp(min=0)) * (indices >= 0))
    ordered = indices.sort(-1).values
    assert not bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any())


def assert_all_answers(case: Case) -> None:
    """Every answer, without the shape checks of tests, which take most of the time."""
    with unchecked():
        assert_all_checked(case)


def assert_all_checked(case: Case) -> None:
    """Every answer of a matrix without gradients."""
    matrix, p = case.matrix, case.p
    batch, _, queries, keys = p.shape
    ids = torch.arange(keys) * 5 // 3 % 4 - 1
    by_row = torch.stack([(ids + b + 1) % 4 - 1 for b in range(batch)])
    rows = torch.arange(queries) // 2 - int(queries > 4)
    assert_is(matrix.entropy(), reference.entropy(p))
    assert_largest(matrix.topk(min(3, keys)), case, min(3, keys))
    largest = matrix.max()
    assert_largest(reductions.WeightsAt(*(x.unsqueeze(-1) for x in largest)), case, 1)
    assert_is(matrix.received(), reference.received(p))
    assert_is(matrix.received(mean=True), reference.received(p, case.visible))
    assert_is(matrix.offsets(3), reference.offsets(p, 3))
    assert_is(matrix.groups(ids), reference.groups(p, ids, int(ids.max()) + 1))
    assert_is(matrix.groups(by_row), reference.groups(p, by_row, int(by_row.max()) + 1))
    assert_is(matrix.reduce(Mass())[0], p.sum(-1))
    for how in ("mean", "max", "mass"):
        assert_is(matrix.pool(rows, by_row, how), reference.pool(p, rows, by_row, how))
        bins = reference.bins(3, queries), reference.bins(4, keys)
        assert_is(matrix.pool(3, 4, how), reference.pool(p, *bins, how))
    x = torch.randn(*p.shape[:3], 2)
    assert_is(matrix.T @ x, p.transpose(-1, -2) @ x.double())
    assert_is(matrix.dense(), p)
    assert_is(matrix[:, -1, -2:, ::3], p[:, -1, -2:, ::3])
    assert_is(matrix.logsumexp, case.logsumexp)
    picked = torch.tensor([queries - 1, 0])
    sums = case.logsumexp[-1][:, picked].unsqueeze(-1)
    with torch.autocast("cpu", enabled=False):
        row_weights = (matrix.operands.rows(batch - 1, picked) - sums).exp()
    assert_is(row_weights.where(sums > -1e29, 0), p[-1][:, picked].where(sums > -1e29, 0))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a row or two, blocks of 128 keys, parts of few cells: every loop runs several times."""
    monkeypatch.setattr(tiles, "_BLOCK", 1)
    monkeypatch.setattr(tiles, "_SMALL_BLOCK", 1)
    monkeypatch.setattr(tiles, "_TILE", 2 * 2 * 300)
    monkeypatch.setattr(tiles, "_ROW_MULTIPLE", 1)
    monkeypatch.setattr(tiles, "_ROWS", 2 * 2)
    monkeypatch.setattr(differentiable, "_AUTOGRAD", 2 * 6 * 300 * 2)
    monkeypatch.setattr(fused, "_ROWS", 3)
    monkeypatch.setattr(indexing, "_CELLS", 2 * 6 * 11 * 3)
    monkeypatch.setattr(indexing, "_POINTS", 5)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_matrix_answers_equal_their_definitions(variant: Variant) -> None:
    case = make(variant)
    assert_all_checked(case)
    assert_is(case.matrix @ case.value, reference.attend(case.p, case.value))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_matrix_answers_equal_their_definitions_over_many_tiles_and_blocks(variant: Variant, tiny: None) -> None:
    case = make(variant, (2, 6, 5, 300))
    with unchecked():
        assert_all_answers(case)
        assert_is(case.matrix @ case.value, reference.attend(case.p, case.value))


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


def fresh(case: Case) -> AttentionMatrix:
    """The same matrix, before its rows are normalized."""
    return copy.copy(case.matrix)


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


@pytest.mark.parametrize("mask_name", MASKS)
def test_answers_are_the_same_with_the_logsumexp_of_the_fused_kernel(mask_name: str) -> None:
    case = make(Variant(mask_name))
    assert case.matrix._normalizer is None
    assert_is(case.matrix @ case.value, reference.attend(case.p, case.value))
    assert case.matrix._normalizer is not None
    assert_all_answers(case)


@pytest.mark.parametrize("mask_name", ["none", "causal", "dense"])
def test_answers_are_the_same_without_the_private_op_of_torch(mask_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_flash_cpu", None)
    case = make(Variant(mask_name))
    assert_is(case.matrix @ case.value, reference.attend(case.p, case.value))
    assert case.matrix._normalizer is None
    assert_all_answers(case)


@pytest.mark.parametrize("bias_name", ["-inf", "finfo.min"])
def test_logsumexp_of_the_fused_kernel_is_not_used_with_a_bias(bias_name: str) -> None:
    case = make(Variant("causal", bias_name))
    assert_is(case.matrix @ case.value, reference.attend(case.p, case.value))
    assert_all_answers(case)


def test_rows_of_finfo_min_are_uniform() -> None:
    query, key, value = operands()
    bias = torch.zeros(7, 11)
    bias[2] = FINFO_MIN
    matrix = AttentionMatrix(query, key, bias=bias)
    assert_is(matrix @ value, reference.attend(reference.weights(query, key, bias=bias), value))
    assert_is(matrix.entropy()[:, :, 2], torch.full((2, 6), math.log(11), dtype=torch.float64))
    assert_is(matrix[:, :, 2], torch.full((2, 6, 11), 1 / 11, dtype=torch.float64))
    assert_is(matrix.max().values[:, :, 2], torch.full((2, 6), 1 / 11, dtype=torch.float64))


@pytest.mark.parametrize("after_product", [False, True])
@pytest.mark.parametrize("mask_name", ["none", "causal", "padding"])
def test_matrix_answers_equal_their_definitions_at_700_keys(mask_name: str, after_product: bool) -> None:
    query, key, value = operands(2, 2, 2, 300, 700, 64, 64)
    i, j = torch.arange(400, 700)[:, None], torch.arange(700)
    lengths = torch.tensor([700, 411])
    mask, visible = {
        "none": (None, torch.ones(300, 700, dtype=torch.bool)),
        "causal": (masks.causal(), j <= i),
        "padding": (masks.padding(lengths), (j < lengths[:, None, None])[:, None]),
    }[mask_name]
    case = describe(Variant(mask_name), query, key, value, mask, visible)
    if after_product:
        assert_is(case.matrix @ value, reference.attend(case.p, value))
    assert_is(case.matrix.entropy(), reference.entropy(case.p))
    assert_is(case.matrix.received(mean=True), reference.received(case.p, case.visible), 2e-5)
    assert_is(
        case.matrix.pool(30, 40, "mass"),
        reference.pool(case.p, reference.bins(30, 300), reference.bins(40, 700), "mass"),
    )
    assert_is(case.matrix.dense(), case.p)
    for k in (1, 2, 5, 7):
        assert_largest(case.matrix.topk(k), case, k)
    values, indices = case.matrix.max()
    assert_largest(reductions.WeightsAt(values.unsqueeze(-1), indices.unsqueeze(-1)), case, 1)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(*(st.integers(1, n) for n in (3, 3, 3, 9, 13))),
    st.sampled_from([name for name in MASKS if name != "documents"]),
    st.sampled_from(list(BIASES)),
    st.sampled_from([None, 1.5]),
    st.booleans(),
)
def test_matrix_answers_equal_their_definitions_for_any_shapes(
    shape: tuple[int, int, int, int, int], mask: str, bias: str, softcap: float | None, sinks: bool
) -> None:
    batch, groups, shared, queries, keys = shape
    with unchecked():
        assert_all_answers(make(Variant(mask, bias, softcap, sinks), (batch, groups * shared, queries, keys), shared))


@pytest.mark.parametrize("variant", [Variant(), Variant("causal", "key only"), Variant("padding", sinks=True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_operands_give_float32_answers(dtype: torch.dtype, variant: Variant) -> None:
    case = make(variant, dtype=dtype)
    assert case.matrix.dtype == case.matrix.entropy().dtype == case.matrix.dense().dtype == torch.float32
    assert_all_answers(case)
    product = case.matrix @ case.value
    assert product.dtype == dtype
    assert_is(product, reference.attend(case.p, case.value), 2e-2)
    assert_all_answers(case)


def test_float64_operands_give_float64_answers() -> None:
    case = make(Variant("causal"), dtype=torch.float64)
    assert case.matrix.dtype == case.matrix.entropy().dtype == torch.float64
    assert_is(case.matrix.entropy(), reference.entropy(case.p), 1e-12)
    assert_is(case.matrix.dense(), case.p, 1e-12)
    assert_is(case.matrix @ case.value, reference.attend(case.p, case.value), 1e-12)


def test_answers_do_not_depend_on_autocast() -> None:
    case = make(Variant("causal", softcap=1.2))
    with torch.autocast("cpu", torch.bfloat16):
        assert_all_answers(case)


def test_matrix_takes_inputs_that_are_not_contiguous() -> None:
    query, key, value = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in operands())
    case = describe(Variant(), query, key, value, None, torch.ones(7, 11, dtype=torch.bool))
    assert_is(case.matrix @ value, reference.attend(case.p, value))
    assert_all_answers(case)
    for mask_name in ("causal", "padding"):
        case = describe(Variant(mask_name), query, key, value, *masked(mask_name, SIZES))
        assert_is(case.matrix @ value, reference.attend(case.p, value))
        assert_all_answers(case)


X_SHAPES = [(11,), (11, 1), (11, 5), (11, 13), (1, 1, 11, 4), (2, 1, 11, 4), (1, 3, 11, 4), (2, 3, 11, 7)]
X_SHAPES += [(1, 6, 11, 4), (2, 6, 11, 7)]


@pytest.mark.parametrize(
    "variant", [Variant(), Variant("causal"), Variant("padding", "[L, S]"), Variant(sinks=True)], ids=str
)
@pytest.mark.parametrize("shape", X_SHAPES, ids=str)
def test_product_takes_any_x(shape: tuple[int, ...], variant: Variant) -> None:
    case = make(variant)
    x = torch.randn(shape)
    full = (x.unsqueeze(-1) if len(shape) == 1 else x).double()
    heads = full if full.dim() == 2 or full.shape[1] != 3 else reference.for_each_head(full, 6)
    expected = case.p @ heads
    for _ in range(2):  # the second time with the rows known
        assert_is(case.matrix @ x, expected.squeeze(-1) if len(shape) == 1 else expected)
        assert_is(case.matrix.entropy(), reference.entropy(case.p))


@pytest.mark.parametrize("wants_gradient", [False, True])
@pytest.mark.parametrize("shape", [(7,), (7, 3), (1, 1, 7, 3), (2, 1, 7, 3), (1, 6, 7, 3), (2, 6, 7, 3)], ids=str)
def test_transposed_product_takes_any_x(shape: tuple[int, ...], wants_gradient: bool, tiny: None) -> None:
    case = make(Variant("causal", "[L, S]"))
    x = torch.randn(shape, requires_grad=wants_gradient)
    full = (x.detach().unsqueeze(-1) if len(shape) == 1 else x.detach()).double()
    expected = case.p.transpose(-1, -2) @ full
    out = case.matrix.T @ x
    assert out.requires_grad == wants_gradient
    assert_is(out.detach(), expected.squeeze(-1) if len(shape) == 1 else expected)
    assert case.matrix.T.shape == (2, 6, 11, 7)
    assert case.matrix.T.T is case.matrix


ANSWERS: dict[str, Callable[[AttentionMatrix, Tensor, Tensor], Tensor]] = {
    "P @ v": lambda matrix, value, x: matrix @ value,
    "P.T @ x": lambda matrix, value, x: matrix.T @ x,
    "entropy": lambda matrix, value, x: matrix.entropy(),
}


@pytest.mark.parametrize("reduction", ANSWERS)
@pytest.mark.parametrize(
    "variant",
    [
        Variant("causal"),
        Variant("dense", "[L, S]"),
        Variant("padding", "query only", softcap=1.1, sinks=True),
        Variant("none", "-inf", sinks=True),
    ],
    ids=str,
)
def test_gradients_of_answers_equal_finite_differences(
    variant: Variant, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(differentiable, "_AUTOGRAD", 2 * 4 * 2)
    sizes = (1, 2, 3, 4)
    query, key, value = operands(1, 1, 2, 3, 4, 2, 3, dtype=torch.float64)
    x, sinks = torch.randn(1, 2, 3, 2).double(), torch.randn(2).double() if variant.sinks else None
    bias = BIASES[variant.bias](sizes)
    hidden = None if bias is None else bias == -torch.inf
    bias = None if bias is None else bias.double().masked_fill(hidden, 0)
    mask = masked(variant.mask, sizes)[0]

    def compute(
        query: Tensor, key: Tensor, value: Tensor, x: Tensor, bias: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        given = None if bias is None else bias.masked_fill(hidden, -torch.inf)
        matrix = AttentionMatrix(query, key, mask=mask, bias=given, softcap=variant.softcap, sinks=sinks)
        return ANSWERS[reduction](matrix, value, x)

    inputs = [None if t is None else t.requires_grad_() for t in (query, key, value, x, bias, sinks)]
    assert compute(*inputs).requires_grad
    with unchecked():
        assert gradcheck(compute, inputs)


@pytest.mark.parametrize("mask_name", ["none", "dense", "padding"])
def test_product_gives_a_gradient_to_the_value_alone(mask_name: str) -> None:
    case = make(Variant(mask_name))
    value = case.value.requires_grad_()
    sent = torch.randn(2, 6, 7, 4)
    (case.matrix @ value).backward(sent)
    expected = (case.p.transpose(-1, -2) @ sent.double()).unflatten(1, (3, 2)).sum(2)
    assert value.grad is not None
    assert_is(value.grad, expected)
    assert_all_answers(case)


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


def test_repr_names_shape_mask_kernel_and_size() -> None:
    matrix = AttentionMatrix(torch.randn(1, 8, 100_000, 4), torch.randn(1, 2, 100_000, 4), mask=masks.causal())
    assert repr(matrix) == (
        "AttentionMatrix(shape=(1, 8, 100000, 100000), mask=causal(); fused kernel; 298 GiB if dense)"
    )
    page = matrix._repr_html_()
    assert "<td>P @ value: fused; other answers: blockwise</td>" in page
    assert "<td>298 GiB</td>" in page
    assert "<td>query and key, 15.26 MiB</td>" in page
    small = AttentionMatrix(*operands()[:2], bias=torch.zeros(7, 11), softcap=3.0, sinks=torch.zeros(6))
    assert ", bias, softcap, sinks; rowwise kernel; 3.609 KiB if dense)" in repr(small)
    assert small.shape == torch.Size(SIZES)


def test_repr_html_escapes_the_name_of_a_mask_function() -> None:
    def rule(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx > kv_idx

    rule.__name__ = "<b>"
    page = AttentionMatrix(*operands()[:2], mask=masks.function(rule))._repr_html_()
    assert "&lt;b&gt;" in page
    assert "<b>" not in page


def test_repr_names_the_kernel_that_a_trained_bias_needs() -> None:
    query, key, _ = operands()
    trained = AttentionMatrix(query, key, bias=torch.zeros(1, 6, 1, 11, requires_grad=True))
    assert "; rowwise kernel;" in repr(trained)
    with torch.no_grad():
        assert "; fused kernel;" in repr(trained)


def test_dense_is_refused_above_the_limit() -> None:
    matrix = make(Variant()).matrix
    assert matrix.dense(limit=3696).shape == matrix.dense(limit="3.7 KB").shape == SIZES
    for limit in (3695, "3 KiB", "0.000001GiB"):
        with pytest.raises(
            ValueError, match=r"\(2, 6, 7, 11\) would take 3\.609 KiB, the limit is .*P\.pool"
        ) as caught:
            matrix.dense(limit=limit)
        assert f"the limit is {limit}." in str(caught.value)
    with pytest.raises(ValueError, match=r"limit is '13 apples'"):
        matrix.dense(limit="13 apples")
    large = AttentionMatrix(torch.randn(1, 1, 20_000, 1), torch.randn(1, 1, 20_000, 1))
    with pytest.raises(ValueError, match=r"1\.49 GiB, the limit is 1 GiB"):
        large.dense()


def broken(name: str, value: float) -> AttentionMatrix:
    query, key, _ = operands()
    given = {"query": query, "key": key, "bias": torch.zeros(1, 1, 7, 11), "sinks": torch.zeros(6)}
    given[name][(0,) * (given[name].dim() - 1) + (4,)] = value
    return AttentionMatrix(given["query"], given["key"], bias=given["bias"], sinks=given["sinks"])


@pytest.mark.parametrize("compute", [AttentionMatrix.entropy, AttentionMatrix.max, AttentionMatrix.dense])
@pytest.mark.parametrize("name", ["query", "key", "bias", "sinks"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_operands_with_nan_or_infinity_are_refused(
    value: float, name: str, compute: Callable[[AttentionMatrix], object]
) -> None:
    with pytest.raises(ValueError, match=rf"{name} holds 1 values .*the first {value} at \[(0, )*4\]"):
        compute(broken(name, value))


Q, K, _ = operands()
IDS_OF_12 = torch.zeros(12, dtype=torch.int64)
ERRORS: dict[str, tuple[Callable[[AttentionMatrix], object], list[str]]] = {
    "no reductions": (lambda P: P.reduce(), ["no reductions", "Entropy()"]),
    "k of 0": (lambda P: P.topk(0), ["k=0", "at least 1"]),
    "k of 13": (lambda P: P.topk(13), ["k=13", "only 11 keys"]),
    "radius": (lambda P: P.offsets(-3), ["radius=-3"]),
    "groups of 12": (lambda P: P.groups(IDS_OF_12), ["(1, 12)", "11 keys"]),
    "groups of numbers": (lambda P: P.groups(torch.zeros(11)), ["torch.float32", "[S] or [B, S]"]),
    "groups below": (lambda P: P.groups(torch.arange(11) - 4), ["from -4 to 6"]),
    "groups above": (lambda P: P.reduce(Groups(torch.arange(11), 9)), ["from 0 to 10", "0 to 8"]),
    "pool how": (lambda P: P.pool(3, 4, "median"), ["'median'", "'mass'"]),
    "pool of 0 bins": (lambda P: P.pool(3, 0), ["cols=0", "at least 1"]),
    "pool rows": (lambda P: P.pool(IDS_OF_12, 4), ["pool rows", "(1, 12)", "7 queries"]),
    "pool cols": (lambda P: P.pool(3, IDS_OF_12), ["pool cols", "(1, 12)", "11 keys"]),
    "x rows": (lambda P: P @ torch.randn(13, 2), ["13 rows", "11 keys"]),
    "x axes": (lambda P: P @ torch.randn(3, 11, 2), ["(3, 11, 2)", "[S, N]"]),
    "x heads": (lambda P: P @ torch.randn(1, 4, 11, 2), ["4 heads", "heads 1, 3 or 6"]),
    "x of integers": (lambda P: P @ torch.arange(11), ["torch.int64", ".float()"]),
    "x without columns": (lambda P: P @ torch.randn(11, 0), ["(11, 0)", "no columns"]),
    "transposed rows": (lambda P: P.T @ torch.randn(13), ["13 rows", "7 queries"]),
    "transposed axes": (lambda P: P.T @ torch.randn(6, 7, 3), ["(6, 7, 3)", "[7, N]"]),
    "transposed heads": (lambda P: P.T @ torch.randn(1, 4, 7, 3), ["(1, 4, 7, 3)"]),
    "transposed integers": (lambda P: P.T @ torch.arange(7), ["torch.int64", ".float()"]),
    "softcap": (lambda P: AttentionMatrix(Q, K, softcap=-1.5), ["softcap is -1.5", "above 0"]),
    "softcap of 0": (lambda P: AttentionMatrix(Q, K, softcap=0.0), ["softcap is 0.0"]),
    "sinks": (lambda P: AttentionMatrix(Q, K, sinks=torch.zeros(4)), ["4 values", "6 heads"]),
    "query axes": (lambda P: AttentionMatrix(Q[0], K), ["(6, 7, 5)", "[B, H, L, D]"]),
    "scale": (lambda P: AttentionMatrix(Q, K, scale=math.nan), ["scale is nan"]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_matrix_errors_say_what_came_and_what_was_wanted(name: str) -> None:
    compute, words = ERRORS[name]
    with unchecked(), pytest.raises(ValueError) as caught:
        compute(AttentionMatrix(Q, K))
    assert [word for word in words if word not in str(caught.value)] == []


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_product_does_not_round_a_value_to_half_precision(dtype: torch.dtype) -> None:
    query, key = torch.randn(1, 2, 3, 8).to(dtype), torch.randn(1, 2, 3000, 8).to(dtype)
    matrix = AttentionMatrix(query, key)
    place = torch.arange(3000.0) * 100
    expected = reference.weights(query, key) @ place.double()
    got = matrix @ place
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)
    assert (matrix @ place.to(torch.bfloat16).to(dtype).clamp(max=60000)).dtype == dtype


def test_scores_that_overflow_are_refused() -> None:
    matrix = AttentionMatrix(torch.full((1, 2, 3, 4), 1e20), torch.full((1, 2, 5, 4), 1e20))
    for compute in (AttentionMatrix.entropy, AttentionMatrix.max, lambda p: p[0, 0, 0], lambda p: p.logsumexp):
        with pytest.raises(ValueError, match=r"scores overflow torch\.float32: .* or give float64"):
            compute(matrix)
    wide = AttentionMatrix(matrix.operands.query.double(), matrix.operands.key.double())
    torch.testing.assert_close(wide.max().values, torch.full((1, 2, 3), 0.2, dtype=torch.float64))


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


def test_mask_does_not_combine_with_a_tensor() -> None:
    for combined in (lambda visible: masks.causal() & visible, lambda visible: masks.causal() | visible):
        with pytest.raises(TypeError, match=r"wanted another mask; masks.dense\(tensor\)"):
            combined(torch.ones(3, 3).bool())


def test_products_are_not_rounded_by_autocast() -> None:
    query, value = torch.randn(2, 1, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    matrix = AttentionMatrix(query, query)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, sums = matrix @ value, matrix.T @ value
    torch.testing.assert_close(result, matrix.dense() @ value)
    torch.testing.assert_close(sums, matrix.dense().mT @ value)


def test_mask_cells_are_shared_only_between_equal_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mask cells are reused for other heads only if the mask is the same for all of them."""
    monkeypatch.setattr(tiles, "_BLOCK", 1 << 14)  # one head at a time
    random = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 4, 100, 8, generator=random), torch.randn(1, 4, 100, 8, generator=random)
    visible = torch.rand(1, 4, 100, 100, generator=random) < 0.5
    (mass,) = AttentionMatrix(query, key, mask=visible).reduce(Groups(torch.arange(100) // 10))
    expected = (query @ key.transpose(-1, -2) / 8**0.5).masked_fill(~visible, -torch.inf).softmax(-1)
    assert_is(mass, expected.unflatten(-1, (10, 10)).sum(-1).double())
