"""The report of an attention call that ran: it is read, proved, edited, and passed to the watches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from headscope.errors import HeadscopeError, UnsupportedAttention, is_out_of_memory
from headscope.ops.scores import Scores
from headscope.watching.hooks.call import AttentionCall, Output
from headscope.watching.hooks.proof import Proved, prove
from headscope.watching.hooks.watches import Forward, Watch, active_watches, unwatched, within_call, without_modes


def report(result: Any, read: Callable[[], Any]) -> Any:
    """What the model goes on with: ``read()``, which reports the call, or ``result`` where the call cannot be read.

    Then each watch keeps the error until it closes. Exceptions of the user's own callback pass.
    """
    watches = active_watches()
    try:
        with without_modes():
            result = read()
    except Exception as error:
        for watch in watches:
            watch.fail(_as_ours(error))
    for watch in watches:
        forward = watch.forward
        if watch.callback is None or watch.error is not None or forward is None or forward.call is None:
            continue
        call, forward.call = forward.call, None
        with within_call(), without_modes():
            watch.callback(call, forward)
    return result


def _as_ours(error: Exception) -> Exception:
    if isinstance(error, HeadscopeError) or is_out_of_memory(error):
        return error
    inside = "" if torch._C._functorch.maybe_current_level() is None else " inside torch.func (vmap, grad, jvp)"
    text = f"an attention call{inside} cannot be read ({type(error).__name__}: {error}), so no weights are shown."
    ours = UnsupportedAttention(text)
    ours.__cause__ = error
    return ours


def report_call(
    module: nn.Module | None,
    way: str,
    candidates: Callable[[Forward], Iterable[Scores]],
    value: Tensor,
    output: Output,
    dropout_p: float = 0.0,
    suffix: str = "",
    valid: Tensor | None = None,
    logsumexp: Tensor | None = None,
    cross: bool = False,
) -> AttentionCall:
    """An attention call has run: prove it, edit it, pass it to the watches. Returns the call as edited.

    ``logsumexp`` [B, H, L] is what its kernel gave, if it gave any; the proof is made with it. ``cross``: the keys are
    known to be another sequence's.

    Raises:
        ProofError: no candidate reading explains the output; UnsupportedAttention: an edit under dropout.
    """
    pairs = [(watch, watch.forward) for watch in active_watches() if watch.forward is not None]
    names = [(watch.name_of(module) + suffix).removeprefix(".") for watch, _ in pairs]
    first = pairs[0][1]
    with unwatched():
        if dropout_p:
            reading = Proved(next(iter(candidates(first))), None, None, None)
        else:
            text = valid if valid is not None else first.valid
            reading = prove(names[0] or "the model", candidates(first), value, output, text, logsumexp)
    call = AttentionCall(
        names[0],
        0,
        way,
        reading.scores,
        value,
        output,
        dropout_p,
        reading.difference,
        reading.rounded_difference,
        is_cross=cross or _is_cross(module, first, reading.scores),
        logsumexp=reading.logsumexp,
    )
    with within_call():
        for (watch, forward), name in zip(pairs, names, strict=True):
            occurrence = forward.counts.get(name, 0)
            forward.counts[name] = occurrence + 1
            forward.number = watch.number_of(name, occurrence)
            if watch.edit is not None:
                with _collecting(watch):
                    call = watch.edit(call.at(name, occurrence), forward)
        for (watch, forward), name in zip(pairs, names, strict=True):
            own = call.at(name, forward.counts[name] - 1)
            if watch.on_call is not None and watch.error is None:
                with _collecting(watch):
                    watch.on_call(own, forward)
            forward.call = None if watch.callback is None else own
    return call


@contextmanager
def _collecting(watch: Watch) -> Iterator[None]:
    """An error in what a watch does with a call is kept until it closes."""
    try:
        yield
    except Exception as error:
        watch.fail(error)


def _is_cross(module: nn.Module | None, forward: Forward, scores: Scores) -> bool:
    """Whether the module says so or got another sequence, or it is not causal and has another number of keys."""
    if getattr(module, "is_cross", False) or (forward.stack and forward.stack[-1] in forward.cross_modules):
        return True
    return scores.shape[2] != scores.shape[3] and getattr(module, "is_causal", None) is False


def autocast_operands(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The operands as the kernel receives them: autocast converts float32 to its own dtype first."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.dtype == torch.float32 else t for t in tensors)


def with_output(call: AttentionCall, heads: Tensor, scores: Scores | None = None) -> AttentionCall:
    """The call with other head outputs [B, H, L, Dv], and other weights if ``scores`` are given."""
    raw = call.output.replace_heads(heads)
    output = replace(call.output, raw=raw, heads=heads)
    if scores is None:
        return replace(call, output=output, edited=True)
    return replace(call, output=output, scores=scores, logsumexp=None, edited=True)
