"""How differently the heads of a layer attend: the Jensen–Shannon distance of their rows."""

from __future__ import annotations

import math
from itertools import combinations
from statistics import fmean

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.nn.transformer import Transformer
from headscope.training.tasks import generator
from headscope.watching.recording import record

_ROWS = 8  # queries of each text whose rows are compared


def head_distance(model: Transformer, tokens: Int[Tensor, "B L"]) -> float:
    """The mean Jensen–Shannon distance between the rows of two heads of a layer, from 0 to 1.

    It is the square root of the divergence in bits (Endres and Schindelin 2003, doi 10.1109/TIT.2003.813506), between
    the rows P[h, i, :] of two heads: 0 for equal rows, 1 for rows without a common key. The mean is over pairs of
    heads, layers, texts, and 8 sampled rows in the second half of each text.

    Args:
        model: A decoder.
        tokens: [B, L], texts.

    Returns:
        The mean; NaN for a model with one head.

    Example:
        >>> from headscope.training import make_task
        >>> task = make_task("lookups")
        >>> 0 < head_distance(Transformer(task.model_config(num_heads=2)), task.held_out(3).tokens) < 1
        True
    """
    if model.config.num_heads < 2:
        return math.nan
    with torch.no_grad(), record(model) as recording:
        model(tokens)
    length = tokens.shape[1]
    drawn = torch.randperm(length - length // 2, generator=generator("rows", length))[:_ROWS] + length // 2
    rows = drawn.sort().values.to(tokens.device)
    return fmean(
        float(jensen_shannon(weights[first], weights[second]).mean())
        for matrix in recording
        for weights in (matrix[text, :, rows, :].double() for text in range(len(tokens)))
        for first, second in combinations(range(weights.shape[0]), 2)
    )


def jensen_shannon(p: Float[Tensor, "*rows S"], q: Float[Tensor, "*rows S"]) -> Float[Tensor, "*rows"]:
    """The Jensen–Shannon distance of distributions over the last axis.

    >>> jensen_shannon(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.0, 1.0], [0.5, 0.5]])).tolist()
    [1.0, 0.0]
    """
    divergence = _entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2
    return divergence.clamp(min=0).sqrt()


def _entropy(p: Tensor) -> Tensor:
    """In bits."""
    return -torch.xlogy(p, p).sum(-1) / math.log(2)
