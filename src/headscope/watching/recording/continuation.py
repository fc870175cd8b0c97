"""The keys of a call: without those of a blank cache, and how they continue the keys of the call before."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from headscope.ops.masks import compact
from headscope.ops.scores import Scores, make_scores

__all__ = ["at_own_positions", "follows", "same", "without_blank_cache"]


def without_blank_cache(scores: Scores) -> Scores:
    """Without the keys of a preallocated cache that nothing was written to yet: hidden, and exactly zero.

    A row that is hidden whole by a finite number is uniform over all keys: it does not count as one that sees them.
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
    visible = scores.visible(every_b, every_h, rows, slice(0, stop)).expand(-1, -1, queries, -1)
    if bias is not None and bias.shape[3] > 1:
        bias = bias[..., :stop]
    mask = compact(visible, batch)
    return make_scores(scores.query, scores.key[:, :, :stop], mask, bias, scores.scale, scores.softcap, scores.sinks)


def at_own_positions(scores: Scores) -> Scores:
    """The same operands with queries that are the last of their keys: rows cut from a larger matrix may not be."""
    batch, heads, queries, keys = scores.shape
    if scores.origin == (0, 0, keys - queries):
        return scores
    mask = scores.mask
    if mask is not None:
        visible = scores.visible(slice(0, batch), slice(0, heads), slice(0, queries), slice(0, keys))
        mask = compact(visible.expand(-1, -1, queries, keys), batch)
    return replace(scores, mask=mask, bias=scores.bias_tensor, origin=(0, 0, keys - queries))


def follows(earlier: Tensor, dropped: bool, key: Tensor, rows: int) -> tuple[str, int] | None:
    """How the keys of a call of ``rows`` queries continue earlier ones, see :meth:`Site.continues`.

    ``dropped``: whether a sliding cache dropped keys before the earlier ones.
    """
    keys, size = key.shape[2], earlier.shape[2]
    if key.shape[:2] != earlier.shape[:2]:
        return None
    if keys == size and same(key, earlier):
        return "cross", keys
    shared = keys - rows
    if 0 < shared <= size and same(key[:, :, :shared], earlier[:, :, size - shared :]):
        return "grow", shared
    if 0 < shared < size and not dropped and same(key[:, :, :shared], earlier[:, :, :shared]):
        return "cut", shared
    return None


def same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are equal in shape and content."""
    return first.shape == second.shape and torch.equal(first, second)
