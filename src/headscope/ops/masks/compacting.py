"""From a mask that a model built, cell by cell, to the rule it followed: proved equal, or kept as bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from headscope.ops.masks.mask import Mask
from headscope.ops.masks.ranges import causal, documents, padding, window
from headscope.ops.masks.tensors import dense, packed

_ROWS = 512


def compact(seen: Tensor, batch: int) -> Mask | None:
    """The shortest rule equal to ``seen`` [1|B, 1|H, L, S] (bool) on every cell; None: everything is visible."""
    if bool(seen.all()):
        return None
    if seen.shape[1] > 1 and bool((seen == seen[:, :1]).all()):
        seen = seen[:, :1]
    if seen.shape[1] > 1 or seen.shape[2] == 1 or seen.shape[3] == 1:
        return _keys(seen[:, 0, 0], batch) if seen.shape[1] == seen.shape[2] == 1 else _bits(seen)
    keys = seen.any(dim=2)[:, 0]  # [1|B, S]: keys that anybody may see
    for rule in _candidates(seen):
        candidate = rule if bool(keys.all()) else _joined(rule, _keys(keys, batch))
        if candidate is not None and _equal(candidate, seen):
            return candidate
    return _bits(seen)


def _bits(seen: Tensor) -> Mask:
    return packed(seen) if seen.shape[3] > 1 else dense(seen)


def _joined(rule: Mask | None, keys: Mask) -> Mask:
    return keys if rule is None else rule & keys


def _keys(keys: Tensor, batch: int) -> Mask:
    """Which keys are text, [1|B, S], as padding on one side if it is that."""
    num_keys = keys.shape[1]
    lengths = keys.sum(1).expand(batch)
    here = torch.arange(num_keys, device=keys.device)
    count = keys.sum(1, keepdim=True)
    if torch.equal(keys, here < count):
        return padding(lengths)
    if torch.equal(keys, here >= num_keys - count):
        return padding(lengths, "left", num_keys)
    return dense(keys[:, None, None, :])


def _candidates(seen: Tensor) -> Iterator[Mask | None]:
    """Rules worth trying: whole rows, causal (both alignments), windows, documents."""
    yield None
    yield causal()
    queries, keys = seen.shape[2:]
    if queries != keys:
        yield window(None, queries - keys)  # counted from the first key: causal as torch's is_causal has it
    middle = queries // 2
    for row in (queries - 1, middle):
        visible = seen[-1, 0, row].nonzero().flatten()
        if len(visible):
            here = row + keys - queries
            left, right = here - int(visible[0]), int(visible[-1]) - here
            if left >= 0 and right >= 0:
                yield window(left, 0)
                yield window(left, right)
    if queries == keys and len(seen) == 1:
        starts = seen[0, 0].to(torch.uint8).argmax(-1)
        yield documents(starts)
        yield documents(starts) & causal()


def _equal(rule: Mask, seen: Tensor) -> bool:
    batch, _, queries, keys = seen.shape
    every, one = slice(0, batch), slice(0, 1)
    for start in range(0, queries, _ROWS):
        stop = min(queries, start + _ROWS)
        rows = slice(start + keys - queries, stop + keys - queries)
        if not torch.equal(
            rule.block(every, one, rows, slice(0, keys), seen.device).expand(batch, 1, stop - start, keys),
            seen[:, :, start:stop],
        ):
            return False
    return True
