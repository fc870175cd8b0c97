"""P @ value by torch's fused kernel, and what its inputs must be so that torch uses it.

Otherwise torch builds the L×S matrix without a warning. The CPU's fused kernel takes 4-D inputs with value width
equal to D, no dropout, and a mask that is not 3-D and needs no gradient. So values are padded or split to width D,
and masks other than causal are applied to one block of queries at a time.
This is the only file that knows torch's private ops of attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils.checkpoint import checkpoint

from headscope.ops.kernels.cpu import FEW_ROWS, is_emulated
from headscope.ops.kernels.differentiable import by_rows
from headscope.ops.scores import Scores

_MASK_BLOCK = 1 << 22  # cells of a mask in memory at once
_ROWS = 256  # queries in a block with a mask of its own
_AUTOGRAD = 1 << 24  # cells of masks that autograd may keep; above, the backward pass computes blocks again

Product = Callable[[Scores, Tensor, float], Tensor]
observers: list[Callable[[Product, Scores, Tensor, float], Tensor]] = []
"""Functions that product() calls instead of computing: they get the computation, call it, and return an output."""

# None in a torch without it: then the public function is called, which returns no log-sum-exp.
_flash_cpu: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_sdpa: Any = torch.ops.aten.scaled_dot_product_attention.default
_EXACT = (torch.float32, torch.float64)  # the kernel's log-sum-exp of half-precision scores is off by about 1e-5
_MASKED = 1e30  # a log-sum-exp of this size comes from finite numbers in a mask, not from scores


def is_fused(scores: Scores, dropout_p: float = 0.0) -> bool:
    """Whether the fused kernel can compute this attention; otherwise a few rows of weights are computed at a time."""
    trained_bias = scores.bias is not None and scores.bias.requires_grad and torch.is_grad_enabled()
    return scores.softcap is None and scores.sinks is None and dropout_p == 0.0 and not trained_bias


def product(scores: Scores, value: Tensor, dropout_p: float = 0.0) -> Tensor:
    """P @ value as [B, H, L, N], differentiable; value is [B, G, S, N] or [B, H, S, N]."""
    compute: Product = _product
    for observer in observers:
        compute = partial(observer, compute)
    return compute(scores, value, dropout_p)


def _product(scores: Scores, value: Tensor, dropout_p: float = 0.0) -> Tensor:
    dtype = value.dtype
    if not scores.shape[0]:  # a batch of 0, in which a mask hides nothing
        return fused_product(replace(scores, mask=None, bias=None), value)
    if is_emulated(value) and scores.shape[2] >= FEW_ROWS:
        scores, value = scores.at_least(torch.float32), value.float()
    if is_fused(scores, dropout_p):
        return fused_product(scores, value).to(dtype)
    return product_by_rows(scores, value, dropout_p).to(dtype)


def product_by_rows(scores: Scores, value: Tensor, dropout_p: float = 0.0) -> Tensor:
    """P @ value without the fused kernel, a few query rows at a time: float32, or float64 for float64."""
    return torch.cat(list(by_rows(scores, partial(_dropped_values, dropout_p), value)), 2)


def _dropped_values(dropout_p: float, weights: Tensor, _: Tensor, rows: slice, value: Tensor) -> Tensor:
    return weighted_values(F.dropout(weights, dropout_p) if dropout_p else weights, value)


def weighted_values(weights: Tensor, value: Tensor) -> Tensor:
    """Weights [B, H, L, S] times values [B, G, S, N], as [B, H, L, N]."""
    batch, heads, rows, _ = weights.shape
    grouped = weights.reshape(batch, value.shape[1], -1, weights.shape[-1])  # the heads of a group as rows of one
    return (grouped @ value.to(weights.dtype)).view(batch, heads, rows, -1)


class LogsumexpCapture(TorchDispatchMode):
    """Captures the log-sum-exp of each row, which the CPU's fused kernel returns beside its output."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._captured: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the op unchanged."""
        if func is _sdpa:  # in inference mode it comes whole: call its parts from here
            with self:
                return func.decompose(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if _flash_cpu is not None and func is _flash_cpu.default and args[0].dtype in _EXACT:
            self._captured.append(result[1])
        return result

    def for_shape(self, shape: Sequence[int]) -> Tensor | None:
        """The log-sum-exp of the one call as [B, H, L], NaN where it is not usable; None without exactly one call."""
        if len(self._captured) != 1:
            return None
        logsumexp = self._captured[0]
        packed = shape[2] == 1 and logsumexp.numel() == shape[0] * shape[1]  # the heads of a group as rows of one head
        if logsumexp.shape != torch.Size(shape[:3]) and not packed:
            return None
        logsumexp = logsumexp.detach().reshape(*shape[:3])
        unusable = (logsumexp == 0) | ~(logsumexp.abs() < _MASKED)  # 0: the row sees nothing
        return logsumexp.masked_fill(unusable, torch.nan)


@contextmanager
def capture_logsumexp(query: Tensor) -> Iterator[LogsumexpCapture]:
    """Capture the log-sum-exp while a function that calls the fused kernel runs on ``query``; its output is unchanged.

    Nothing is captured while another dispatch mode is active: that mode would see other ops than without us.
    """
    capture = LogsumexpCapture()
    with torch._C.DisableTorchFunction():
        supported = query.device.type == "cpu" and not query.is_nested
    if not supported or _get_current_dispatch_mode() is not None:
        yield capture
        return
    with capture:
        yield capture


def fused_product(scores: Scores, value: Tensor) -> Tensor:
    """The fused kernel's P @ value, [B, H, L, N]; any value width, any mask."""
    return _fused(scores, value, want_lse=False)[0]


def fused_product_with_logsumexp(scores: Scores, value: Tensor) -> tuple[Tensor, Tensor | None]:
    """The same, and the rows' log-sum-exp [B, H, L] if the kernel returns it, −inf for rows that see nothing.

    None with a bias: its log-sum-exp would be lost beside a finfo.min.
    """
    return _fused(scores, value, want_lse=_gives_lse(scores))


def _gives_lse(scores: Scores) -> bool:
    q = scores.query
    return (
        _flash_cpu is not None
        and q.device.type == "cpu"
        and q.dtype in _EXACT
        and scores.bias is None
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and (q.requires_grad or scores.key.requires_grad))
    )


