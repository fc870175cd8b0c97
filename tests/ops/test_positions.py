"""ALiBi against the bias written out, for every answer that uses it."""

from __future__ import annotations

import math

import pytest
import torch

from headscope import AttentionMatrix, attention, masks
from headscope.ops.positions import alibi, alibi_slopes
from tests.options import unchecked

SLOPES = [0.5, 0.25, 0.3, 0.01, 0.7, 1.0]


def written_out(queries: int, keys: int) -> torch.Tensor:
    """Cell by cell, [1, 6, L, S]: minus the slope times the distance."""
    first = keys - queries
    rows = [[[-s * abs(i + first - j) for j in range(keys)] for i in range(queries)] for s in SLOPES]
    return torch.tensor(rows)[None]


@pytest.mark.parametrize("mask", [None, masks.causal(), masks.sliding_window(3)], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(7, 11), (11, 11), (1, 11)])
def test_alibi_equals_the_bias_written_out(queries: int, keys: int, mask: masks.Mask | None) -> None:
    query, key, value = torch.randn(2, 6, queries, 5), torch.randn(2, 3, keys, 5), torch.randn(2, 3, keys, 4)
    lazy, plain = alibi(SLOPES), written_out(queries, keys)
    output = attention(query, key, value, mask=mask, bias=lazy)
    torch.testing.assert_close(output, attention(query, key, value, mask=mask, bias=plain), atol=1e-6, rtol=0)
    ours = AttentionMatrix(query, key, mask=mask, bias=lazy)
    theirs = AttentionMatrix(query, key, mask=mask, bias=plain)
    torch.testing.assert_close(ours.dense(), theirs.dense(), atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.entropy(), theirs.entropy(), atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.logsumexp, theirs.logsumexp, atol=1e-6, rtol=0)
    index = (torch.tensor([0, 1]), 4, 0, torch.tensor([3, 10]))
    torch.testing.assert_close(ours[index], theirs.dense()[index], atol=1e-6, rtol=0)
    torch.testing.assert_close(ours[1, 4], theirs[1, 4], atol=1e-6, rtol=0)


def test_alibi_gives_gradients_to_query_and_key() -> None:
    query, key = torch.randn(1, 6, 5, 3, dtype=torch.float64), torch.randn(1, 6, 5, 3, dtype=torch.float64)
    query.requires_grad_()
    key.requires_grad_()

    def entropy(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return AttentionMatrix(query, key, mask=masks.causal(), bias=alibi(SLOPES)).entropy()

    assert torch.autograd.gradcheck(entropy, (query, key))


def test_alibi_keeps_its_precision_at_far_positions() -> None:
    """At position 99,000 a bias counted from key 0 would have lost the distance's third digit."""
    query, key = torch.zeros(1, 6, 2, 4), torch.zeros(1, 6, 99_000, 4)
    weights = AttentionMatrix(query, key, mask=masks.causal(), bias=alibi(SLOPES))[0, 0, 1, -4:]
    expected = torch.exp(-0.5 * torch.tensor([3.0, 2.0, 1.0, 0.0]))
    torch.testing.assert_close(weights / weights[-1], expected, atol=1e-6, rtol=0)


def test_alibi_slopes_are_those_of_the_paper() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(6).tolist() == pytest.approx([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3])


def test_alibi_slopes_are_checked() -> None:
    for wrong in ([[1.0]], [], [0.5, math.nan]):
        with pytest.raises(ValueError, match="wanted one finite number"):
            alibi(torch.tensor(wrong))
    with pytest.raises(ValueError, match=r"got no slopes.* write positions\.alibi\(positions\.alibi_slopes"):
        alibi()
    with unchecked(), pytest.raises(ValueError, match=r"slopes of shape \(\).* write positions\.alibi\(positions"):
        alibi(8)
    with pytest.raises(ValueError, match="0 heads"):
        alibi_slopes(0)
    with pytest.raises(ValueError, match="6 slopes, but there are 4 heads"):
        attention(*[torch.randn(1, 4, 3, 2)] * 3, bias=alibi(SLOPES))
