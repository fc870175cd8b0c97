"""compact(): from the cells of a mask that a model built to a rule that is equal in every cell, or to bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from headscope.ops.masks.mask import Mask
from headscope.ops.masks.ranges import causal, documents, padding, window
from headscope.ops.masks.tensors import dense, packed

_ROWS = 512


def compact(visible: Tensor, batch: int) -> Mask | None:
    """The shortest rule equal to ``visible`` [1|B, 1|H, L, S] (bool) on every cell; None: everything is visible."""
    if bool(visible.all()):
        return None
    if visible.shape[1] > 1 and bool((visible == visible[:, :1]).all()):
        visible = visible[:, :1]
    if visible.shape[1] > 1 or visible.shape[2] == 1 or visible.shape[3] == 1:
        return _keys(visible[:, 0, 0], batch) if visible.shape[1] == visible.shape[2] == 1 else _bits(visible)
    keys = visible.any(dim=2)[:, 0]  # [1|B, S]: keys that some query may see
    for rule in _candidates(visible):
        candidate = rule if bool(keys.all()) else _combined(rule, _keys(keys, batch))
        if candidate is not None and _equal(candidate, visible):
            return candidate
    return _bits(visible)


def _bits(visible: Tensor) -> Mask:
    return packed(visible) if visible.shape[3] > 1 else dense(visible)


def _combined(rule: Mask | None, keys: Mask) -> Mask:
    return keys if rule is None else rule & keys


def _keys(keys: Tensor, batch: int) -> Mask:
    """A mask of which keys are text, [1|B, S]; padding() if the others are on one side."""
    num_keys = keys.shape[1]
    lengths = keys.sum(1).expand(batch)
    position = torch.arange(num_keys, device=keys.device)
    count = keys.sum(1, keepdim=True)
    if torch.equal(keys, position < count):
        return padding(lengths)
    if torch.equal(keys, position >= num_keys - count):
        return padding(lengths, "left", num_keys)
    return dense(keys[:, None, None, :])


def _candidates(visible: Tensor) -> Iterator[Mask | None]:
    """Rules to try: whole rows, causal (both alignments), windows, documents."""
    yield None
    yield causal()
    queries, keys = visible.shape[2:]
    if queries != keys:
        yield window(None, queries - keys)  # counted from the first key, as torch's is_causal does
    middle = queries // 2
    for row in (queries - 1, middle):
        row_keys = visible[-1, 0, row].nonzero().flatten()
        if len(row_keys):
            position = row + keys - queries
            left, right = position - int(row_keys[0]), int(row_keys[-1]) - position
            if left >= 0 and right >= 0:
                yield window(left, 0)
                yield window(left, right)
    if queries == keys and len(visible) == 1:
        starts = visible[0, 0].to(torch.uint8).argmax(-1)
        yield documents(starts)
        yield documents(starts) & causal()


def _equal(rule: Mask, visible: Tensor) -> bool:
    batch, _, queries, keys = visible.shape
    all_batch, one_head = slice(0, batch), slice(0, 1)
    for start in range(0, queries, _ROWS):
        stop = min(queries, start + _ROWS)
        rows = slice(start + keys - queries, stop + keys - queries)
        if not torch.equal(
            rule.block(all_batch, one_head, rows, slice(0, keys), visible.device).expand(batch, 1, stop - start, keys),
            visible[:, :, start:stop],
        ):
            return False
    return True
