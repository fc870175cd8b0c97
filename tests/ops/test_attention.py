"""attention() against its definition: every mask and bias, any shapes, dtypes, gradients, dropout, errors."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from headscope import AttentionMatrix, attention, masks
from headscope.ops.kernels import differentiable, fused
from tests import reference
from tests.ops.cases import SIZES, assert_is
from tests.options import BIASES, MASKS, masked, one_thread, unchecked  # noqa: F401
from tests.reference import operands


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every loop over blocks goes round several times."""
    monkeypatch.setattr(fused, "_ROWS", 3)
    monkeypatch.setattr(differentiable, "_AUTOGRAD", 2 * 6 * 11 * 2)


@pytest.mark.parametrize("bias_name", BIASES)
@pytest.mark.parametrize("mask_name", MASKS)
def test_attention_equals_its_definition(mask_name: str, bias_name: str, tiny: None) -> None:
    query, key, value = operands()
    mask, visible = masked(mask_name, SIZES)
    bias = BIASES[bias_name](SIZES)
    expected = reference.attend(reference.weights(query, key, visible=visible, bias=bias), value)
    assert_is(attention(query, key, value, mask=mask, bias=bias), expected)
    trained = None if bias is None else bias.clone().requires_grad_()
    assert_is(attention(query, key, value, mask=mask, bias=trained).detach(), expected)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, int]:
    sizes = {"batch": 3, "kv_heads": 3, "shared": 3, "queries": 9, "keys": 13, "size": 6, "width": 14}
    return {name: draw(st.integers(1, largest)) for name, largest in sizes.items()}


@settings(max_examples=150, deadline=None)
@given(
    shapes(),
    st.sampled_from([name for name in MASKS if name != "documents"]),
    st.sampled_from(list(BIASES)),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([None, 0.3, -1.7]),
)
def test_attention_equals_its_definition_for_any_shapes(
    shape: dict[str, int], mask_name: str, bias_name: str, dtype: torch.dtype, scale: float | None
) -> None:
    query, key, value = operands(**shape, dtype=dtype)
    sizes = (*query.shape[:3], key.shape[2])
    mask, visible = masked(mask_name, sizes)
    bias = BIASES[bias_name](sizes)
    with unchecked():
        out = attention(query, key, value, mask=mask, bias=bias, scale=scale)
    assert out.dtype == dtype
    p = reference.weights(query, key, visible=visible, bias=bias, scale=scale)
    assert_is(out, reference.attend(p, value), 1e-5 if dtype == torch.float32 else 1e-11)


@pytest.mark.parametrize("queries", [300, 700])
@pytest.mark.parametrize("mask_name", ["none", "causal", "window", "padding"])
def test_attention_equals_its_definition_at_700_tokens(mask_name: str, queries: int) -> None:
    query, key, value = operands(kv_heads=2, queries=queries, keys=700, size=64, width=96)
    lengths = torch.tensor([700, 411])
    mask = masks.padding(lengths) if mask_name == "padding" else masked(mask_name, (1, 1, 1, 1))[0]
    i = torch.arange(700 - queries, 700)[:, None]
    j = torch.arange(700)[None]
    cells = {
        "none": (j >= 0).expand(queries, -1),
        "causal": j <= i,
        "window": (j >= i - 2) & (j <= i + 1),
        "padding": (j < lengths[:, None, None])[:, None],
    }
    expected = reference.attend(reference.weights(query, key, visible=cells[mask_name]), value)
    assert_is(attention(query, key, value, mask=mask), expected)


