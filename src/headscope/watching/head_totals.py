"""Totals of one attention call over its queries, for each head: entropy, largest logit, weight on the first key."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headscope.ops.matrix import AttentionMatrix
from headscope.ops.reductions import Block, Entropy, Groups, Reduction
from headscope.ops.reductions.reduction import Shape
from headscope.ops.scores import Scores
from headscope.watching.hooks import AttentionCall

_DEAD = 1e-3  # of the layer's median head
_HIDDEN = -1e4  # a number in an additive mask that hides, also in half precision and in old BERTs
_CELLS = 1 << 22  # cells of a mask that may exist at once


class _Largest(Reduction):
    """The logarithm of each query's largest weight: [B, H, L]."""

    def start(self, shape: Shape, like: Tensor) -> Tensor:
        """Minus infinity: the maximum of no weights."""
        return like.new_full(shape[:3], -torch.inf)

    def update(self, state: Tensor, block: Block) -> None:
        """The larger of this block's and of those before."""
        part = state[block.at]
        torch.maximum(part, (block.centered.amax(-1, keepdim=True) + block.offset).squeeze(-1), out=part)


@dataclass(frozen=True, eq=False)
class SiteTotals:
    """Totals over one site's queries, of several calls added up; float64 on the CPU."""

    # [6, H]: queries, those with two visible keys; of these entropy, ln keys, weight on the first; squared outputs
    totals: Tensor
    largest: Tensor  # [H], logits; −inf where no query counts

    def plus(self, other: SiteTotals) -> SiteTotals:
        """Both together."""
        return SiteTotals(self.totals + other.totals, torch.maximum(self.largest, other.largest))

    def numbers(self) -> dict[str, Tensor]:
        """The tensors of `HeadStats` for this site, [H] each; NaN where no query counts."""
        queries, choosing, entropy, uniform, first, squared = self.totals
        finite = self.totals.isfinite().all(0) & ~(self.largest.isnan() | (self.largest == torch.inf))
        size = squared.sqrt()
        middle = size[finite].median() if bool(finite.any()) else size.new_tensor(torch.nan)
        return {
            "entropy": entropy / choosing,
            "entropy_share": entropy / uniform,
            "largest_logit": self.largest.masked_fill(queries == 0, torch.nan),
            "sink_mass": first / choosing,
            "dead": finite & (queries > 0) & (size <= _DEAD * middle),
            "finite": finite,
        }


def totals_of(call: AttentionCall) -> SiteTotals:
    """The totals of one call, in one pass over its weights."""
    scores, broken = _finite_part(call.scores)
    text, count, visible = _text(scores, call.is_cross)
    first = torch.where(visible.any(1), visible.int().argmax(1), -1)
    is_first = torch.arange(scores.shape[3], device=visible.device) == first[:, None]
    matrix = AttentionMatrix._from_scores(scores)
    entropy, best, mass = matrix.reduce(Entropy(), _Largest(), Groups(is_first.long() - 1, 1))
    counts = text[:, None] & (count > 0)  # [B, H, L]
    chooses = counts & (count > 1)
    squared = torch.linalg.vector_norm(call.head_outputs().to(entropy.dtype), dim=-1).square()
    parts = (
        counts.to(entropy.dtype),
        chooses.to(entropy.dtype),
        entropy.where(chooses, 0),
        count.clamp(min=1).log().where(chooses, 0),
        mass.squeeze(-1).where(chooses, 0),
        squared.where(counts, 0),
    )
    totals = torch.stack([part.sum((0, 2)) for part in parts]).cpu().double()
    largest = (best + matrix.logsumexp).masked_fill(~counts, -torch.inf).amax((0, 2)).cpu().double()
    return SiteTotals(totals.masked_fill(broken, torch.nan), largest.masked_fill(broken, torch.nan))


def _finite_part(scores: Scores) -> tuple[Scores, Tensor]:
    """The operands with zeros for heads that hold NaN or infinite numbers, and which heads these are, [H]."""
    query = ~scores.query.isfinite().all(-1).all(-1).all(0)
    key = ~scores.key.isfinite().all(-1).all(-1).all(0)
    broken = query | key.repeat_interleave(scores.per_group)
    bias, sinks = scores.bias, scores.sinks
    if isinstance(bias, Tensor):
        wrong = bias.isnan() | (bias == torch.inf)
        broken = broken | wrong.transpose(0, 1).flatten(1).any(1)
        bias = bias.masked_fill(wrong, 0)
    if sinks is not None:
        broken = broken | ~sinks.isfinite()
        sinks = sinks.masked_fill(~sinks.isfinite(), 0)
    if not bool(broken.any()):
        return scores, broken.cpu()
    clean = scores.query.masked_fill(query.view(1, -1, 1, 1), 0), scores.key.masked_fill(key.view(1, -1, 1, 1), 0)
    return replace(scores, query=clean[0], key=clean[1], bias=bias, sinks=sinks), broken.cpu()


def _text(scores: Scores, is_cross: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Queries that are no padding, [B, L]; numbers of visible keys, [B, H, L]; keys that some query may see, [B, S]."""
    batch, heads, queries, keys = scores.shape
    device = scores.query.device
    count = torch.zeros((batch, heads, queries), device=device)
    visible_keys = torch.zeros((batch, keys), dtype=torch.bool, device=device)
    every, all_heads = slice(0, batch), slice(0, heads)
    hides = isinstance(scores.bias, Tensor) and bool((scores.bias <= _HIDDEN).any())
    step = max(1, _CELLS // (batch * heads * keys))
    for start in range(0, queries, step):
        rows = slice(start, min(queries, start + step))
        for low, high, mixed in scores.spans(every, rows):
            shown = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)
            if mixed:
                shown = shown & scores.visible(every, all_heads, rows, slice(low, high))
            if hides:
                shown = shown & (scores.bias_block(every, all_heads, rows, slice(low, high)) > _HIDDEN)
            width = high - low if shown.shape[-1] == 1 else 1
            count[:, :, rows] += shown.sum(-1) * width
            visible_keys[:, low:high] |= shown.any(1).any(1)
    text = torch.ones((batch, queries), dtype=torch.bool, device=device)
    return (visible_keys if queries == keys and not is_cross else text), count, visible_keys
