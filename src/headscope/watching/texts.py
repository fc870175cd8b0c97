"""Run a loaded model over texts and record what its heads attend to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headscope.errors import HeadscopeError
from headscope.models.loading import Loaded, reader
from headscope.models.tokens import Tokens
from headscope.watching.hooks import AttentionCall
from headscope.watching.recording import Recording, record


def record_batch(
    loaded: Loaded,
    ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    tokens: Tokens | None = None,
    reduce: Callable[[AttentionCall], Any] | None = None,
    on_call: Callable[[AttentionCall], None] | None = None,
) -> Recording:
    """Run the model once over a batch of texts, without gradients and without a cache, under :func:`record`.

    Of a model with an encoder and a decoder the encoder runs.

    Args:
        loaded: The model.
        ids: [B, T], token ids.
        attention_mask: [B, T], 1 for text and 0 for padding; None: the model gets no mask.
        tokens: As for :func:`record`, like all that follow.
        reduce: What is computed of each call; then nothing else is kept.
        on_call: Called with each call.
    """
    device = loaded.model.device
    entry, options = reader(loaded.model)
    mask = None if attention_mask is None else attention_mask.to(device)
    with torch.no_grad(), record(entry, tokens=tokens, reduce=reduce, on_call=on_call) as recording:
        entry(input_ids=ids.to(device), attention_mask=mask, **options)
    return recording


def record_text(loaded: Loaded, tokens: Tokens, *, on_progress: Callable[[int, int], None] | None = None) -> Recording:
    """Run the model once over a text, and record what its heads attend to.

    Args:
        loaded: The model.
        tokens: The text.
        on_progress: Called after each layer with the number of layers done and the number of all.

    Raises:
        HeadscopeError: The model's queries and keys are not the tokens of the text.
    """
    layers = int(getattr(loaded.model.config.get_text_config(), "num_hidden_layers", 0))
    done = 0

    def on_call(_: AttentionCall) -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, max(done, layers))

    ids = torch.tensor([tokens.ids])
    recording = record_batch(loaded, ids, torch.ones_like(ids), tokens=tokens, on_call=on_call)
    wrong = [tuple(site.shape) for site in recording.sites if tuple(site.shape[-2:]) != (len(tokens),) * 2]
    if wrong:
        raise HeadscopeError(
            f"{loaded.name} has attention of shape {wrong[0]}, but the text has {len(tokens)} tokens: its positions "
            "are not those of the text, so no words can be put on them. Use record() and its matrices instead."
        )
    return recording
