"""Run a model on a text and score its output: the default metrics, and the checks of a metric of one's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headscope.errors import EditError

Metric = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits [B, T, V], or last hidden states [B, T, E]; input_ids [B, T]; attention_mask [B, T]) → [B]."""

_CHUNK_BYTES = 1 << 26


def forward_options(model: nn.Module, **wanted: Any) -> dict[str, Any]:
    """Those of the arguments that the model's forward has."""
    parameters = inspect.signature(model.forward).parameters
    return {name: value for name, value in wanted.items() if name in parameters}


def run_model(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, extra: dict[str, Any]) -> Tensor:
    """The model's logits, or its last hidden states where it has no output head."""
    mask = {} if attention_mask is None else {"attention_mask": attention_mask}
    return _output_tensor(model(input_ids, **extra, **mask))


def _output_tensor(output: Any) -> Tensor:
    """The tensor in what a model returned."""
    for name in ("logits", "last_hidden_state"):
        tensor = getattr(output, name, None)
        if isinstance(tensor, Tensor):
            return tensor
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

    A token counts if it and the token before it are text.

    Args:
        logits: [B, T, V].
        input_ids: [B, T].
        attention_mask: [B, T], 1 or True where there is text.

    Example:
        >>> uniform = torch.zeros(1, 3, 8)
        >>> next_token_loss(uniform, torch.tensor([[1, 2, 3]]), torch.ones(1, 3))
        tensor([2.0794])
    """
    counted = (attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool()).to(torch.float32)
    predictions = logits[:, :-1] if logits.dtype == torch.float64 else logits[:, :-1].float()
    correct = predictions.gather(2, input_ids[:, 1:, None])[..., 0]
    losses: Tensor = (predictions.logsumexp(2) - correct) * counted
    return losses.sum(1) / counted.sum(1)


def distance_from(clean: Tensor) -> Metric:
    """1 - cosine similarity of the mean hidden state over the text to that of ``clean`` [1, T, E]."""

    def metric(hidden: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        text = attention_mask.bool()[..., None]
        clean_sum = clean.double().masked_fill(~text[:1], 0).sum(1)
        changed_sum = hidden.double().masked_fill(~text, 0).sum(1)
        return 1 - F.cosine_similarity(changed_sum, clean_sum, dim=1)

    return metric


def score_rows(metric: Metric, logits: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The metric of many rows, a few at a time, [rows] in float64. ``input_ids`` and mask are one row for all.

    Raises:
        ValueError: the metric did not give one number per row.
    """
    step = max(1, _CHUNK_BYTES // max(1, logits[0].numel() * 4))
    parts = []
    for start in range(0, logits.shape[0], step):
        part = logits[start : start + step]
        rows = (part.shape[0], -1)
        parts.append(checked_metric(metric(part, input_ids.expand(rows), attention_mask.expand(rows)), part.shape[0]))
    return torch.cat(parts)


def checked_metric(values: Any, rows: int) -> Tensor:
    """The values of a metric in float64, if there is one number per row."""
    if not isinstance(values, Tensor) or tuple(values.shape) != (rows,):
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"the metric gave {shape} for {rows} rows: wanted a tensor ({rows},), one number for each row. "
            "Take the mean over positions, not over rows."
        )
    return values.double()
