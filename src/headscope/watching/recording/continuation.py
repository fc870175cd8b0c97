"""The keys of a call: those that are there at all, and how they go on from the keys of the call before it."""

from __future__ import annotations

import torch
from torch import Tensor

from headscope.ops.masks import compact
from headscope.ops.scores import Scores, make_scores

__all__ = ["follows", "same", "without_blank_cache"]


def without_blank_cache(scores: Scores) -> Scores:
    """Without the keys of a preallocated cache that nothing was written to yet: hidden, and exactly zero.

    A row that is hidden whole by a finite number is even over all keys: it does not count as one that sees them.
    """
    batch, heads, queries, keys = scores.shape
    if scores.mask is None or queries >= keys:
        return scores
    every_b, every_h, rows = slice(0, batch), slice(0, heads), slice(0, queries)
    bias = scores.bias_tensor
    whole = None if bias is None else (bias <= torch.finfo(torch.float32).min / 2).all(-1, keepdim=True)
    stop = keys
    while stop > queries:
        part = slice(max(queries, stop - 64), stop)
        visible = scores.visible(every_b, every_h, rows, part)
        used = (visible if whole is None else visible & ~whole).flatten(0, 2).any(0)
        if bool(used.any()):
            stop = part.start + int(used.nonzero()[-1]) + 1
            break
        stop = part.start
    if stop == keys or bool(scores.key[:, :, stop:].any()):
        return scores
    seen = scores.visible(every_b, every_h, rows, slice(0, stop))
    seen = seen.expand(-1, -1, queries, -1)
    if bias is not None and bias.shape[3] > 1:
        bias = bias[..., :stop]
    mask = compact(seen, batch)
    return make_scores(scores.query, scores.key[:, :, :stop], mask, bias, scores.scale, scores.softcap, scores.sinks)


def follows(held: Tensor, slid: bool, scores: Scores) -> tuple[str, int] | None:
    """How a call's keys go on from the keys held before it, see :meth:`SiteCalls.continues`."""
    _, _, rows, keys = scores.shape
    size = held.shape[2]
    if scores.key.shape[:2] != held.shape[:2]:
        return None
    if keys == size and same(scores.key, held):
        return "cross", keys
    shared = keys - rows
    if 0 < shared <= size and same(scores.key[:, :, :shared], held[:, :, size - shared :]):
        return "grow", shared
    if 0 < shared < size and not slid and same(scores.key[:, :, :shared], held[:, :, :shared]):
        return "cut", shared
    return None


def same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are equal in shape and content."""
    return first.shape == second.shape and torch.equal(first, second)
