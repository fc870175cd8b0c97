"""How a model is asked about a text, what it answers, and how far an answer is from what it should be."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headscope.errors import EditError

__all__ = ["Metric", "answer", "ask", "away_from", "next_token_loss", "options", "score"]

Metric = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits [B, T, V], or last hidden states [B, T, E]; input_ids [B, T]; attention_mask [B, T]) → [B]."""

_CHUNK_BYTES = 1 << 26


def options(model: nn.Module, **wanted: Any) -> dict[str, Any]:
    """Those of the wanted arguments that the model's forward knows."""
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in wanted.items() if name in known}


def ask(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, extra: dict[str, Any]) -> Tensor:
    """The model's logits, or its last hidden states where it has no head."""
    given = dict(extra)
    if attention_mask is not None:
        given["attention_mask"] = attention_mask
    return answer(model(input_ids, **given))


def answer(output: Any) -> Tensor:
    """The tensor to measure in what a model returned."""
    for name in ("logits", "last_hidden_state"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if isinstance(output, Tensor):
        return output
    raise EditError(
        f"the model returned {type(output).__name__}: wanted a tensor, or an output with logits or "
        "last_hidden_state. Wrap the model so that its forward returns one of these."
    )


def next_token_loss(logits: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean loss of predicting each token from those before it, in nats per token, [B].

    Only tokens that are text count, and only where the token before them is text too.

    Args:
        logits: [B, T, V].
        input_ids: [B, T].
        attention_mask: [B, T], 1 or True where there is text.

    Example:
        >>> even = torch.zeros(1, 3, 8)
        >>> next_token_loss(even, torch.tensor([[1, 2, 3]]), torch.ones(1, 3))
        tensor([2.0794])
    """
    counted = (attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool()).to(torch.float32)
    guesses = logits[:, :-1] if logits.dtype == torch.float64 else logits[:, :-1].float()
    right = guesses.gather(2, input_ids[:, 1:, None])[..., 0]
    losses: Tensor = (guesses.logsumexp(2) - right) * counted
    return losses.sum(1) / counted.sum(1)


def away_from(clean: Tensor) -> Metric:
    """1 - cosine similarity of the mean hidden state over the text to that of ``clean`` [1, T, E]."""

    def metric(hidden: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        text = attention_mask.bool()[..., None]
        was = clean.double().masked_fill(~text[:1], 0).sum(1)
        now = hidden.double().masked_fill(~text, 0).sum(1)
        return 1 - F.cosine_similarity(now, was, dim=1)

    return metric


def score(metric: Metric, logits: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The metric of many rows, a few at a time, [rows] in float64; one row of ids and mask stands for all.

    Raises:
        ValueError: the metric gave something else than a number a row.
    """
    step = max(1, _CHUNK_BYTES // max(1, logits[0].numel() * 4))
    parts = []
    for start in range(0, logits.shape[0], step):
        part = logits[start : start + step]
        rows = (part.shape[0], -1)
        parts.append(checked(metric(part, input_ids.expand(rows), attention_mask.expand(rows)), part.shape[0]))
    return torch.cat(parts)


def checked(given: Any, rows: int) -> Tensor:
    """What a metric gave, if it is one number a row."""
    if not isinstance(given, Tensor) or tuple(given.shape) != (rows,):
        shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(
            f"the metric gave {shape} for {rows} rows: wanted a tensor ({rows},), one number for each row. "
            "Take the mean over positions, and not over rows."
        )
    return given.double()