# The softmax of 0 and ln n can be worked out by hand: 1 : n.
HAND = torch.tensor([[[[1.0]]]]), torch.tensor([[[[0.0], [math.log(3)], [math.log(4)]]]]), torch.eye(3)[None, None]
BY_HAND: dict[str, tuple[dict[str, Any], list[float]]] = {
    "1 : 3 : 4": ({}, [1 / 8, 3 / 8, 4 / 8]),
    "scale 2 squares": ({"scale": 2.0}, [1 / 26, 9 / 26, 16 / 26]),
    "scale 0 is even": ({"scale": 0.0}, [1 / 3, 1 / 3, 1 / 3]),
    "hidden is left out": ({"mask": torch.tensor([[True, True, False]])}, [1 / 4, 3 / 4, 0]),
    "a bias adds": ({"bias": torch.tensor([[math.log(5), 0, 0]])}, [5 / 12, 3 / 12, 4 / 12]),
    "a bias is not scaled": ({"bias": torch.tensor([[math.log(5), 0, 0]]), "scale": 0.0}, [5 / 7, 1 / 7, 1 / 7]),
    "-inf hides": ({"bias": torch.tensor([[0, -math.inf, 0]])}, [1 / 5, 0, 4 / 5]),
    "finfo.min hides": ({"bias": torch.tensor([[0, reference.FINFO_MIN, 0]])}, [1 / 5, 0, 4 / 5]),
    "finfo.min everywhere is even": ({"bias": torch.full((1, 3), reference.FINFO_MIN)}, [1 / 3, 1 / 3, 1 / 3]),
    "nothing visible": ({"mask": masks.prefix(0)}, [0, 0, 0]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_attention_gives_the_values_worked_out_by_hand(name: str) -> None:
    options, expected = BY_HAND[name]
    assert_is(attention(*HAND, **options), torch.tensor(expected, dtype=torch.float64).view(1, 1, 1, 3), 1e-6)


def test_scale_defaults_to_one_over_the_root_of_the_head_size() -> None:
    query, key = torch.ones(1, 1, 1, 4), torch.tensor([[[[0.0] * 4, [1.0] * 4]]])
    out = attention(query, key, torch.eye(2)[None, None])
    assert_is(
        out.flatten(), torch.tensor([1 / (1 + math.e**2), math.e**2 / (1 + math.e**2)], dtype=torch.float64), 1e-6
    )


def test_query_heads_share_keys_in_consecutive_groups() -> None:
    value = torch.arange(3.0).view(1, 3, 1, 1).expand(1, 3, 11, 1)
    out = attention(torch.randn(1, 6, 7, 5), torch.randn(1, 3, 11, 5), value)
    assert_is(out[0, :, 0, 0], torch.tensor([0, 0, 1, 1, 2, 2], dtype=torch.float64), 1e-6)


def test_causal_mask_aligns_queries_with_the_last_keys() -> None:
    query, key, value = operands(queries=11)
    whole = attention(query, key, value, mask=masks.causal())
    step = attention(query[:, :, -2:], key, value, mask=masks.causal())
    assert_is(step, whole[:, :, -2:].double(), 1e-6)


@pytest.mark.parametrize("bias_name", ["none", "key only", "[L, S]", "finfo.min"])
@pytest.mark.parametrize("mask_name", ["none", "causal", "padding", "dense"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_attention_in_half_precision_equals_its_definition(
    dtype: torch.dtype, tolerance: float, mask_name: str, bias_name: str
) -> None:
    query, key, value = operands(dtype=dtype)
    mask, visible = masked(mask_name, SIZES)
    bias = BIASES[bias_name](SIZES)
    out = attention(query, key, value, mask=mask, bias=bias)
    assert out.dtype == dtype
    assert_is(out, reference.attend(reference.weights(query, key, visible=visible, bias=bias), value), tolerance)


@pytest.mark.parametrize("dropout_p", [0.0, 1e-9])
@pytest.mark.parametrize("bias_name", ["none", "[L, S]"])
def test_attention_under_autocast_equals_its_definition(bias_name: str, dropout_p: float) -> None:
    query, key, value = operands()
    mask, visible = masked("padding", SIZES)
    bias = BIASES[bias_name](SIZES)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(query, key, value, mask=mask, bias=bias, dropout_p=dropout_p)
    expected = reference.attend(reference.weights(query, key, visible=visible, bias=bias), value)
    assert_is(out, expected, 3e-2)


def test_bias_may_have_another_dtype() -> None:
    query, key, value = operands()
    for name in ("key only", "[L, S]"):
        bias = BIASES[name](SIZES)
        assert bias is not None
        expected = reference.attend(reference.weights(query, key, bias=bias), value)
        assert_is(attention(query, key, value, bias=bias.double()), expected)
        half = reference.attend(reference.weights(query, key, bias=bias.half()), value)
        assert_is(attention(query, key, value, bias=bias.half()), half)


def hidden_rows() -> tuple[Tensor, Tensor]:
    """A mask whose query rows 0 and 4 see nothing, in every batch row and head."""
    visible = torch.rand(7, 11) < 0.8
    empty_rows = torch.tensor([0, 4])
    visible[empty_rows] = False
    visible[:, 2] |= ~visible.any(-1) & (torch.arange(7)[:, None] != empty_rows).all(1)
    return visible, empty_rows


@pytest.mark.parametrize("how", ["mask", "mask and bias", "-inf bias", "trained -inf bias", "dropout"])
def test_query_that_sees_nothing_gives_zeros_and_zero_gradients(how: str, tiny: None) -> None:
    query, key, value = (x.requires_grad_() for x in operands())
    visible, empty_rows = hidden_rows()
    hiding = torch.zeros(7, 11).masked_fill(~visible, -torch.inf).requires_grad_(how.startswith("trained"))
    options: dict[str, dict[str, Any]] = {
        "mask": {"mask": visible},
        "mask and bias": {"mask": visible, "bias": torch.randn(7, 11)},
        "-inf bias": {"bias": hiding},
        "trained -inf bias": {"bias": hiding},
        "dropout": {"mask": visible, "dropout_p": 0.5},
    }
    out = attention(query, key, value, **options[how])
    assert bool((out[:, :, empty_rows] == 0).all())
    assert bool((out[:, :, 1:4] != 0).any(-1).any(1).all())
    out.backward(torch.randn_like(out))
    assert query.grad is not None
    assert bool((query.grad[:, :, empty_rows] == 0).all())
    for tensor in (query, key, value):
        assert tensor.grad is not None
        assert bool(tensor.grad.isfinite().all())
        assert bool((tensor.grad != 0).any())
    if hiding.requires_grad:
        assert hiding.grad is not None
        assert bool(hiding.grad.isfinite().all())
        assert bool((hiding.grad[empty_rows] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_output_and_gradients_are_zero_if_no_query_sees_a_key(dtype: torch.dtype) -> None:
    query, key, value = (x.detach().mul(1e4).to(dtype).requires_grad_() for x in operands())
    out = attention(query, key, value, mask=masks.prefix(0))
    assert bool((out == 0).all())
    out.sum().backward()
    for tensor in (query, key, value):
        assert tensor.grad is not None
        assert bool((tensor.grad == 0).all())
    only_value = value.detach().requires_grad_()
    attention(query.detach(), key.detach(), only_value, mask=masks.prefix(0)).sum().backward()
    assert only_value.grad is not None
    assert bool((only_value.grad == 0).all())


def test_gradients_are_the_same_if_masks_are_recomputed(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    mask, _ = masked("padding", SIZES)
    bias = BIASES["key only"](SIZES)
    inputs = [x.requires_grad_() for x in operands()]
    nonzero = torch.autograd.grad(attention(*inputs, mask=mask, bias=bias).square().sum(), inputs)
    monkeypatch.setattr(fused, "_AUTOGRAD", 0)
    again = torch.autograd.grad(attention(*inputs, mask=mask, bias=bias).square().sum(), inputs)
    for one, other in zip(nonzero, again, strict=True):
        assert float(one.abs().max()) > 0.1
        assert_is(other, one.double(), 1e-6)


def small(mask_name: str, bias_name: str) -> tuple[list[Tensor], Any, Tensor | None]:
    """Operands of few numbers, in float64, that want gradients; mask and bias."""
    sizes = (1, 2, 3, 4)
    inputs = [x.requires_grad_() for x in operands(1, 1, 2, 3, 4, 2, 3, dtype=torch.float64)]
    bias = BIASES[bias_name](sizes)
    return inputs, masked(mask_name, sizes)[0], None if bias is None else bias.double()


@pytest.mark.parametrize("bias_name", ["none", "key only", "[L, S]"])
@pytest.mark.parametrize("mask_name", ["none", "causal", "padding", "dense"])
def test_gradients_equal_finite_differences(mask_name: str, bias_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_ROWS", 2)
    inputs, mask, bias = small(mask_name, bias_name)
    with unchecked():
        assert gradcheck(lambda *given: attention(*given, mask=mask, bias=bias), inputs)


@pytest.mark.parametrize(
    ("mask_name", "bias_name"), [("none", "key only"), ("causal", "[L, S]"), ("dense", "query only")]
)
def test_gradients_of_a_trained_bias_equal_finite_differences(
    mask_name: str, bias_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(differentiable, "_AUTOGRAD", 2 * 4 * 2)
    inputs, mask, bias = small(mask_name, bias_name)
    assert bias is not None
    inputs.append(bias.requires_grad_())
    with unchecked():
        assert gradcheck(lambda q, k, v, b: attention(q, k, v, mask=mask, bias=b), inputs)


@pytest.mark.parametrize("mask_name", ["none", "causal", "padding", "documents"])
def test_gradients_equal_those_of_the_definition(mask_name: str, tiny: None) -> None:
    query, key, value = (x.requires_grad_() for x in operands(queries=11, width=7))
    mask, visible = masked(mask_name, (2, 6, 11, 11))
    ours = attention(query, key, value, mask=mask)
    expected = reference.attend(reference.weights(query, key, visible=visible), value)
    sent = torch.randn_like(ours)
    result = torch.autograd.grad(ours, (query, key, value), sent)
    defined = torch.autograd.grad(expected, (query, key, value), sent.double())
    for one, other in zip(result, defined, strict=True):
        assert_is(one, other.double(), 2e-5)


def test_dropout_zeroes_its_share_and_scales_the_others(tiny: None) -> None:
    query, key, _ = operands()
    eye = torch.eye(11).expand(2, 3, 11, 11)
    mask, visible = masked("causal", SIZES)
    p = reference.weights(query, key, visible=visible)
    draws = torch.stack([attention(query, key, eye, mask=mask, dropout_p=0.3) for _ in range(60)]).double()
    nonzero = draws != 0
    assert_is(draws[nonzero], (p / 0.7).expand_as(draws)[nonzero])
    assert not bool(nonzero[:, ~visible].any())
    visible = int(visible.sum()) * 60
    share = 1 - float(nonzero.sum()) / visible
    assert abs(share - 0.3) < 5 * math.sqrt(0.3 * 0.7 / visible)
    spread = p.amax() * math.sqrt(0.3 / 0.7 / 60)
    assert float((draws.mean(0) - p).abs().max()) < 5 * float(spread)


def test_dropout_repeats_with_its_seed_and_in_the_backward_pass(tiny: None) -> None:
    query, key, _ = operands()
    eye = torch.eye(11).expand(2, 3, 11, 11).clone().requires_grad_()

    def draw() -> Tensor:
        torch.manual_seed(77)
        return attention(query, key, eye, dropout_p=0.4)

    first, second = draw(), draw()
    assert first.equal(second)
    assert not first.equal(attention(query, key, eye, dropout_p=0.4))
    first.sum().backward()
    assert eye.grad is not None
    dropped = first.detach().sum(2).unflatten(1, (3, 2)).sum(2)  # column sums, by key/value head
    assert_is(eye.grad, dropped.double().unsqueeze(-1).expand(-1, -1, -1, 11))


@pytest.mark.parametrize("mask_name", ["none", "causal", "padding"])
@pytest.mark.parametrize("same", ["query", "key", "value", "all"])
def test_attention_takes_inputs_that_are_not_contiguous(same: str, mask_name: str) -> None:
    query, key, value = operands(queries=11, width=5)
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (query, key, value)]
    given = [
        t if same in (n, "all") else x
        for n, t, x in zip(("query", "key", "value"), turned, (query, key, value), strict=True)
    ]
    mask, visible = masked(mask_name, (2, 6, 11, 11))
    assert_is(attention(*given, mask=mask), reference.attend(reference.weights(query, key, visible=visible), value))
    projected = torch.randn(2, 11, 6 * 5)
    split = projected.unflatten(2, (6, 5)).transpose(1, 2)  # as it comes out of a projection
    assert_is(
        attention(split, key, value, mask=mask), reference.attend(reference.weights(split, key, visible=visible), value)
    )


Q, K, V = operands()
MASK_OF_12, SHORT = torch.ones(7, 12).bool(), torch.ones(7, 11, dtype=torch.int16)
ERRORS: dict[str, tuple[Callable[[], object], list[str]]] = {
    "3 axes": (lambda: attention(Q[0], K, V), ["query", "(6, 7, 5)", "[B, H, L, D]"]),
    "key of 5 axes": (lambda: attention(Q, K[None], V), ["key", "(1, 2, 3, 11, 5)", "[B, G, S, D]"]),
    "integers": (lambda: attention(Q.int(), K, V), ["query is torch.int32", ".float()"]),
    "empty": (lambda: attention(Q[:, :, :0], K, V), ["(2, 6, 0, 5)", "empty"]),
    "dtype": (lambda: attention(Q.double(), K, V), ["torch.float64", "torch.float32", ".to(other)"]),
    "batch": (lambda: attention(Q, K[:1], V), ["batch 2", "key has 1"]),
    "head size": (lambda: attention(Q, K[..., :3], V), ["head size 5", "key has 3"]),
    "heads": (lambda: attention(Q[:, :5], K, V), ["5 query heads", "3 key heads", "multiple"]),
    "more key heads": (lambda: attention(Q[:, :2], K, V), ["2 query heads", "3 key heads"]),
    "value rows": (lambda: attention(Q, K, V[:, :, :10]), ["10 rows", "11 keys"]),
    "value heads": (lambda: attention(Q, K, V[:, :2]), ["2 heads", "heads 1, 3 or 6"]),
    "value batch": (lambda: attention(Q, K, V.repeat(2, 1, 1, 1)), ["batch 4", "batch 1 or 2"]),
    "value axes": (lambda: attention(Q, K, V[0]), ["(3, 11, 4)", "[B, G, S, N]"]),
    "value of integers": (lambda: attention(Q, K, V.int()), ["torch.int32", ".float()"]),
    "value without columns": (lambda: attention(Q, K, V[..., :0]), ["(2, 3, 11, 0)", "no columns"]),
    "mask of 3 axes": (lambda: attention(Q, K, V, mask=torch.ones(6, 7, 11).bool()), ["(6, 7, 11)", "unsqueeze"]),
    "mask of numbers": (lambda: attention(Q, K, V, mask=torch.zeros(7, 11)), ["torch.float32", "bias="]),
    "mask shape": (
        lambda: attention(Q, K, V, mask=MASK_OF_12),
        ["(1, 1, 7, 12)", "(2, 6, 7, 11)", "axis S"],
    ),
    "mask of a list": (lambda: attention(Q, K, V, mask=[True]), ["list", "bool tensor"]),
    "bias of integers": (
        lambda: attention(Q, K, V, bias=SHORT),
        ["torch.int16", "mask="],
    ),
    "bias of booleans": (lambda: attention(Q, K, V, bias=torch.ones(7, 11).bool()), ["torch.bool", "mask="]),
    "bias shape": (lambda: attention(Q, K, V, bias=torch.ones(7, 13)), ["(1, 1, 7, 13)", "(2, 6, 7, 11)"]),
    "bias of 3 axes": (lambda: attention(Q, K, V, bias=torch.ones(6, 7, 11)), ["(6, 7, 11)", "4-D"]),
    "scale": (lambda: attention(Q, K, V, scale=math.inf), ["scale is inf", "0.4472"]),
    "dropout": (lambda: attention(Q, K, V, dropout_p=1.5), ["1.5", "from 0 to below 1"]),
    "dropout of all": (lambda: attention(Q, K, V, dropout_p=1.0), ["1.0"]),
    "dropout below 0": (lambda: attention(Q, K, V, dropout_p=-0.25), ["-0.25"]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_attention_errors_say_what_came_and_what_was_wanted(name: str) -> None:
    call, words = ERRORS[name]
    with unchecked(), pytest.raises(ValueError) as caught:
        call()
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("scale", [-1.7, 0.0])
@pytest.mark.parametrize("asked_before", [False, True])
def test_mask_hides_keys_when_the_scale_is_not_positive(scale: float, asked_before: bool) -> None:
    """The fused kernel alone gives NaN: it scales after hiding."""
    query, key, value = torch.randn(1, 2, 3, 5), torch.randn(1, 2, 3, 5), torch.randn(1, 2, 3, 5)
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf)
    matrix = AttentionMatrix(query, key, mask=masks.causal(), scale=scale)
    if asked_before:
        torch.testing.assert_close(matrix.dense(), scores.softmax(-1))
    torch.testing.assert_close(matrix @ value, scores.softmax(-1) @ value)
    torch.testing.assert_close(
        attention(query, key, value, mask=masks.causal(), scale=scale), scores.softmax(-1) @ value
    )
