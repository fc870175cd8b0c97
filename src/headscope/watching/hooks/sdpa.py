"""The hook for torch's scaled_dot_product_attention, also where it was imported by name."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from headscope.ops.kernels.fused import LogsumexpCapture, capture_logsumexp
from headscope.ops.masks import causal, padding, window
from headscope.ops.scores import Scores, make_scores
from headscope.watching.hooks.call import Output
from headscope.watching.hooks.mask_formats import Read, combine, read_mask
from headscope.watching.hooks.reporting import autocast_operands, report, report_call
from headscope.watching.hooks.watches import Forward, active_watches, cached, within_call

_local = threading.local()


class SdpaMode(TorchFunctionMode):
    """Gets every torch function, and reports calls of one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call it unchanged; report it if it is attention."""
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not active_watches():
            return func(*args, **kwargs)
        with within_call(), capture_logsumexp(args[0] if args else kwargs["query"]) as capture:
            output = func(*args, **kwargs)
        return report(output, lambda: _report(output, capture, *args, **kwargs))


def enter() -> None:
    """Push the mode: a watched model starts in this thread."""
    stack: list[SdpaMode] = _modes()
    mode = SdpaMode()
    _push_mode(mode)
    stack.append(mode)


def leave() -> None:
    """Pop it: the model ends."""
    stack = _modes()
    if stack:
        stack.pop()
        _pop_mode()


def _modes() -> list[SdpaMode]:
    if not hasattr(_local, "modes"):
        _local.modes = []
    modes: list[SdpaMode] = _local.modes
    return modes


@contextmanager
def suspended() -> Iterator[None]:
    """Our modes are off, unless there are others: torch.nn leaves its fast path when a mode is on."""
    stack = _get_current_function_mode_stack()
    own = [] if any(not isinstance(mode, SdpaMode) for mode in stack) else stack
    popped = [_pop_mode() for _ in own]
    before = getattr(_local, "suspended_modes", [])
    _local.suspended_modes = popped or before
    try:
        yield
    finally:
        _local.suspended_modes = before
        for mode in reversed(popped):
            _push_mode(mode)


@contextmanager
def resumed() -> Iterator[None]:
    """Inside :func:`suspended`, our modes are on again."""
    suspended_modes = getattr(_local, "suspended_modes", [])
    _local.suspended_modes = []
    for mode in reversed(suspended_modes):
        _push_mode(mode)
    try:
        yield
    finally:
        for _ in suspended_modes:
            _pop_mode()
        _local.suspended_modes = suspended_modes


def _report(
    output: Tensor,
    capture: LogsumexpCapture,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: int | float = 0.0,
    is_causal: bool = False,
    *,
    scale: int | float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    lengths = None
    if not query.is_nested and 0 in (*output.shape, key.shape[-2]):
        return output  # no query or no key
    if query.is_nested:
        query, lengths = unnest(query)
        (key, key_lengths), (value, _) = unnest(key), unnest(value)
    q, k, v = (four_axes(t) for t in autocast_operands(query, key, value))
    q, k, v = _broadcast(q, k, v)
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])

    def candidates(forward: Forward) -> Iterator[Scores]:
        kind = (id(attn_mask), shape, is_causal, lengths is None)
        read: Read = cached(forward, kind, attn_mask, lambda: read_mask(attn_mask, shape))
        if is_causal:
            read = combine(read, (causal_from_the_top(shape), None))
        if lengths is not None:
            read = combine(read, (padding(key_lengths), None))
        yield make_scores(q, k, *read, None if scale is None else float(scale))

    valid = None if lengths is None else torch.arange(shape[2]) < lengths[:, None]
    out, logsumexp = direct(output, lengths), capture.for_shape(shape)
    call = report_call(None, "sdpa", candidates, v, out, float(dropout_p), valid=valid, logsumexp=logsumexp)
    return call.output.raw


def _broadcast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Operands of one batch size, and a query for each head, where torch would stretch them."""
    batch, heads = (max(sizes) for sizes in zip(q.shape[:2], k.shape[:2], v.shape[:2], strict=True))
    groups = k.shape[1] if k.shape[1] == v.shape[1] else heads
    wanted = ((q, heads), (k, groups), (v, groups))
    q, k, v = (t if t.shape[:2] == (batch, n) else t.expand(batch, n, -1, -1) for t, n in wanted)
    return q, k, v


def causal_from_the_top(shape: tuple[int, int, int, int]) -> Any:
    """Torch's is_causal: aligned to the first key, whatever the number of keys."""
    return causal() if shape[2] == shape[3] else window(None, shape[2] - shape[3])


def four_axes(tensor: Tensor) -> Tensor:
    """[…, L, D] as [B, H, L, D]: two axes in front are made, or more than two are joined."""
    if tensor.dim() < 4:
        return tensor[(None,) * (4 - tensor.dim())]
    return tensor.flatten(0, -4) if tensor.dim() > 4 else tensor


def unnest(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A nested [B, H, *, D], padded with zeros, and the lengths."""
    parts = [part.transpose(-2, -3) for part in tensor.unbind()]
    lengths = torch.tensor([len(part) for part in parts])
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True).transpose(1, 2), lengths


def direct(output: Tensor, lengths: Tensor | None = None) -> Output:
    """Of a function that returns P @ V as […, H, L, Dv]."""
    heads = four_axes(unnest(output)[0] if output.is_nested else output)

    def write(new: Tensor) -> Tensor:
        if lengths is None:
            return new.reshape(output.shape)
        parts = [new[b, :, : int(n)] for b, n in enumerate(lengths)]
        return renest(parts, output)

    return Output(output, _same, lambda b, r: heads[b, :, r], write, heads)


def renest(parts: list[Tensor], like: Tensor) -> Tensor:
    """Parts [H, n, D] as a nested tensor with the layout of ``like``."""
    if like.layout == torch.jagged:
        rows = torch.nested.as_nested_tensor([p.transpose(0, 1) for p in parts], layout=torch.jagged)
        return rows.transpose(1, 2)
    return torch.nested.as_nested_tensor(parts)


def _same(heads: Tensor, batch: Tensor, rows: Tensor) -> Tensor:
    return heads
