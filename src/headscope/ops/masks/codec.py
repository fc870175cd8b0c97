"""Masks as plain data for a file: names and numbers for JSON, and tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headscope.ops.masks.mask import Mask, _And, _Not, _Pair
from headscope.ops.masks.ranges import _Documents, _Padding, _Prefix, _Window, documents, padding, prefix, window
from headscope.ops.masks.sets import StackedStep, _Selection, _Stacked, stacked
from headscope.ops.masks.tensors import _Dense, _Packed, dense

_MAX_DEPTH = 64


def encode(mask: Mask | None, keep: Callable[[Tensor], str]) -> Any:
    """Plain data for a mask; ``keep`` stores a tensor and names it. Raises ValueError for a mask function."""
    if mask is None:
        return None
    if isinstance(mask, _Pair):
        kind = "and" if isinstance(mask, _And) else "or"
        return {kind: [encode(mask.left, keep), encode(mask.right, keep)]}
    if isinstance(mask, _Not):
        return {"not": encode(mask.mask, keep)}
    if isinstance(mask, _Window):
        return {"window": [mask.left, mask.right]}
    if isinstance(mask, _Prefix):
        return {"prefix": mask.n}
    if isinstance(mask, _Padding):
        return {"padding": mask.lengths.tolist(), "side": mask.side, "num_keys": mask.num_keys}
    if isinstance(mask, _Documents):
        return {"documents": keep(mask.ids)}
    if isinstance(mask, _Dense):
        return {"dense": keep(mask.visible)}
    if isinstance(mask, _Packed):
        return {"packed": keep(mask.bits), "num_keys": mask.num_keys}
    if isinstance(mask, _Selection):
        return {"chosen": mask.axis, "positions": list(mask.positions)}
    if isinstance(mask, _Stacked):
        return {"stacked": [_encode_step(step, keep) for step in mask.steps]}
    raise ValueError(
        f"{mask!r} is code, which a file cannot hold: make it a tensor first, masks.packed(mask.tensor(L, S))."
    )


def _encode_step(step: StackedStep, keep: Callable[[Tensor], str]) -> dict[str, Any]:
    return {
        "mask": encode(step.mask, keep),
        "rows": [step.rows.start, step.rows.stop],
        "query_shift": step.query_shift,
        "key_shift": step.key_shift,
        "num_keys": step.num_keys,
    }


def decode(data: Any, read: Callable[[str], Tensor], depth: int = 0) -> Mask | None:
    """The mask of such data; ``read`` gives a named tensor. Raises ValueError, KeyError, TypeError for other data."""
    if data is None:
        return None
    if depth > _MAX_DEPTH:
        raise ValueError(f"a mask nested more than {_MAX_DEPTH} deep")
    if "and" in data or "or" in data:
        left, right = (decode(part, read, depth + 1) for part in data["and" if "and" in data else "or"])
        if left is None or right is None:
            raise ValueError("a mask combined with no mask")
        return left & right if "and" in data else left | right
    if "not" in data:
        inner = decode(data["not"], read, depth + 1)
        if inner is None:
            raise ValueError("the negation of no mask")
        return ~inner
    if "stacked" in data:
        return stacked(_decode_step(step, read, depth) for step in data["stacked"])
    return _decode_leaf(data, read)


def _decode_step(data: Any, read: Callable[[str], Tensor], depth: int) -> StackedStep:
    start, stop = data["rows"]
    mask = decode(data["mask"], read, depth + 1)
    shifts = (int(data["query_shift"]), int(data["key_shift"]), int(data["num_keys"]))
    return StackedStep(mask, slice(int(start), int(stop)), *shifts)


def _decode_leaf(data: Any, read: Callable[[str], Tensor]) -> Mask:
    if "window" in data:
        left, right = (None if side is None else int(side) for side in data["window"])
        return window(left, right)
    if "prefix" in data:
        return prefix(int(data["prefix"]))
    if "padding" in data:
        return padding([int(n) for n in data["padding"]], str(data["side"]), data["num_keys"])
    if "documents" in data:
        return documents(read(data["documents"]))
    if "dense" in data:
        return dense(read(data["dense"]))
    if "packed" in data:
        bits = read(data["packed"])
        if bits.dtype != torch.uint8 or bits.dim() != 4:
            raise ValueError(f"packed mask bits of {bits.dtype}, {bits.dim()} axes")
        return _Packed(bits, int(data["num_keys"]))
    if "chosen" in data and data["chosen"] in ("heads", "queries", "keys"):
        return _Selection(data["chosen"], tuple(int(p) for p in data["positions"]))
    raise ValueError(f"a mask of unknown kind {sorted(data)[:4]}")
