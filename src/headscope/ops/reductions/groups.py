"""Reductions over groups of positions: words, documents, bins of a picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from headscope.ops.reductions.reduction import Block, Reduction, Shape

_INDICATOR = 1 << 22  # cells of a matrix with 1 where a position belongs to a group


class Groups(Reduction):
    """The weight on groups of keys: [B, H, L, N]. ``ids`` [S] or [B, S] names each key's group, −1 for none."""

    online = True

    def __init__(self, ids: Tensor, num_groups: int | None = None) -> None:
        self.ids, self.num_groups = _group_ids("groups", ids, num_groups)

    def start(self, shape: Shape, like: Tensor) -> Tensor:
        """Zeros, [B, H, L, N]. Raises ValueError if ids do not fit the keys."""
        _fit_ids("groups", self.ids, shape[0], shape[3], "keys")
        return like.new_zeros((*shape[:3], self.num_groups))

    def update(self, state: Tensor, block: Block) -> None:
        """Multiply by the indicator of the groups in this block; if they are too many, scatter instead."""
        ids = _ids_of(self.ids, block.batch, block.keys, block.weights.device)
        indicator = _indicator(ids, block.weights)
        if indicator is None:
            for b, own in _same_groups(ids):
                groups, sums = _summed(block.weights[b], own, 3)
                state[block.at][b][..., groups] += sums
            return
        low, chosen = indicator
        if chosen.shape[-1]:
            part = state[(*block.at, slice(low, low + chosen.shape[-1]))]
            part += block.product(chosen.transpose(-1, -2).unsqueeze(1))

    def rescale(self, state: Tensor, at: tuple[slice, slice, slice], log_factor: Tensor, total: Tensor) -> None:
        state[at] *= log_factor.exp()


class Pool(Reduction):
    """A smaller map: [B, H, R, C], the cells of query group r and key group c combined.

    ``rows`` [L] or [B, L] and ``cols`` [S] or [B, S] name the groups (−1: left out); a whole number n means n
    equal bins. ``how``: "mean" and "max" over a cell's weights (a hidden one counts as 0), or "mass": summed
    over its keys and averaged over its queries, which turns tokens into words (arXiv 1906.04341).
    """

    def __init__(self, rows: Tensor | int, cols: Tensor | int, how: str = "mean") -> None:
        if how not in ("mean", "max", "mass"):
            raise ValueError(f"pool got how={how!r}: it is 'mean', 'max' or 'mass'.")
        self.rows, self.cols, self.how = rows, cols, how

    def start(self, shape: Shape, like: Tensor) -> dict[str, Any]:
        """Zeros, and the group of each row and column. Raises ValueError if they do not fit."""
        rows, num_rows = _pool_ids("rows", self.rows, shape[0], shape[2], "queries")
        cols, num_cols = _pool_ids("cols", self.cols, shape[0], shape[3], "keys")
        out = like.new_zeros((shape[0], shape[1], num_rows, num_cols))
        return {"out": out, "rows": rows, "cols": cols}

    def update(self, state: dict[str, Any], block: Block) -> None:
        """Columns first, then rows, so that the work after the first step is small."""
        if self.how == "max":
            self._update_max(state, block)
            return
        col_ids = _ids_of(state["cols"], block.batch, block.keys, block.weights.device)
        row_ids = _ids_of(state["rows"], block.batch, block.rows, block.weights.device)
        of_cols, of_rows = _indicator(col_ids, block.weights), _indicator(row_ids, block.weights)
        if of_cols is None or of_rows is None:
            _add_cells(state["out"][block.batch, block.heads], row_ids, col_ids, block.weights)
            return
        (low_c, cols), (low_r, rows) = of_cols, of_rows
        if cols.shape[-1] and rows.shape[-1]:
            summed = rows.unsqueeze(1).transpose(-1, -2) @ block.product(cols.transpose(-1, -2).unsqueeze(1))
            at = slice(low_r, low_r + rows.shape[-1]), slice(low_c, low_c + cols.shape[-1])
            state["out"][(block.batch, block.heads, *at)] += summed

    def _update_max(self, state: dict[str, Any], block: Block) -> None:
        device = block.weights.device
        ids = _ids_of(state["cols"], block.batch, block.keys, device)
        maxima = _segment_max(block.weights, ids, state["out"].shape[3])
        ids = _ids_of(state["rows"], block.batch, block.rows, device)
        maxima = _segment_max(maxima.transpose(-1, -2), ids, state["out"].shape[2])
        part = state["out"][block.batch, block.heads]
        torch.maximum(part, maxima.transpose(-1, -2), out=part)

    def finish(self, state: dict[str, Any]) -> Tensor:
        out: Tensor = state["out"]
        if self.how == "max":
            return out
        sizes = _sizes(state["rows"], out.shape[2]).unsqueeze(-1).to(out.dtype)  # [1|B, R, 1]
        if self.how == "mean":
            sizes = sizes * _sizes(state["cols"], out.shape[3]).unsqueeze(-2)
        return out / sizes.clamp(min=1).unsqueeze(1)


