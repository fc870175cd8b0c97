"""Matrices with every mask, bias and option, their true weights, and assertions on their answers."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from headscope import AttentionMatrix, reductions
from headscope.ops.masks import Mask
from headscope.ops.reductions import Mass
from tests import reference
from tests.options import BIASES, MASKS, masked, unchecked
from tests.reference import operands

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


def fresh(case: Case) -> AttentionMatrix:
    """The same matrix, before its rows are normalized."""
    return copy.copy(case.matrix)
