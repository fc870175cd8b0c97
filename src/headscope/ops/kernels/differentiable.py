"""Answers with gradients, a few query rows at a time.

They are computed again in the backward pass, so that nothing L×S is kept.
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

__all__ = ["by_rows"]

_AUTOGRAD = 1 << 21  # scores in one strip: several copies are alive


def by_rows(scores: Scores, ask: Callable[..., Tensor], *values: Tensor | None) -> Iterator[Tensor]:
    """Differentiable answers, a few query rows at a time: ``ask(weights, log_weights, rows, *values)``.

    Nothing of a strip is kept for the backward pass: it is computed again there, so that memory stays O(strip).
    All strips are equally wide: with widths of their own, freed memory is too small for the next, and it adds up.
    """
    batch, heads, queries, keys = scores.shape
    rows = max(1, min(queries, _AUTOGRAD // (batch * heads * keys)))
    if rows == queries:  # one strip: small enough to be kept
        yield _answer(scores, ask, slice(0, queries), scores.query, scores.key, scores.bias, scores.sinks, *values)
        return
    for q in range(0, queries, rows):
        span = slice(q, min(queries, q + rows))
        operands = (scores.query, scores.key, scores.bias, scores.sinks, *values)
        yield checkpoint(_answer, scores, ask, span, *operands, use_reentrant=False)


def _answer(
    scores: Scores,
    ask: Callable[..., Tensor],
    rows: slice,
    query: Tensor,
    key: Tensor,
    bias: Tensor | Alibi | None,
    sinks: Tensor | None,
    *values: Any,
) -> Tensor:
    """What ``ask`` says of a few rows; the operands come as arguments, so that the checkpoint knows them."""
    whole = replace(scores, query=query, key=key, bias=bias, sinks=sinks)
    with torch.autocast(query.device.type, enabled=False):
        return ask(*_weights_of_rows(whole, rows), rows, *values)


def _weights_of_rows(scores: Scores, rows: slice) -> tuple[Tensor, Tensor]:
    """Weights and log-weights [B, H, r, S] of a few rows, differentiable in everything."""
    every_batch, keys = slice(0, scores.shape[0]), slice(0, scores.shape[3])
    groups, heads = slice(0, scores.key.shape[1]), slice(0, scores.shape[1])
    queries = scores.queries(every_batch, groups, rows)
    x = scores.block(queries, every_batch, groups, rows, keys)
    if scores.mask is not None:
        x = x.masked_fill(~scores.visible(every_batch, heads, rows, keys), -torch.inf)
    top = x.detach().amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    if scores.sinks is not None:
        top = torch.maximum(top, scores.sinks.detach().to(x.dtype).view(1, -1, 1, 1))
    centered = x - top
    hidden = centered == -torch.inf
    weights = centered.exp()
    total = weights.sum(-1, keepdim=True)
    if scores.sinks is not None:
        total = total + (scores.sinks.to(x.dtype).view(1, -1, 1, 1) - top).exp()
    total = torch.where(total > 0, total, 1.0)
    return weights / total, centered.masked_fill(hidden, LOWEST) - total.log()