def _group_ids(name: str, ids: Tensor, num_groups: int | None) -> tuple[Tensor, int]:
    ids = torch.as_tensor(ids)
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() not in (1, 2) or ids.numel() == 0:
        raise ValueError(
            f"{name} got ids of {ids.dtype}, shape {tuple(ids.shape)}: wanted whole numbers, [S] or [B, S]."
        )
    ids = ids.long()
    ids = ids[None] if ids.dim() == 1 else ids
    largest, smallest = int(ids.max()), int(ids.min())
    count = largest + 1 if num_groups is None else num_groups
    if smallest < -1 or largest >= count:
        raise ValueError(f"{name} got ids from {smallest} to {largest}, wanted 0 to {count - 1}, or −1 for no group.")
    return ids, count


def _fit_ids(name: str, ids: Tensor, batch: int, size: int, what: str) -> None:
    if ids.shape[1] != size or ids.shape[0] not in (1, batch):
        raise ValueError(
            f"{name} got ids of shape {tuple(ids.shape)}, but there are {batch} batch rows of {size} {what}."
        )


def _pool_ids(name: str, bins_or_ids: Tensor | int, batch: int, size: int, what: str) -> tuple[Tensor, int]:
    if isinstance(bins_or_ids, int):
        if bins_or_ids < 1:
            raise ValueError(f"pool got {name}={bins_or_ids}: at least 1 bin.")
        bins = min(bins_or_ids, size)
        return (torch.arange(size) * bins // size)[None], bins
    ids, count = _group_ids(f"pool {name}", bins_or_ids, None)
    _fit_ids(f"pool {name}", ids, batch, size, what)
    return ids, count


def _sizes(ids: Tensor, count: int) -> Tensor:
    """How many positions each group has, [1|B, N]; those with group −1 are not counted."""
    sizes = torch.zeros(len(ids), count + 1, dtype=torch.int64, device=ids.device)
    sizes.scatter_add_(1, ids + 1, torch.ones_like(ids))
    return sizes[:, 1:]


def _ids_of(ids: Tensor, batch: slice, span: slice, device: torch.device) -> Tensor:
    """The groups of some positions, [1|b, c]."""
    return (ids[batch] if len(ids) > 1 else ids)[:, span].to(device)


def _indicator(ids: Tensor, like: Tensor) -> tuple[int, Tensor] | None:
    """The lowest group of some positions, and 1 where position and group (from it) belong together, [1|b, c, N].

    None if that would be larger than _INDICATOR.
    """
    members = ids[ids >= 0]
    low, high = (int(members.min()), int(members.max())) if members.numel() else (0, -1)
    if ids.numel() * (high - low + 1) > _INDICATOR:
        return None
    groups = torch.arange(low, high + 1, device=like.device)
    return low, (ids.unsqueeze(-1) == groups).to(like.dtype)


def _same_groups(ids: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Batch rows with the same groups [c], and these groups: all rows together, or one by one."""
    for i, own in enumerate(ids):
        yield (slice(None) if len(ids) == 1 else slice(i, i + 1)), own


def _summed(x: Tensor, ids: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """The groups that occur in ``ids`` [c], and the sums over their positions along an axis of x (2 or 3)."""
    here = (ids >= 0).nonzero().flatten()
    groups, group_index = ids[here].unique(return_inverse=True)
    x = x if len(here) == len(ids) else x.index_select(axis, here)
    index = (group_index if axis == 3 else group_index[:, None]).expand(x.shape)
    out = x.new_zeros([len(groups) if i == axis else n for i, n in enumerate(x.shape)])
    return groups, out.scatter_add_(axis, index, x)


def _add_cells(out: Tensor, rows: Tensor, cols: Tensor, weights: Tensor) -> None:
    """Add weights [b, h, r, c] to the cells of their groups in out [b, h, R, C]."""
    batch = len(weights) if len(rows) > 1 or len(cols) > 1 else 1
    for (b, row), (_, col) in zip(
        _same_groups(rows.expand(batch, -1)), _same_groups(cols.expand(batch, -1)), strict=True
    ):
        low, sums = _summed(weights[b], row, 2)
        high, sums = _summed(sums, col, 3)
        out[b][:, :, low[:, None], high] += sums


def _segment_max(x: Tensor, ids: Tensor, count: int) -> Tensor:
    """The maximum of x [b, h, r, c] over the columns of each group; ids [1|b, c]."""
    out = x.new_zeros((*x.shape[:-1], count + 1))
    runs, lengths = ids[0].unique_consecutive(return_counts=True)
    if len(ids) == 1 and len(runs) * 16 <= x.shape[-1]:  # long runs, such as bins: much faster than scatter
        for group, piece in zip(runs.tolist(), x.split(lengths.tolist(), -1), strict=True):
            column = out[..., group + 1]
            torch.maximum(column, piece.amax(-1), out=column)
        return out[..., 1:]
    index = (ids.to(x.device) + 1)[:, None, None, :].expand(x.shape)
    return out.scatter_reduce_(-1, index, x, "amax")[..., 1:]
