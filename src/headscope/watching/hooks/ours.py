"""The way in for our own attention(), whose operands are known: nothing need be read or guessed."""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import Tensor

from headscope.ops.kernels import fused as kernels
from headscope.ops.scores import Scores
from headscope.watching.hooks.sdpa import direct
from headscope.watching.hooks.watches import active, inside, running, seen, unnoticed

__all__ = ["install", "remove"]

_ORIGINAL: list[Any] = []


def install() -> None:
    """Wrap the function that attention() ends in."""
    if _ORIGINAL:
        return
    original = kernels.product
    _ORIGINAL.append(original)

    @wraps(original)
    def product(scores: Scores, value: Tensor, dropout_p: float = 0.0) -> Tensor:
        if not active():
            return original(scores, value, dropout_p)
        with inside(), kernels.row_sums(scores.query) as sums:
            output = original(scores, value, dropout_p)
        with unnoticed():
            told = sums.of(scores.shape)
            call = seen(running(), "headscope", lambda _: [scores], value, direct(output), dropout_p, sums=told)
            return call.output.raw

    kernels.product = product


def remove() -> None:
    """Put it back."""
    while _ORIGINAL:
        kernels.product = _ORIGINAL.pop()
