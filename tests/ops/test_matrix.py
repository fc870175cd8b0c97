"""AttentionMatrix: every answer against its definition, over masks, biases, softcap, sinks, blocks, paths."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from headscope import AttentionMatrix, masks, reductions
from headscope.ops.kernels import differentiable, fused
from headscope.ops.reductions import Groups
from tests import reference
from tests.ops.cases import (
    SIZES,
    VARIANTS,
    Variant,
    assert_all_answers,
    assert_all_checked,
    assert_is,
    assert_largest,
    describe,
    make,
)
from tests.options import BIASES, MASKS, masked, one_thread, unchecked  # noqa: F401
from tests.reference import operands


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


@pytest.mark.parametrize("mask_name", MASKS)
def test_answers_are_the_same_with_the_logsumexp_of_the_fused_kernel(mask_name: str) -> None:
    case = make(Variant(mask_name))
    assert case.matrix._kernel_logsumexp is None
    assert_is(case.matrix @ case.value, reference.attend(case.p, case.value))
    assert case.matrix._kernel_logsumexp is not None
    assert_all_answers(case)


@pytest.mark.parametrize("mask_name", ["none", "causal", "dense"])
def test_answers_are_the_same_without_the_private_op_of_torch(mask_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_flash_cpu", None)
    case = make(Variant(mask_name))
    assert_is(case.matrix @ case.value, reference.attend(case.p, case.value))
    assert case.matrix._kernel_logsumexp is None
    assert_all_answers(case)


@pytest.mark.parametrize("bias_name", ["-inf", "finfo.min"])
def test_logsumexp_of_the_fused_kernel_is_not_used_with_a_bias(bias_name: str) -> None:
    case = make(Variant("causal", bias_name))
    assert_is(case.matrix @ case.value, reference.attend(case.p, case.value))
    assert_all_answers(case)


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


def test_repr_names_shape_mask_kernel_and_size() -> None:
    matrix = AttentionMatrix(torch.randn(1, 8, 100_000, 4), torch.randn(1, 2, 100_000, 4), mask=masks.causal())
    assert repr(matrix) == (
        "AttentionMatrix(shape=(1, 8, 100000, 100000), mask=causal(); fused kernel; 298 GiB if dense)"
    )
    small = AttentionMatrix(*operands()[:2], bias=torch.zeros(7, 11), softcap=3.0, sinks=torch.zeros(6))
    assert ", bias, softcap, sinks; rowwise kernel; 3.609 KiB if dense)" in repr(small)
    assert small.shape == torch.Size(SIZES)


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
