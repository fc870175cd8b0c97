"""Masks from tensors, and masks from a function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headscope.ops.masks.mask import Mask


def dense(visible: Tensor) -> Mask:
    """A mask from a bool tensor: [L, S], or 4-D and broadcastable to [B, H, L, S]. True: may attend."""
    _check_dense(visible)
    return _Dense(visible[None, None] if visible.dim() == 2 else visible)


def keep(is_text: Tensor) -> Mask:
    """A mask from a bool tensor [B, S], or [S] for all texts: True for keys that are text, False for padding.

    A tokenizer's ``attention_mask`` is ``masks.keep(attention_mask.bool())``. torch's ``key_padding_mask`` says the
    opposite: ``masks.keep(~key_padding_mask)``.

    Raises:
        ValueError: not a bool tensor of one or two axes.

    Example:
        >>> import torch, headscope
        >>> from headscope import masks
        >>> layer, x = headscope.MultiHeadAttention(16, 4), torch.randn(2, 3, 16)
        >>> is_text = torch.tensor([[True, True, True], [True, True, False]])
        >>> P = layer.matrix(x, mask=masks.causal() & masks.keep(is_text))
        >>> P[1, 0, 2, 2].item()  # padding is not seen
        0.0
    """
    if not isinstance(is_text, Tensor) or is_text.dtype != torch.bool or is_text.dim() not in (1, 2):
        got = f"{is_text.dtype} {tuple(is_text.shape)}" if isinstance(is_text, Tensor) else type(is_text).__name__
        raise ValueError(
            f"keep() got {got}: wanted a bool tensor [B, S], True for text; write masks.keep(attention_mask.bool())."
        )
    return _Dense((is_text if is_text.dim() == 2 else is_text[None])[:, None, None, :])


def packed(visible: Tensor) -> Mask:
    """The same as :func:`dense` in an eighth of the memory; ``visible`` must have all S keys."""
    _check_dense(visible)
    visible = visible[None, None] if visible.dim() == 2 else visible
    num_keys = visible.shape[-1]
    padded = torch.nn.functional.pad(visible, (0, -num_keys % 8)).unflatten(-1, (-1, 8))
    bits = torch.zeros(padded.shape[:-1], dtype=torch.uint8, device=visible.device)
    for bit in range(8):
        bits |= padded[..., bit].to(torch.uint8) << bit
    return _Packed(bits, num_keys)


def function(rule: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Mask:
    """Any rule of your own, ``rule(b, h, q_idx, kv_idx) -> bool tensor``, as for FlexAttention's ``mask_mod``."""
    return _Function(rule)


class _Dense(Mask):
    def __init__(self, visible: Tensor) -> None:
        self.visible = visible  # bool [1|B, 1|H, 1|L, 1|S]
        self._first = visible.shape[3] - visible.shape[2]  # absolute position of the first query row

    def check(self, shape: tuple[int, int, int, int]) -> None:
        for name, want, got in zip("BHLS", shape, self.visible.shape, strict=True):
            if got not in (1, want):
                raise ValueError(
                    f"dense() holds a mask of shape {tuple(self.visible.shape)}, but the attention is {shape} as "
                    f"(B, H, L, S): axis {name} must be 1 or {want}, not {got}."
                )
        if self.visible.shape[3] == 1 < min(self.visible.shape[2], shape[3]):
            raise ValueError(
                f"a dense mask with rows must have all its keys, got {tuple(self.visible.shape)} for {shape[3]} keys: "
                "expand its last axis to S."
            )

    def _rows(self, q: slice) -> slice:
        return slice(None) if self.visible.shape[2] == 1 else slice(q.start - self._first, q.stop - self._first)

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        visible = self.visible.to(q_idx.device)
        indices = (b, h, q_idx - self._first, kv_idx)
        index = [i if n > 1 else torch.zeros_like(i) for i, n in zip(indices, visible.shape, strict=True)]
        return visible[tuple(index)]

    def block(self, b: slice, h: slice, q: slice, k: slice, device: torch.device) -> Tensor:
        return self._cut(b, h, q, k).to(device)

    def _cut(self, b: slice, h: slice, q: slice, k: slice) -> Tensor:
        sizes, whole = self.visible.shape, slice(None)
        return self.visible[
            b if sizes[0] > 1 else whole,
            h if sizes[1] > 1 else whole,
            self._rows(q),
            k if sizes[3] > 1 else whole,
        ]

    def classify(self, b: slice, q: slice, k: slice) -> bool | None:
        part = self._cut(b, slice(None), q, k)
        if bool(part.all()):
            return True
        return None if bool(part.any()) else False

    def __repr__(self) -> str:
        return f"dense({tuple(self.visible.shape)})"


