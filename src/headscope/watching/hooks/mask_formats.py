"""Masks as libraries pass them (bool, additive, BlockMask, CausalBias), read as a rule, a bias, or both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from headscope.errors import UnsupportedAttention
from headscope.ops.masks import Mask, causal, compact, window

Read = tuple[Mask | None, Tensor | None]


def read_mask(mask: Any, shape: tuple[int, int, int, int]) -> Read:
    """A library's mask for an attention of ``shape`` (B, H, L, S), as (rule, bias); both None: all visible."""
    if mask is None:
        return None, None
    if hasattr(mask, "mask_mod"):
        mask = _from_block_mask(mask, shape)
    if hasattr(mask, "seq_len_kv"):
        return _from_causal_bias(mask, shape), None
    if isinstance(mask, Tensor) and type(mask) not in (Tensor, Parameter) and bool(mask.isnan().any()):
        raise UnsupportedAttention(
            f"an attention function got a {type(mask).__name__} as its mask, and the numbers in it are no mask: "
            "pass a tensor."
        )
    if not isinstance(mask, Tensor) or not 2 <= mask.dim() <= 4:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedAttention(
            f"an attention function got a mask of kind {got}: wanted a tensor of 2 to 4 axes, or a BlockMask."
        )
    mask = mask[(None,) * (4 - mask.dim())][..., : shape[3]]
    if mask.dtype == torch.bool or not mask.is_floating_point():
        return compact(mask.bool().expand(*mask.shape[:3], shape[3]), shape[0]), None
    return _from_additive(mask, shape)


def _from_additive(mask: Tensor, shape: tuple[int, int, int, int]) -> Read:
    """0 for visible and a huge negative number for hidden is a rule; anything between is a bias.

    Where a finite number hides all keys of a row, softmax makes the row uniform: it gets a bias of that number and no
    rule. A row of −inf has no weights.
    """
    lowest = torch.finfo(mask.dtype).min / 2
    visible = mask == 0
    hidden = mask <= lowest
    if not bool((visible | hidden).all()):
        return None, mask
    visible = visible.expand(*mask.shape[:3], shape[3])
    empty = ~visible.any(-1, keepdim=True)
    uniform = empty & (mask > -torch.inf).all(-1, keepdim=True)
    if not bool(uniform.any()):
        return compact(visible, shape[0]), None
    bias = torch.where(uniform, torch.finfo(torch.float32).min, 0.0)
    return compact(visible | uniform, shape[0]), bias


def _from_causal_bias(mask: Any, shape: tuple[int, int, int, int]) -> Mask:
    """The rule that torch's causal_lower_right() and causal_upper_left() stand for: their memory is uninitialised."""
    from torch.nn.attention.bias import CausalVariant

    if mask.variant == CausalVariant.LOWER_RIGHT or shape[2] == shape[3]:
        return causal()
    return window(None, shape[2] - shape[3])


def _from_block_mask(mask: Any, shape: tuple[int, int, int, int]) -> Tensor:
    from torch.nn.attention.flex_attention import create_mask

    batch, heads = mask.shape[0], mask.shape[1]
    return create_mask(mask.mask_mod, batch, heads, shape[2], shape[3], device=str(mask.kv_num_blocks.device))


def combine(first: Read, second: Read) -> Read:
    """Two masks together, added as torch adds them."""
    rule = first[0] if second[0] is None else second[0] if first[0] is None else first[0] & second[0]
    with torch.enable_grad():  # the graph behind them, if there is one
        bias = first[1] if second[1] is None else second[1] if first[1] is None else first[1] + second[1]
    return rule, bias
