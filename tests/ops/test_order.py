"""The order of questions: an answer is the same whatever was asked before, and exact for scores of any size."""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headscope import AttentionMatrix, masks, record
from headscope.ops.reductions import Entropy, Received
from tests.ops.test_logsumexp import Sdpa
from tests.options import MASKS, masked, one_thread, unchecked  # noqa: F401

SIZES = (2, 4, 7, 33)
QUESTIONS: dict[str, Callable[[AttentionMatrix, Tensor], Tensor]] = {
    "product": lambda P, value: P @ value,
    "dense": lambda P, _: P.dense(),
    "part": lambda P, _: P[1, 2, 2:6, 3:20],
    "points": lambda P, _: P[0, torch.tensor([3, 1]), torch.tensor([4, 0]), torch.tensor([5, 6])],
    "entropy": lambda P, _: P.entropy(),
    "received": lambda P, _: P.received(),
    "topk": lambda P, _: P.topk(3).values,
    "max": lambda P, _: P.max().values,
    "pool": lambda P, _: P.pool(3, 4, "mass"),
    "groups": lambda P, _: P.groups(torch.arange(33) % 3),
    "transposed": lambda P, _: P.T @ torch.ones(7, 2),
}


def operands(kind: str, size: float) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value whose scores reach ``size``: spread over it, or all near −size."""
    torch.manual_seed(3)
    batch, heads, queries, keys = SIZES
    query, key, value = (torch.randn(batch, heads // g, n, 16) for g, n in ((1, queries), (2, keys), (2, keys)))
    if kind == "spread":
        return query * (size / 8), key, value
    query[..., 8], key[..., 8] = (4 * size) ** 0.5, -((4 * size) ** 0.5)
    return query, key, value


def exact(query: Tensor, key: Tensor, mask_name: str) -> AttentionMatrix:
    """The same attention in float64, from which nothing was asked yet."""
    return AttentionMatrix(query.double(), key.double(), mask=masked(mask_name, SIZES)[0])


@settings(max_examples=60, deadline=None)
@given(
    mask_name=st.sampled_from(sorted(MASKS)),
    kind=st.sampled_from(["spread", "offset"]),
    exponent=st.floats(0, 6),
    order=st.lists(st.sampled_from(sorted(QUESTIONS)), min_size=2, max_size=4, unique=True),
)
def test_answers_are_the_same_in_any_order(mask_name: str, kind: str, exponent: float, order: Sequence[str]) -> None:
    query, key, value = operands(kind, 10**exponent)
    P = AttentionMatrix(query, key, mask=masked(mask_name, SIZES)[0])
    for question in order:
        answer = QUESTIONS[question](P, value)
        if question == "product":  # as exact as torch's kernel
            continue
        with unchecked():
            expected = QUESTIONS[question](exact(query, key, mask_name), value.double())
        torch.testing.assert_close(answer, expected.float(), atol=5e-5, rtol=0, msg=f"{question} of {order}")


@pytest.mark.parametrize("size", [1e2, 1e5, 3e6])
@pytest.mark.parametrize("mask_name", ["none", "causal", "dense"])
def test_rows_sum_to_one_after_a_product(mask_name: str, size: float) -> None:
    query, key, value = operands("offset", size)
    P = AttentionMatrix(query, key, mask=masked(mask_name, SIZES)[0])
    P @ value
    sums = P.dense().sum(-1)
    seen = sums > 0.5
    torch.testing.assert_close(sums[seen], torch.ones_like(sums[seen]), atol=5e-6, rtol=0)
    assert float(P.max().values.max()) <= 1 + 1e-6


@pytest.mark.parametrize(("kind", "size"), [("spread", 1e5), ("offset", 500.0), ("offset", 1e6)])
def test_recorded_weights_are_exact_for_large_scores(kind: str, size: float) -> None:
    query, key, value = operands(kind, size)
    key, value = (x.repeat_interleave(2, 1) for x in (key, value))
    with record(model := Sdpa()) as recording:
        model(query, key, value)
    expected = exact(query, key, "none").dense().float()
    for P in (recording[0], recording.calls[0].matrix()):
        torch.testing.assert_close(P.dense(), expected, atol=1e-6, rtol=0)


def test_kernel_logsumexp_of_large_size_is_not_used() -> None:
    """A mask of −10,000 for a whole row: its log-sum-exp is off by 5e-4, the other rows' are used."""
    query, key, value = (x[:, :2].float() for x in operands("spread", 1.0))
    bias = torch.zeros(1, 1, 7, 33)
    bias[..., 4, :] = -1e4
    with record(model := Sdpa()) as recording:
        model(query, key, value, attn_mask=bias)
    sums = recording[0].dense().sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-6, rtol=0)


@pytest.mark.parametrize("options", [{"softcap": 50.0}, {"sinks": torch.randn(4)}, {"bias": torch.randn(7, 33)}])
def test_large_scores_are_exact_with_every_option(options: dict[str, float | Tensor]) -> None:
    query, key, _ = operands("offset", 1e5)
    double = {name: x.double() if isinstance(x, Tensor) else x for name, x in options.items()}
    P = AttentionMatrix(query, key, mask=masks.causal(), **options)
    T = AttentionMatrix(query.double(), key.double(), mask=masks.causal(), **double)
    torch.testing.assert_close(P.dense(), T.dense().float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(P.entropy(), T.entropy().float(), atol=1e-5, rtol=0)
    query.requires_grad_()
    Q = AttentionMatrix(query, key, mask=masks.causal(), **options)
    torch.testing.assert_close(Q.entropy().detach(), P.entropy(), atol=1e-5, rtol=0)
    (gradient,) = torch.autograd.grad(Q.entropy().sum(), query)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("size", [3e4, 1e12])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -2.0])], ids=["no sinks", "sinks"])
def test_reductions_of_scores_beyond_float32_integers_are_those_of_float64(size: float, sinks: Tensor | None) -> None:
    query, key = torch.randn(1, 2, 9, 8) * size, torch.randn(1, 2, 11, 8) * 10 * size
    matrix = AttentionMatrix(query, key, scale=1.0, mask=masks.causal(), sinks=sinks)
    hidden = ~torch.ones(9, 11, dtype=torch.bool).tril(2)
    scores = (query.double() @ key.double().mT).masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, 2, 1, 1).expand(1, 2, 9, 1)], -1)
    wanted = scores.softmax(-1)[..., :11]
    entropy, received = matrix.reduce(Entropy(), Received())
    torch.testing.assert_close(received.double(), wanted.sum(-2), atol=1e-6, rtol=0)
    torch.testing.assert_close(entropy.double(), -torch.xlogy(wanted, wanted).sum(-1), atol=1e-6, rtol=0)
    torch.testing.assert_close(matrix[:].double(), wanted, atol=1e-6, rtol=0)
    assert matrix.logsumexp.dtype == torch.float32