class _Packed(Mask):
    """A dense mask as bits, eight keys per byte; it is unpacked one block at a time."""

    def __init__(self, bits: Tensor, num_keys: int) -> None:
        self.bits, self.num_keys = bits, num_keys
        self._first = num_keys - bits.shape[2]  # absolute position of the first query row

    def check(self, shape: tuple[int, int, int, int]) -> None:
        wanted = (shape[0], shape[1], shape[2])
        fits = all(got in (1, want) for want, got in zip(wanted, self.bits.shape[:3], strict=True))
        if not fits or self.num_keys != shape[3] or self.bits.shape[3] != (shape[3] + 7) // 8:
            own = (*self.bits.shape[:3], self.num_keys)
            raise ValueError(f"packed() holds a mask of shape {own}, which does not fit an attention of shape {shape}.")

    def block(self, b: slice, h: slice, q: slice, k: slice, device: torch.device) -> Tensor:
        sizes, whole = self.bits.shape, slice(None)
        rows = whole if sizes[2] == 1 else slice(q.start - self._first, q.stop - self._first)
        left, right = k.start // 8, (k.stop + 7) // 8
        part = self.bits[b if sizes[0] > 1 else whole, h if sizes[1] > 1 else whole, rows, left:right]
        shifts = torch.arange(8, dtype=torch.uint8, device=part.device)
        visible = ((part.unsqueeze(-1) >> shifts) & 1).flatten(-2).bool()
        return visible[..., k.start - 8 * left : k.stop - 8 * left].to(device)

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        bits = self.bits.to(q_idx.device)
        indices = (b, h, q_idx - self._first, kv_idx // 8)
        index = [i if n > 1 else torch.zeros_like(i) for i, n in zip(indices, bits.shape, strict=True)]
        return ((bits[tuple(index)] >> (kv_idx % 8).to(torch.uint8)) & 1).bool()

    def classify(self, b: slice, q: slice, k: slice) -> bool | None:
        visible = self.block(b, slice(None), q, k, self.bits.device)
        if bool(visible.all()):
            return True
        return None if bool(visible.any()) else False

    def __repr__(self) -> str:
        return f"packed({(*self.bits.shape[:3], self.num_keys)})"


class _Function(Mask):
    def __init__(self, rule: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
        self.rule = rule

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        visible = self.rule(b, h, q_idx, kv_idx)
        if not isinstance(visible, Tensor) or visible.dtype != torch.bool:
            raise ValueError(
                f"the mask function returned {type(visible).__name__}, wanted a bool tensor (True: may attend)."
            )
        return visible

    def __repr__(self) -> str:
        return f"function({getattr(self.rule, '__name__', 'mask_mod')})"


def _check_dense(visible: Tensor) -> None:
    if not isinstance(visible, Tensor) or visible.dtype != torch.bool:
        got = f"a {visible.dtype} tensor" if isinstance(visible, Tensor) else type(visible).__name__
        raise ValueError(
            f"a dense mask must be a bool tensor (True: may attend), got {got}. Values to add to the scores go "
            "in bias=."
        )
    if visible.dim() not in (2, 4):
        raise ValueError(
            f"a dense mask must be [L, S] or 4-D as [B, H, L, S] (an axis may be 1), got {tuple(visible.shape)}: "
            "a 3-D mask does not say whether its first axis is the batch or the heads; use unsqueeze."
        )
