"""The keys of a call: without unused cache slots, at which position, and how they continue those of the call before."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headscope.ops.masks import compact
from headscope.ops.scores import Scores, make_scores
from headscope.watching.hooks import AttentionCall


@dataclass(frozen=True)
class Continuation:
    """How the keys of a call continue those of the call before.

    In cross-attention they are the same keys. In self-attention a sliding cache may have dropped the first ``dropped``
    of the earlier keys, which stay part of the text; the last ``rejected`` (drafts) are no longer part of it. A
    quantized cache has ``rounded`` the earlier keys.
    """

    is_cross: bool = False
    dropped: int = 0
    rejected: int = 0
    rounded: bool = False


def without_unused_slots(call: AttentionCall, earlier: Tensor | None = None) -> Scores:
    """Without the last slots of a preallocated cache that hold no key of the text yet.

    They are hidden. Either they are zero, or they hold keys of an older, longer text: then the mask's own rule says
    where the text ends. Other hidden keys stay: those of another sequence, those of a cache that grew from ``earlier``
    (the keys of the call before), and those of our own attention, whose queries are the last of the keys.
    """
    scores = call.scores
    _, _, queries, keys = scores.shape
    if scores.mask is None or queries >= keys:
        return scores
    last = _last_visible(scores)
    stop = max(int(last.max()) + 1, queries)
    if stop < keys and bool(scores.key[:, :, stop:].any()):
        grown = earlier is not None and (earlier.shape[2] + queries == keys or same(scores.key, earlier))
        starts = () if call.is_cross or call.way == "headscope" or grown else _starts_of_rule(last)
        stop = max(stop, starts[0] + queries) if len(starts) == 1 else keys
    return scores if stop >= keys else _with_first_keys(scores, stop)


def first_position(scores: Scores) -> int | None:
    """The position of the first query of self-attention among its keys; None if it cannot be known.

    Queries are the last of the keys, unless the mask's own rule says otherwise.
    """
    _, _, queries, keys = scores.shape
    if scores.mask is None or queries >= keys:
        return max(0, keys - queries)
    last = _last_visible(scores)
    starts = _starts_of_rule(last)
    if len(starts) > 1:  # every text of the batch has come to another position
        return None
    if starts and starts[0] <= keys - queries:
        return starts[0]
    return keys - queries if int(last.max()) + 1 == keys else None


def _starts_of_rule(last: Tensor) -> tuple[int, ...]:
    """Each p for which, in some text, query i sees keys up to p + i: the positions of the first query.

    ``last`` [B, L] are the last visible keys, −1 for none. Padded queries see less, and those of a prefix more: p is
    what most queries give, at least two if there are two.
    """
    queries = last.shape[1]
    starts = torch.where(last < 0, -1 - queries, last) - torch.arange(queries, device=last.device)
    start = starts.mode(1).values
    known = ((starts == start[:, None]).sum(1) >= min(2, queries)) & (start >= 0)
    return tuple(start[known].unique().tolist())


def _last_visible(scores: Scores) -> Tensor:
    """The last key that each query sees in any head, [B, L]; −1 for none.

    A row that is hidden whole by a finite number is uniform over all keys: it does not count as one that sees them.
    """
    batch, heads, queries, keys = scores.shape
    bias = scores.bias_tensor
    uniform = None if bias is None else (bias <= torch.finfo(torch.float32).min / 2).all(-1, keepdim=True)
    last = torch.full((batch, queries), -1, device=scores.query.device)
    stop = keys
    while stop > 0 and bool((last < 0).any()):
        part = slice(max(0, stop - 256), stop)
        visible = scores.visible(slice(0, batch), slice(0, heads), slice(0, queries), part)
        seen = (visible if uniform is None else visible & ~uniform).any(1).expand(batch, queries, -1)
        newest = part.stop - 1 - seen.flip(-1).to(torch.uint8).argmax(-1)
        last = torch.where((last < 0) & seen.any(-1), newest, last)
        stop = part.start
    return last


def _with_first_keys(scores: Scores, stop: int) -> Scores:
    batch, heads, queries, _ = scores.shape
    visible = scores.visible(slice(0, batch), slice(0, heads), slice(0, queries), slice(0, stop))
    bias = scores.bias_tensor
    if bias is not None and bias.shape[3] > 1:
        bias = bias[..., :stop]
    mask = compact(visible.expand(-1, -1, queries, -1), batch)
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


def continuation(earlier: Tensor, key: Tensor, rows: int) -> Continuation | None:
    """How the keys of a call of ``rows`` queries continue earlier ones, by equal content; None: they do not.

    The new keys are the last ``rows``; those before them are found among the earlier keys, or are these, rounded.
    """
    keys, size = key.shape[2], earlier.shape[2]
    if key.shape[:2] != earlier.shape[:2]:
        return None
    if keys == size and same(key, earlier):
        return Continuation(is_cross=True)
    shared = keys - rows
    if not 0 < shared <= size:
        return None
    old = key[:, :, :shared]
    starts = [start for start in _starts(earlier, old) if same(old, earlier[:, :, start : start + shared])]
    for start in (size - shared, 0):  # where the same keys are there twice: all are there, or they are the first
        if start in starts:
            return Continuation(dropped=start, rejected=size - shared - start)
    if len(starts) == 1:
        return Continuation(dropped=starts[0], rejected=size - shared - starts[0])
    return Continuation(rounded=True) if shared == size and _is_rounded(earlier, old) else None


def _starts(earlier: Tensor, old: Tensor) -> list[int]:
    """Where the first of the old keys is among the earlier ones."""
    equal = (earlier[:, :, : earlier.shape[2] - old.shape[2] + 1] == old[:, :, :1]).all(-1).all(1).all(0)
    return [int(start) for start in equal.nonzero()]


def _is_rounded(earlier: Tensor, old: Tensor) -> bool:
    """Whether each key is near the earlier one: by less than half the variance of the keys (2 bits give a quarter)."""
    exact = earlier.float()
    spread = exact - exact.mean(2, keepdim=True) if exact.shape[2] > 1 else exact
    variance = spread.square().sum((1, 3)).mean(1, keepdim=True)  # of all heads together, [B, 1]
    return bool(((exact - old).square().sum((1, 3)) <= variance / 2).all())


def same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are equal in shape and content."""
    return first.shape == second.shape and torch.equal(first, second)
