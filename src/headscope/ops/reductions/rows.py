"""Reductions with a result per query: entropy, mass, the largest weights, weights at fixed offsets."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headscope.ops.reductions.reduction import Block, Reduction, Shape
from headscope.ops.scores import LOWEST

_CHUNK = 32  # keys in a chunk: its maximum is compared before its keys are


class WeightsAt(NamedTuple):
    """Weights and their keys; −1 where a row sees too few keys."""

    values: Tensor
    indices: Tensor


class Entropy(Reduction):
    """H_i = −Σ_j P_ij ln P_ij in nats: [B, H, L]. 0: one key; ln n: uniform over n keys (arXiv 1906.04341)."""

    online = True

    def start(self, shape: Shape, like: Tensor) -> Tensor:
        return like.new_zeros(shape[:3])

    def update(self, state: Tensor, block: Block) -> None:
        if block.shifted:
            state[block.at].sub_(block.weights.sum(-1) * block.offset.squeeze(-1))
        state[block.at].sub_(block.expected_log())

    def rescale(self, state: Tensor, at: tuple[slice, slice, slice], log_factor: Tensor, total: Tensor) -> None:
        """−Σ cP ln cP = c·(−Σ P ln P − ln c·Σ P)."""
        state[at] = (log_factor.exp() * (state[at].unsqueeze(-1) - log_factor * total)).squeeze(-1)

    def finish(self, state: Tensor) -> Tensor:
        """Rounding may give −1e−8 for a row with all weight on one key."""
        return state.clamp_(min=0)


class Mass(Reduction):
    """Σ_j P_ij: [B, H, L]. 1; less with sinks; 0 where nothing is visible."""

    online = True

    def start(self, shape: Shape, like: Tensor) -> Tensor:
        return like.new_zeros(shape[:3])

    def update(self, state: Tensor, block: Block) -> None:
        state[block.at].add_(block.weights.sum(-1))

    def rescale(self, state: Tensor, at: tuple[slice, slice, slice], log_factor: Tensor, total: Tensor) -> None:
        state[at] *= log_factor.exp().squeeze(-1)


class TopK(Reduction):
    """The k largest weights of each row, largest first: values and key positions, each [B, H, L, k]."""

    online = True

    def __init__(self, k: int) -> None:
        if k < 1:
            raise ValueError(f"topk got k={k}: at least 1.")
        self.k = k

    def start(self, shape: Shape, like: Tensor) -> tuple[Tensor, Tensor]:
        """−∞ and −1. Raises ValueError if there are fewer than k keys."""
        if self.k > shape[3]:
            raise ValueError(f"topk got k={self.k}, but there are only {shape[3]} keys.")
        size = (*shape[:3], self.k)
        empty = torch.full(size, -1, dtype=torch.int64, device=like.device)
        return like.new_full(size, -torch.inf), empty

    def update(self, state: tuple[Tensor, Tensor], block: Block) -> None:
        largest = block.centered.topk(min(self.k, block.centered.shape[-1]), -1)
        row_values, row_indices = state[0][block.at], state[1][block.at]
        values = torch.cat([row_values, largest.values + block.offset], -1)
        indices = torch.cat([row_indices, largest.indices + block.keys.start], -1)
        merged = values.topk(self.k, -1)
        row_values.copy_(merged.values)
        row_indices.copy_(indices.gather(-1, merged.indices))

    def rescale(
        self, state: tuple[Tensor, Tensor], at: tuple[slice, slice, slice], log_factor: Tensor, total: Tensor
    ) -> None:
        state[0][at] += log_factor

    def finish(self, state: tuple[Tensor, Tensor]) -> WeightsAt:
        return _weights_at(*state)


class Max(Reduction):
    """The largest weight of each row and its key: values and indices, each [B, H, L]."""

    online = True

    def start(self, shape: Shape, like: Tensor) -> tuple[Tensor, Tensor]:
        empty = torch.full(shape[:3], -1, dtype=torch.int64, device=like.device)
        return like.new_full(shape[:3], -torch.inf), empty

    def update(self, state: tuple[Tensor, Tensor], block: Block) -> None:
        values, indices = self._largest(block.centered)
        values = values + block.offset.squeeze(-1)
        row_values, row_indices = state[0][block.at], state[1][block.at]
        larger = values > row_values
        row_values.copy_(torch.where(larger, values, row_values))
        row_indices.copy_(torch.where(larger, indices + block.keys.start, row_indices))

    def _largest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The maximum with its index: first the chunk with the largest maximum, then the key in it, which is faster."""
        size, width = _CHUNK, x.shape[-1]
        if width % size or width < 4 * size:
            largest = x.max(-1)
            return largest.values, largest.indices
        chunks = x.reshape(-1, width // size, size)
        largest = chunks.amax(-1).max(-1)
        first = torch.arange(0, len(chunks) * chunks.shape[1], chunks.shape[1], device=x.device)
        inside = chunks.flatten(0, 1).index_select(0, first + largest.indices).max(-1).indices
        shape = x.shape[:-1]
        return largest.values.view(shape), inside.add_(largest.indices, alpha=size).view(shape)

    def rescale(
        self, state: tuple[Tensor, Tensor], at: tuple[slice, slice, slice], log_factor: Tensor, total: Tensor
    ) -> None:
        state[0][at] += log_factor.squeeze(-1)

    def finish(self, state: tuple[Tensor, Tensor]) -> WeightsAt:
        return _weights_at(*state)


def _weights_at(logs: Tensor, indices: Tensor) -> WeightsAt:
    """Weights from their logarithms; 0 and −1 where nothing is visible."""
    hidden = logs <= LOWEST / 2
    return WeightsAt(logs.exp_().masked_fill_(hidden, 0), indices.masked_fill_(hidden, -1))


class Offsets(Reduction):
    """P[i, i+δ] for δ = −radius … radius: [B, H, L, 2·radius+1]; 0 if there is no such key."""

    online = True

    def __init__(self, radius: int) -> None:
        if radius < 0:
            raise ValueError(f"offsets got radius={radius}: it counts positions, from 0 up.")
        self.radius = radius

    def start(self, shape: Shape, like: Tensor) -> Tensor:
        return like.new_zeros((*shape[:3], 2 * self.radius + 1))

    def update(self, state: Tensor, block: Block) -> None:
        state = state[block.at]
        for rows, offsets, weights in block.band(block.weights, self.radius):
            state[..., rows, offsets].add_(weights)

    def rescale(self, state: Tensor, at: tuple[slice, slice, slice], log_factor: Tensor, total: Tensor) -> None:
        state[at] *= log_factor.exp()
