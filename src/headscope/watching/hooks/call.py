"""What an attention function received and returned, whichever library called it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headscope.ops.matrix import AttentionMatrix
from headscope.ops.scores import Scores


@dataclass(frozen=True, eq=False)
class Output:
    """What the model's own function returned, and how it follows from head outputs P @ V [B, H, L, Dv].

    ``finish`` computes what the function returns for some rows from their head outputs [N, H, Dv], batch rows [N] and
    query rows [N]; ``rows`` reads the same rows from what it did return.
    """

    raw: Tensor
    finish: Callable[[Tensor, Tensor, Tensor], Tensor]
    rows: Callable[[Tensor, Tensor], Tensor]
    replace_heads: Callable[[Tensor], Tensor]  # new head outputs [B, H, L, Dv] → the function's output
    heads: Tensor | None = None  # [B, H, L, Dv], where the function returns just that


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One attention call of a running model: ``call.matrix()`` is what it attended to.

    Letters: B batch, H heads, G key/value heads, L queries, S keys, D head size.
    """

    name: str  # the module, as in named_modules()
    occurrence: int  # which of its calls within one forward of the model
    way: str  # "huggingface", "sdpa", "torch.nn" or "headscope"
    scores: Scores
    value: Tensor  # [B, G, S, Dv]
    output: Output
    dropout_p: float = 0.0
    proof: float | None = None  # relative difference of the rebuilt P @ V from the returned; None: unproved
    rounded_proof: float | None = None  # the same with scores rounded to half precision; None: they are not in half
    edited: bool = False
    is_cross: bool = False  # its keys are of another sequence than its queries
    logsumexp: Tensor | None = None  # [B, H, L], where the model's kernel gave it; NaN elsewhere

    @property
    def query(self) -> Tensor:
        """[B, H, L, D]."""
        return self.scores.query

    @property
    def key(self) -> Tensor:
        """[B, G, S, D]."""
        return self.scores.key

    @property
    def shape(self) -> torch.Size:
        """(B, H, L, S)."""
        return torch.Size(self.scores.shape)

    def matrix(self) -> AttentionMatrix:
        """The attention weights of this call, as an operator."""
        return AttentionMatrix._from_scores(self.scores, self.logsumexp)

    def head_outputs(self) -> Tensor:
        """P @ V, [B, H, L, Dv]: as returned, or rebuilt where the function returns a later result."""
        if self.output.heads is not None:
            return self.output.heads
        return self.matrix() @ self.value

    def at(self, name: str, occurrence: int) -> AttentionCall:
        """The same call as another watch names it."""
        return replace(self, name=name, occurrence=occurrence)
