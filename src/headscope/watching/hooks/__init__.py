"""Attention calls of a running model, seen and altered: four ways in, one class of call.

1. transformers (:mod:`.huggingface`): its lookup of attention functions;
2. other torch code (:mod:`.sdpa`): scaled_dot_product_attention;
3. torch.nn (:mod:`.torch_nn`): nn.MultiheadAttention, nn.TransformerEncoderLayer;
4. our own attention() (:mod:`.ours`), whose operands are known.

A call is reported once, by the first that sees it. The model's own computation is neither changed nor switched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from headscope.watching.hooks import huggingface, ours, sdpa, torch_nn, watches
from headscope.watching.hooks.call import AttentionCall, Output
from headscope.watching.hooks.watches import Forward, Watch, unwatched, with_output

__all__ = ["AttentionCall", "Forward", "Output", "Watch", "unwatched", "watch", "with_output"]

_lock = threading.Lock()


@contextmanager
def watch(
    model: nn.Module,
    on_call: Callable[[AttentionCall, Forward], None] | None = None,
    *,
    edit: Callable[[AttentionCall, Forward], AttentionCall] | None = None,
    on_end: Callable[[Forward], None] | None = None,
) -> Iterator[Watch]:
    """See every attention call of ``model`` while the block runs; everything is put back at its end.

    Args:
        model: any module; calls are named as in its named_modules().
        on_call: called after each attention call, with the call and the forward that it is part of.
        edit: may return an altered call, with whose output the model continues.
        on_end: called when a forward of the model has ended.

    Raises:
        UnsupportedAttention: a compiled model, or an attention of a kind that cannot be read;
        ProofError: weights that do not lead to the output that the model's function returned.

    Example:
        >>> import torch
        >>> layer = torch.nn.MultiheadAttention(16, 4)
        >>> shapes = []
        >>> with watch(layer, lambda call, forward: shapes.append(tuple(call.shape))):
        ...     _ = layer(*[torch.randn(7, 2, 16)] * 3)
        >>> shapes
        [(2, 4, 7, 7)]
    """
    watcher = Watch(model, (sdpa.enter, sdpa.leave), on_call, edit, on_end)
    try:
        with _lock:
            watches._WATCHES.append(watcher)
            watcher.attach()
            huggingface.install()
            torch_nn.install(model)
            ours.install()
        yield watcher
    finally:
        with _lock:
            watcher.detach()
            watches._WATCHES.remove(watcher)
            if not watches._WATCHES:
                huggingface.remove()
                torch_nn.remove()
                ours.remove()
