"""Weights with gradients, a few query rows at a time.

They are computed again in the backward pass, so that no L×S tensor is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from headscope.ops.positions import Alibi
from headscope.ops.scores import LOWEST, Scores

_AUTOGRAD = 1 << 21  # scores in one group of rows: several copies are alive at once


def by_rows(scores: Scores, function: Callable[..., Tensor], *values: Tensor | None) -> Iterator[Tensor]:
    """Results of ``function(weights, log_weights, rows, *values)`` for a few query rows at a time, differentiable.

    Weights are not kept for the backward pass but computed again there, so memory is that of a few rows. They always
    span all keys: with fewer keys for some rows, freed memory would be too small for the next rows, and would add up.
    """
    batch, heads, queries, keys = scores.shape
    rows = max(1, min(queries, _AUTOGRAD // (max(1, batch) * heads * keys)))
    if rows == queries:  # small enough to be kept
        yield _apply(scores, function, slice(0, queries), scores.query, scores.key, scores.bias, scores.sinks, *values)
        return
    for q in range(0, queries, rows):
        span = slice(q, min(queries, q + rows))
        operands = (scores.query, scores.key, scores.bias, scores.sinks, *values)
        yield checkpoint(_apply, scores, function, span, *operands, use_reentrant=False)


def _apply(
    scores: Scores,
    function: Callable[..., Tensor],
    rows: slice,
    query: Tensor,
    key: Tensor,
    bias: Tensor | Alibi | None,
    sinks: Tensor | None,
    *values: Any,
) -> Tensor:
    """``function`` on a few rows; the operands are arguments, so that the checkpoint keeps them."""
    whole = replace(scores, query=query, key=key, bias=bias, sinks=sinks)
    with torch.autocast(query.device.type, enabled=False):
        return function(*_weights_of_rows(whole, rows), rows, *values)


def _weights_of_rows(scores: Scores, rows: slice) -> tuple[Tensor, Tensor]:
    """Weights and log-weights [B, H, r, S] of a few rows, differentiable in everything."""
    batch, heads, _, num_keys = scores.shape
    at, keys = (slice(0, batch), slice(0, heads), rows), slice(0, num_keys)
    x = scores.block(scores.queries(*at), *at, keys)
    if scores.mask is not None:
        x = x.masked_fill(~scores.visible(*at, keys), -torch.inf)
    row_max = x.detach().amax(-1, keepdim=True)
    row_max = torch.where(row_max == -torch.inf, 0.0, row_max)
    if scores.sinks is not None:
        row_max = torch.maximum(row_max, scores.sinks.detach().to(x.dtype).view(1, -1, 1, 1))
    centered = (x - row_max).to(scores.dtype)
    hidden = centered == -torch.inf
    weights = centered.exp()
    total = weights.sum(-1, keepdim=True)
    if scores.sinks is not None:
        total = total + (scores.sinks.to(x.dtype).view(1, -1, 1, 1) - row_max).to(scores.dtype).exp()
    total = torch.where(total > 0, total, 1.0)
    return weights / total, centered.masked_fill(hidden, LOWEST) - total.log()
