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
from headscope.watching.hooks.reporting import with_output
from headscope.watching.hooks.watches import Edit, Forward, OnCall, Threads, Watch, unwatched

__all__ = [
    "OTHER_THREADS",
    "AttentionCall",
    "Forward",
    "Output",
    "Threads",
    "Watch",
    "unwatched",
    "watch",
    "with_output",
]

OTHER_THREADS = "the model attended in other threads only, and a watch sees the thread that opened it:"

_lock = threading.Lock()


@contextmanager
def watch(
    model: nn.Module,
    on_call: OnCall | None = None,
    *,
    edit: Edit | None = None,
    on_end: Callable[[Forward], None] | None = None,
    callback: OnCall | None = None,
    threads: Threads = "own",
) -> Iterator[Watch]:
    """See every attention call of ``model`` while the block runs; everything is put back at its end.

    After the start nothing of ours ends a forward: an error in reading a call, in ``on_call`` or in ``edit`` is kept,
    the model runs on unwatched, and the error is raised when the block ends.

    Args:
        model: any module; calls are named as in its named_modules().
        on_call: called after each attention call, with the call and the forward that it is part of.
        edit: may return an altered call, with whose output the model continues.
        on_end: called when a forward of the model has ended.
        callback: the user's own function, called last with each call; its exceptions end the forward.
        threads: "own": forwards in other threads are not seen and not altered; "all": they are.

    Raises:
        UnsupportedAttention: at the start, a compiled model; at the end, an attention of a kind that cannot be read;
        ProofError: at the end, weights that do not lead to the output that the model's function returned.

    Example:
        >>> import torch
        >>> layer = torch.nn.MultiheadAttention(16, 4)
        >>> shapes = []
        >>> with watch(layer, lambda call, forward: shapes.append(tuple(call.shape))):
        ...     _ = layer(*[torch.randn(7, 2, 16)] * 3)
        >>> shapes
        [(2, 4, 7, 7)]
    """
    watcher = Watch(model, (sdpa.enter, sdpa.leave), on_call, edit, on_end, callback, threads)
    try:
        with _lock:
            watches._WATCHES.append(watcher)
            watches.install()
            huggingface.install()
            torch_nn.install(model)
            ours.install()
        yield watcher
    except Exception as error:
        if watcher.error is not None:
            error.add_note(f"The model was not watched to the end: {watcher.error}")
        raise
    finally:
        with _lock:
            watches._WATCHES.remove(watcher)
            if not watches._WATCHES:
                watches.remove()
                huggingface.remove()
                torch_nn.remove()
                ours.remove()
    if watcher.error is not None:
        raise watcher.error