def _fused(scores: Scores, value: Tensor, want_lse: bool) -> tuple[Tensor, Tensor | None]:
    query, key = _dense_rows(scores.query), _dense_rows(scores.key)
    if value.shape[1] % key.shape[1]:  # the kernel would divide by zero and end the process
        raise ValueError(
            f"value has {value.shape[1]} heads, key has {key.shape[1]}: the first must be a multiple of it."
        )
    if value.shape[1] != key.shape[1]:  # a value for each query head: repeat the keys, too
        key = key.repeat_interleave(value.shape[1] // key.shape[1], 1)
    width, size = value.shape[-1], query.shape[-1]
    if width == size:
        return _by_query_blocks(scores, query, key, _dense_rows(value), want_lse)
    outputs: list[Tensor] = []
    lse: Tensor | None = None
    for column in range(0, width, size):
        part = value[..., column : column + size]
        part = F.pad(part, (0, size - part.shape[-1])) if part.shape[-1] < size else part
        out, part_lse = _by_query_blocks(scores, query, key, _dense_rows(part), want_lse and lse is None)
        lse = part_lse if lse is None else lse
        outputs.append(out[..., : min(size, width - column)])
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)), lse


def _dense_rows(tensor: Tensor) -> Tensor:
    """The tensor with contiguous rows: the kernel assumes them without a check."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _by_query_blocks(
    scores: Scores, query: Tensor, key: Tensor, value: Tensor, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    batch, heads, queries, keys = scores.shape
    mask, bias = scores.mask, scores.bias
    if mask is None and (bias is None or (isinstance(bias, Tensor) and bias.shape[2] == 1)):
        bias = None if bias is None else bias.to(scores.dtype)
        return _kernel(query, key, value, bias, False, scores.scale, want_lse)
    if mask is not None and mask.is_causal and bias is None and queries == keys > 1:
        return _kernel(query, key, value, None, True, scores.scale, want_lse)
    per_row = keys * (batch * heads if bias is not None else batch)
    rows = max(1, min(_ROWS, _MASK_BLOCK // per_row))
    recompute = torch.is_grad_enabled() and per_row * queries > _AUTOGRAD
    block = partial(checkpoint, _query_block, use_reentrant=False) if recompute else _query_block
    outputs, row_lses = [], []
    for q in range(0, queries, rows):
        span = slice(q, min(queries, q + rows))
        out, lse = block(scores, query, key, value, span, want_lse)
        outputs.append(out)
        row_lses.append(lse)
    known = [lse for lse in row_lses if lse is not None]
    return torch.cat(outputs, 2), (torch.cat(known, 2) if len(known) == len(outputs) else None)


def _query_block(
    scores: Scores, query: Tensor, key: Tensor, value: Tensor, rows: slice, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """One block of queries against the keys between the first and the last that any of them may see."""
    all_batch = slice(0, scores.shape[0])
    spans = scores.spans(all_batch, rows)
    part = query[:, :, rows]
    spans = spans or [(0, 1, True)]  # nothing visible: one hidden key, so that gradients exist and are zero
    keys = slice(spans[0][0], spans[-1][1])
    all_visible = len(spans) == 1 and not spans[0][2]
    mask = None
    if not all_visible:
        mask = scores.visible(all_batch, slice(0, scores.shape[1]), rows, keys)
    empty_rows = None
    if mask is not None and not bool((has_keys := mask.any(-1, keepdim=True)).all()):
        empty_rows = ~has_keys  # set to zero below, whatever the kernel returns for such rows
        mask = mask | empty_rows
    if scores.bias is not None:
        bias = scores.bias_block(all_batch, slice(0, scores.shape[1]), rows, keys)
        mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
    out, lse = _kernel(part, key[:, :, keys], value[:, :, keys], mask, False, scores.scale, want_lse)
    if empty_rows is not None:
        out = out.masked_fill(empty_rows, 0)
        lse = None if lse is None else lse.masked_fill(empty_rows.squeeze(-1), -torch.inf)
    return out, lse


def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    if scale <= 0:  # the kernel scales after hiding, and −∞ · −1 is +∞
        query, scale = query * (0.0 if scale == 0 else -1.0), -scale or 1.0
    if want_lse and _flash_cpu is not None:
        if mask is not None:
            mask = torch.zeros((), dtype=query.dtype).masked_fill(~mask, -torch.inf)
        out, lse = _flash_cpu(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
        return out, lse
    grouped = bool(query.shape[1] != key.shape[1])  # torch.jit.trace makes it a tensor
    mask = None if mask is None else mask.detach()
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return out, None
