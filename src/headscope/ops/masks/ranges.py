"""Masks that are rules on positions: causal, windowed, prefix, padding, documents."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from headscope.ops.masks.mask import Mask


def causal() -> Mask:
    """Each query sees the keys at its own position and before it."""
    return _Window(None, 0)


def sliding_window(left: int, right: int = 0) -> Mask:
    """Each query sees keys from ``left`` positions before it to ``right`` after it, itself included."""
    if left < 0 or right < 0:
        raise ValueError(f"sliding_window() got left={left}, right={right}: both count positions, from 0 up.")
    return _Window(int(left), int(right))


def window(left: int | None, right: int | None) -> Mask:
    """The general band: kv_idx in [q_idx − left, q_idx + right]; None for no limit, negative to leave keys out."""
    return _Window(left, right)


def prefix(n: int) -> Mask:
    """The first n keys are visible to every query; combined with causal() it makes a prefix language model."""
    if n < 0:
        raise ValueError(f"prefix() got {n}: it counts keys, from 0 up.")
    return _Prefix(int(n))


def padding(lengths: Sequence[int] | Tensor, side: str = "right", num_keys: int | None = None) -> Mask:
    """Hides keys that are padding: batch row b has ``lengths[b]`` keys of text.

    Args:
        lengths: B whole numbers.
        side: where the padding is, "right" or "left"; "left" needs ``num_keys``.
        num_keys: S, the number of keys with the padding.

    Raises:
        ValueError: negative lengths, an unknown side, or left padding without ``num_keys``.
    """
    lengths = torch.as_tensor(lengths, dtype=torch.int64).cpu()
    if lengths.dim() != 1 or bool((lengths < 0).any()):
        raise ValueError(
            f"padding() got lengths {_short(lengths)}: wanted one whole number from 0 up for each batch row."
        )
    if side not in ("left", "right"):
        raise ValueError(f"padding() got side={side!r}: it is 'left' or 'right'.")
    if side == "left" and num_keys is None:
        raise ValueError("padding(side='left') counts from the end: pass num_keys=S, too.")
    return _Padding(lengths, side, num_keys)


def documents(ids: Sequence[int] | Tensor) -> Mask:
    """Positions see each other only inside one document: ``ids`` is [S] or [B, S], one id per position."""
    ids = torch.as_tensor(ids, dtype=torch.int64).cpu()
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(f"documents() got ids of shape {tuple(ids.shape)}: wanted [S] or [B, S].")
    return _Documents(ids)


class _Window(Mask):
    """kv_idx in [q_idx − left, q_idx + right]; None means no limit on that side."""

    def __init__(self, left: int | None, right: int | None) -> None:
        self.left, self.right = left, right
        self.is_causal = left is None and right == 0

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        ahead = kv_idx - q_idx
        visible = torch.ones_like(ahead, dtype=torch.bool)
        if self.right is not None:
            visible = ahead <= self.right
        return visible if self.left is None else visible & (ahead >= -self.left)

    def classify(self, b: slice, q: slice, k: slice) -> bool | None:
        nearest, farthest = k.start - (q.stop - 1), (k.stop - 1) - q.start  # extremes of kv_idx − q_idx
        if self.right is not None and nearest > self.right:
            return False
        if self.left is not None and farthest < -self.left:
            return False
        inside_right = self.right is None or farthest <= self.right
        inside_left = self.left is None or nearest >= -self.left
        return True if inside_right and inside_left else None

    def block_key(self, q: slice, k: slice) -> Hashable:
        return k.start - q.start, q.stop - q.start, k.stop - k.start

    def __repr__(self) -> str:
        if self.is_causal:
            return "causal()"
        if self.left is None or self.right is None or min(self.left, self.right) < 0:
            return f"window({self.left}, {self.right})"
        return f"sliding_window({self.left}, right={self.right})"


class _Prefix(Mask):
    def __init__(self, n: int) -> None:
        self.n = n

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx < self.n) & torch.ones_like(q_idx, dtype=torch.bool)

    def classify(self, b: slice, q: slice, k: slice) -> bool | None:
        if k.stop <= self.n:
            return True
        return False if k.start >= self.n else None

    def __repr__(self) -> str:
        return f"prefix({self.n})"


class _Padding(Mask):
    """Keys that are text: the first (or last) ``lengths[b]`` of ``num_keys``."""

    def __init__(self, lengths: Tensor, side: str, num_keys: int | None) -> None:
        self.lengths, self.side, self.num_keys = lengths, side, num_keys

    def _bounds(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        if self.side == "right":
            return torch.zeros_like(lengths), lengths
        return self._keys() - lengths, torch.full_like(lengths, self._keys())

    def _keys(self) -> int:
        assert self.num_keys is not None  # the constructor asks for it where it is needed
        return self.num_keys

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        start, stop = self._bounds(self.lengths.to(b.device)[b])
        return (kv_idx >= start) & (kv_idx < stop) & torch.ones_like(q_idx, dtype=torch.bool)

    def classify(self, b: slice, q: slice, k: slice) -> bool | None:
        start, stop = self._bounds(self.lengths[b])
        if bool(((start <= k.start) & (k.stop <= stop)).all()):
            return True
        return False if bool(((k.stop <= start) | (stop <= k.start)).all()) else None

    def check(self, shape: tuple[int, int, int, int]) -> None:
        if len(self.lengths) != shape[0]:
            raise ValueError(
                f"padding() has {len(self.lengths)} lengths, but the batch has {shape[0]} rows: give one per row."
            )
        if bool((self.lengths > shape[3]).any()):
            raise ValueError(f"padding() says {int(self.lengths.max())} keys are text, but there are only {shape[3]}.")
        if self.num_keys is not None and self.num_keys != shape[3]:
            raise ValueError(f"padding() was made for {self.num_keys} keys, but there are {shape[3]}.")

    def __repr__(self) -> str:
        return f"padding({_short(self.lengths)}, side={self.side!r})"


class _Documents(Mask):
    def __init__(self, ids: Tensor) -> None:
        self.ids = ids  # [1 or B, S]
        steps = ids[:, 1:] - ids[:, :-1]
        self.ascending = bool((steps >= 0).all())

    def _pick(self, b: Tensor, position: Tensor) -> Tensor:
        ids = self.ids.to(position.device)
        return ids[b if len(ids) > 1 else torch.zeros_like(b), position]

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self._pick(b, q_idx) == self._pick(b, kv_idx)

    def classify(self, b: slice, q: slice, k: slice) -> bool | None:
        ids = self.ids[b] if len(self.ids) > 1 else self.ids
        queries, keys = ids[:, q], ids[:, k]
        if self.ascending:
            low_q, high_q, low_k, high_k = queries[:, 0], queries[:, -1], keys[:, 0], keys[:, -1]
        else:
            low_q, high_q, low_k, high_k = queries.amin(1), queries.amax(1), keys.amin(1), keys.amax(1)
        if bool(((high_k < low_q) | (high_q < low_k)).all()):
            return False
        same = (low_q == high_q) & (low_k == high_k) & (low_q == low_k)
        return True if bool(same.all()) else None

    def check(self, shape: tuple[int, int, int, int]) -> None:
        if shape[2] > shape[3]:
            raise ValueError(
                f"documents() needs an id per position, but there are {shape[2]} queries and only "
                f"{shape[3]} keys: queries are the last of the key positions."
            )
        if self.ids.shape[1] != shape[3] or self.ids.shape[0] not in (1, shape[0]):
            raise ValueError(
                f"documents() holds ids of shape {tuple(self.ids.shape)}, but there are {shape[0]} batch rows of "
                f"{shape[3]} positions: give ids of shape [S] or [B, S], one for each position."
            )

    def __repr__(self) -> str:
        return f"documents({int(self.ids.unique().numel())} documents)"


def _short(values: Tensor) -> str:
    listed = values.flatten().tolist()
    return str(listed) if len(listed) <= 8 else f"[{', '.join(map(str, listed[:6]))}, … {len(listed)} in all]"
