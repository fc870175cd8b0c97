"""Run a loaded model over texts and record what its heads attend to."""

from __future__ import annotations

from collections.abc import Callable

import torch

from headscope.errors import HeadscopeError
from headscope.models.loading import Loaded, reader
from headscope.models.tokens import Tokens
from headscope.watching.hooks import AttentionCall
from headscope.watching.recording import Recording, record

__all__ = ["record_text"]


def record_text(loaded: Loaded, tokens: Tokens, *, on_layer: Callable[[int, int], None] | None = None) -> Recording:
    """Run the model once over a text, and record what its heads attend to.

    Args:
        loaded: The model.
        tokens: The text.
        on_layer: Told after each layer: how many are done, and of how many.
    """
    model = loaded.model
    inputs = torch.tensor([tokens.ids], device=model.device)
    entry, options = reader(model)
    layers = int(getattr(model.config.get_text_config(), "num_hidden_layers", 0))
    done = 0

    def on_call(_: AttentionCall) -> None:
        nonlocal done
        done += 1
        if on_layer is not None:
            on_layer(done, max(done, layers))

    with torch.no_grad(), record(entry, tokens=tokens, on_call=on_call) as recording:
        entry(input_ids=inputs, attention_mask=torch.ones_like(inputs), **options)
    wrong = [tuple(site.shape) for site in recording.sites if tuple(site.shape[-2:]) != (len(tokens),) * 2]
    if wrong:
        raise HeadscopeError(
            f"{loaded.name} has attention of shape {wrong[0]}, but the text has {len(tokens)} tokens: its positions "
            "are not those of the text, so no words can be put on them. Use record() and its matrices instead."
        )
    return recording
