"""Masks that come as tensors, or as a function of one's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headscope.ops.masks.mask import Mask


def dense(seen: Tensor) -> Mask:
    """A mask that exists as a bool tensor: [L, S], or 4-D and broadcastable to [B, H, L, S]. True: may attend."""
    _check_dense(seen)
    return _Dense(seen[None, None] if seen.dim() == 2 else seen)


def packed(seen: Tensor) -> Mask:
    """The same as :func:`dense`, held in an eighth of the memory; ``seen`` must have all S keys."""
    _check_dense(seen)
    held = seen[None, None] if seen.dim() == 2 else seen
    num_keys = held.shape[-1]
    padded = torch.nn.functional.pad(held, (0, -num_keys % 8)).unflatten(-1, (-1, 8))
    bits = torch.zeros(padded.shape[:-1], dtype=torch.uint8, device=held.device)
    for bit in range(8):
        bits |= padded[..., bit].to(torch.uint8) << bit
    return _Packed(bits, num_keys)


def function(rule: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Mask:
    """Any rule of your own, ``rule(b, h, q_idx, kv_idx) -> bool tensor``, as for FlexAttention's ``mask_mod``."""
    return _Function(rule)


class _Dense(Mask):
    def __init__(self, seen: Tensor) -> None:
        self.seen = seen  # bool [1|B, 1|H, 1|L, 1|S]
        self._first = seen.shape[3] - seen.shape[2]  # absolute position of the first query row

    def check(self, shape: tuple[int, int, int, int]) -> None:
        for name, want, got in zip("BHLS", shape, self.seen.shape, strict=True):
            if got not in (1, want):
                raise ValueError(
                    f"dense() holds a mask of shape {tuple(self.seen.shape)}, but the attention is {shape} as "
                    f"(B, H, L, S): axis {name} must be 1 or {want}, not {got}."
                )
        if self.seen.shape[3] == 1 < min(self.seen.shape[2], shape[3]):
            raise ValueError(
                f"a dense mask with rows must have all its keys, got {tuple(self.seen.shape)} for {shape[3]} keys: "
                "expand its last axis to S."
            )

    def _rows(self, q: slice) -> slice:
        return slice(None) if self.seen.shape[2] == 1 else slice(q.start - self._first, q.stop - self._first)

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        seen = self.seen.to(q_idx.device)
        picked = (b, h, q_idx - self._first, kv_idx)
        index = [i if n > 1 else torch.zeros_like(i) for i, n in zip(picked, seen.shape, strict=True)]
        return seen[tuple(index)]

    def block(self, b: slice, h: slice, q: slice, k: slice, device: torch.device) -> Tensor:
        return self._cut(b, h, q, k).to(device)

    def _cut(self, b: slice, h: slice, q: slice, k: slice) -> Tensor:
        sizes, every = self.seen.shape, slice(None)
        return self.seen[
            b if sizes[0] > 1 else every,
            h if sizes[1] > 1 else every,
            self._rows(q),
            k if sizes[3] > 1 else every,
        ]

    def classify(self, b: slice, q: slice, k: slice) -> bool | None:
        part = self._cut(b, slice(None), q, k)
        if bool(part.all()):
            return True
        return None if bool(part.any()) else False

    def __repr__(self) -> str:
        return f"dense({tuple(self.seen.shape)})"


class _Packed(Mask):
    """A dense mask held as bits, eight keys a byte; it is unpacked one block at a time."""

    def __init__(self, bits: Tensor, num_keys: int) -> None:
        self.bits, self.num_keys = bits, num_keys
        self._first = num_keys - bits.shape[2]  # absolute position of the first query row

    def check(self, shape: tuple[int, int, int, int]) -> None:
        wanted = (shape[0], shape[1], shape[2])
        fits = all(got in (1, want) for want, got in zip(wanted, self.bits.shape[:3], strict=True))
        if not fits or self.num_keys != shape[3] or self.bits.shape[3] != (shape[3] + 7) // 8:
            held = (*self.bits.shape[:3], self.num_keys)
            raise ValueError(
                f"packed() holds a mask of shape {held}, which does not fit an attention of shape {shape}."
            )

    def block(self, b: slice, h: slice, q: slice, k: slice, device: torch.device) -> Tensor:
        sizes, every = self.bits.shape, slice(None)
        rows = every if sizes[2] == 1 else slice(q.start - self._first, q.stop - self._first)
        left, right = k.start // 8, (k.stop + 7) // 8
        part = self.bits[b if sizes[0] > 1 else every, h if sizes[1] > 1 else every, rows, left:right]
        shifts = torch.arange(8, dtype=torch.uint8, device=part.device)
        seen = ((part.unsqueeze(-1) >> shifts) & 1).flatten(-2).bool()
        return seen[..., k.start - 8 * left : k.stop - 8 * left].to(device)

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        bits = self.bits.to(q_idx.device)
        picked = (b, h, q_idx - self._first, kv_idx // 8)
        index = [i if n > 1 else torch.zeros_like(i) for i, n in zip(picked, bits.shape, strict=True)]
        return ((bits[tuple(index)] >> (kv_idx % 8).to(torch.uint8)) & 1).bool()

    def classify(self, b: slice, q: slice, k: slice) -> bool | None:
        seen = self.block(b, slice(None), q, k, self.bits.device)
        if bool(seen.all()):
            return True
        return None if bool(seen.any()) else False

    def __repr__(self) -> str:
        return f"packed({(*self.bits.shape[:3], self.num_keys)})"


class _Function(Mask):
    def __init__(self, rule: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
        self.rule = rule

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        seen = self.rule(b, h, q_idx, kv_idx)
        if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
            raise ValueError(
                f"the mask function returned {type(seen).__name__}, wanted a bool tensor (True: may attend)."
            )
        return seen

    def __repr__(self) -> str:
        return f"function({getattr(self.rule, '__name__', 'mask_mod')})"


def _check_dense(seen: Tensor) -> None:
    if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
        got = f"a {seen.dtype} tensor" if isinstance(seen, Tensor) else type(seen).__name__
        raise ValueError(
            f"a dense mask must be a bool tensor (True: may attend), got {got}. Values to add to the scores go "
            "in bias=."
        )
    if seen.dim() not in (2, 4):
        raise ValueError(
            f"a dense mask must be [L, S] or 4-D as [B, H, L, S] (an axis may be 1), got {tuple(seen.shape)}: "
            "a 3-D mask does not say whether its first axis is the batch or the heads; use unsqueeze."
        )
