"""The hook for transformers: its lookup of attention functions is wrapped; the function runs unchanged."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from headscope.errors import UnsupportedAttention
from headscope.ops.kernels.fused import LogsumexpCapture, capture_logsumexp
from headscope.ops.masks import causal
from headscope.ops.scores import Scores, make_scores
from headscope.watching.hooks.call import Output
from headscope.watching.hooks.mask_formats import Read, combine, read_mask
from headscope.watching.hooks.reporting import autocast_operands, report, report_call
from headscope.watching.hooks.sdpa import causal_from_the_top
from headscope.watching.hooks.watches import Forward, active_watches, cached, within_call

_ORIGINAL: dict[str, Any] = {}
_OPERANDS = ("module", "query", "key", "value", "attention_mask")
_PAGED = ("read_index", "block_table")  # continuous batching: texts that share rows, and pages of a cache
_SPARSE = ("indices", "block_indices")  # choices of keys, which are in the mask where attention is eager or sdpa


def install() -> None:
    """Wrap the lookup, if transformers is there at all."""
    if "transformers" not in sys.modules:
        return
    from transformers.modeling_utils import AttentionInterface

    if "lookup" in _ORIGINAL:
        return
    original = AttentionInterface.get_interface
    _ORIGINAL["lookup"] = original

    @wraps(original)
    def get_interface(self: Any, attn_implementation: str, default: Any) -> Any:
        function = original(self, attn_implementation, default)
        return _watched(function, attn_implementation or "eager") if active_watches() else function

    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign]


def remove() -> None:
    """Put the lookup back."""
    if "lookup" in _ORIGINAL:
        from transformers.modeling_utils import AttentionInterface

        AttentionInterface.get_interface = _ORIGINAL.pop("lookup")  # type: ignore[method-assign]


def _watched(function: Callable[..., Any], implementation: str) -> Callable[..., Any]:
    @wraps(function)
    def attention(*args: Any, **kwargs: Any) -> Any:
        if not active_watches():
            return function(*args, **kwargs)
        arguments = dict(zip(_OPERANDS, args, strict=False)) | kwargs
        capturing = capture_logsumexp(arguments["query"]) if implementation == "sdpa" else nullcontext()
        with within_call(), capturing as capture:
            result = function(*args, **kwargs)
        return report(result, lambda: _report(implementation, result, arguments, capture))

    return attention


def _report(implementation: str, result: Any, arguments: dict[str, Any], capture: LogsumexpCapture | None) -> Any:
    output, weights = result[0], result[1] if len(result) > 1 else None
    module: nn.Module = arguments["module"]
    if implementation not in ("eager", "sdpa") and any(arguments.get(k) is not None for k in _SPARSE):
        raise UnsupportedAttention(
            f"{type(module).__name__} chooses its keys inside {implementation!r}, where they cannot be seen: "
            'use model.set_attn_implementation("sdpa").'
        )
    if any(arguments.get(k) is not None for k in _PAGED):
        raise UnsupportedAttention(
            f"{type(module).__name__} runs in continuous batching (generate_batch), where texts share rows and a paged "
            "cache, so that rows and keys cannot be told apart by text: use model.generate()."
        )
    query, key, value = autocast_operands(arguments["query"], arguments["key"], arguments["value"])
    shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])

    def candidates(forward: Forward) -> Iterator[Scores]:
        for sinks in _sinks(implementation, arguments, shape):
            for rule, bias in _masks(forward, implementation, arguments, shape):
                yield make_scores(query, key, rule, bias, arguments.get("scaling"), arguments.get("softcap"), sinks)

    dropout = float(arguments.get("dropout") or 0.0)
    if implementation == "eager" and not module.training:
        dropout = 0.0
    logsumexp = None if capture is None else capture.for_shape(shape)
    call = report_call(
        module, "huggingface", candidates, value, _output(output, shape, value), dropout, logsumexp=logsumexp
    )
    if call.output.raw is output:
        return result
    if isinstance(weights, Tensor) and weights.shape == call.shape:
        weights = call.matrix().dense(limit=weights.numel() * 8).to(weights.dtype)
    return (call.output.raw, weights, *result[2:])


def _output(output: Tensor, shape: tuple[int, int, int, int], value: Tensor) -> Output:
    """Transformers' functions return P @ V as [B, L, H, Dv]."""
    queries, heads = shape[2], shape[1]
    view = output.view(output.shape[0], queries, heads, -1)

    def write(new: Tensor) -> Tensor:
        return new.transpose(1, 2).reshape(output.shape)

    return Output(output, lambda x, b, r: x, lambda b, r: view[b, r], write, view.transpose(1, 2))


def _sinks(implementation: str, arguments: dict[str, Any], shape: tuple[int, int, int, int]) -> Iterator[Tensor | None]:
    """Readings of the sink logits: the argument, the module's own (some read only that), none."""
    sinks = arguments.get("s_aux")
    if sinks is None and implementation != "sdpa":
        sinks = getattr(arguments["module"], "sinks", None)
    if isinstance(sinks, Tensor):
        if sinks.numel() != shape[1]:
            raise UnsupportedAttention(
                f"{type(arguments['module']).__name__} has attention sinks of shape {tuple(sinks.shape)}; "
                f"one for each of the {shape[1]} heads can be read, not one for each query."
            )
        yield sinks
        if implementation != "eager":
            yield None
    else:
        yield None


def _masks(
    forward: Forward, implementation: str, arguments: dict[str, Any], shape: tuple[int, int, int, int]
) -> Iterator[Read]:
    """Readings of the mask, likeliest first; the proof decides between them."""
    mask, position_bias = arguments.get("attention_mask"), arguments.get("position_bias")
    extra: Read = (None, None)
    if isinstance(position_bias, Tensor):
        with torch.enable_grad():  # the graph behind it, if there is one
            extra = (None, position_bias[(None,) * (4 - position_bias.dim())][..., : shape[3]])
    if mask is not None:
        kind = (id(mask), shape)
        read: Read = cached(forward, kind, mask, lambda: read_mask(mask, shape))
        if extra[1] is not None and _is_bool(mask):
            yield combine(_uniform_where_hidden(mask, shape), extra)
        yield combine(read, extra)
        yield extra  # some eager functions ignore their mask
        return
    flag = arguments.get("is_causal")
    flag = getattr(arguments["module"], "is_causal", True) if flag is None else flag
    from_the_top = combine((causal_from_the_top(shape), None), extra)
    readings = [extra, from_the_top, combine((causal(), None), extra)]
    if flag and shape[2] > 1 and implementation != "eager":
        readings = [from_the_top, readings[2], extra]
    yield from readings


def _is_bool(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dtype == torch.bool


def _uniform_where_hidden(mask: Tensor, shape: tuple[int, int, int, int]) -> Read:
    """With a position bias, sdpa writes finfo.min where a bool mask hides: a fully hidden row becomes uniform."""
    lowest = torch.finfo(torch.float32).min
    return read_mask(torch.where(mask, 0.0, lowest), shape)
