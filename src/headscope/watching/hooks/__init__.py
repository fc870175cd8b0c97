"""Where a running model's attention calls are seen and altered: four ways in, one kind of call out.

1. transformers (:mod:`.huggingface`): its lookup of attention functions;
2. other torch code (:mod:`.sdpa`): scaled_dot_product_attention;
3. torch.nn (:mod:`.torch_nn`): nn.MultiheadAttention, nn.TransformerEncoderLayer;
4. our own attention() (:mod:`.ours`), whose operands are known.

The first that applies sees a call; nothing of the model's own computation is changed or switched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from headscope.watching.hooks import huggingface, ours, sdpa, torch_nn, watches
from headscope.watching.hooks.call import AttentionCall, Output
from headscope.watching.hooks.watches import Forward, Watch, invisible, with_output

__all__ = ["AttentionCall", "Forward", "Output", "Watch", "invisible", "watch", "with_output"]

_lock = threading.Lock()
watches._ON_ENTER[:] = [sdpa.enter]
watches._ON_LEAVE[:] = [sdpa.leave]


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
        on_call: is told of each call, after it ran, and of the forward it is part of.
        edit: may return an altered call, whose output then goes on in the model.
        on_end: is told when a forward of the model has ended.

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
    watcher = Watch(model, on_call, edit, on_end)
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
