"""Sums of measures over texts, kept so that they can be added up: over shards, machines, corpora.

For each column two sums a head, for each half of the documents. For the columns on which roles rest there are also
replicates of the second half: in each, every document counts Poisson(1) times, by a number that follows from its
name alone, so that shards need not know of each other and their replicates add up (the streaming bootstrap of
arXiv 1312.5021). Pieces of a document count together.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headscope.heads.measures import Ratio

__all__ = ["REPLICATES", "Sums", "document_weights", "weights_of"]

REPLICATES = 100


def document_weights(document: str, half: int, replicates: int = REPLICATES) -> Tensor:
    """How often a document counts: in half 0, in half 1, and in each replicate of half 1; [2 + replicates]."""
    random = torch.Generator().manual_seed(zlib.crc32(document.encode("utf-8", "surrogatepass")))
    drawn = torch.poisson(torch.ones(replicates, dtype=torch.float64), generator=random)
    halves = torch.tensor([1.0 - half, float(half)], dtype=torch.float64)
    return torch.cat([halves, drawn * half])


@dataclass(eq=False)
class Sums:
    """``values[column]`` [K, 2, layers, H] float64: numerators and denominators; K is 2, or 2 + replicates.

    ``documents`` counts the rows of text that each document gave.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    documents: dict[str, int] = field(default_factory=dict)

    def add(self, columns: Mapping[str, Ratio], layer: int | list[int], layers: int, weights: Tensor) -> None:
        """Add one layer of a batch, or several that have the same sums.

        Args:
            columns: By name, sums [B, H] over the rows of each text.
            layer: The layer, from 0, or all that have these sums.
            layers: How many there are.
            weights: [K, B] from :func:`document_weights`; two rows only for columns without intervals.
        """
        if not columns:
            return
        numerators = torch.stack([ratio.numerator.double() for ratio in columns.values()])
        denominators = torch.stack([ratio.denominator.double() for ratio in columns.values()])
        found = torch.einsum("kb,ncbh->cknh", weights, torch.stack([numerators, denominators]).cpu())
        for column, part in zip(columns, found, strict=True):
            self._add(column, [layer] if isinstance(layer, int) else layer, layers, part)

    def _add(self, column: str, chosen: list[int], layers: int, found: Tensor) -> None:
        """Add sums [K, 2, H] to some layers of one column."""
        held = self.values.get(column)
        if held is None:
            held = self.values[column] = torch.zeros(len(found), 2, layers, found.shape[-1], dtype=torch.float64)
        if layers > held.shape[2] or found.shape[-1] > held.shape[-1]:  # more than the config says; more heads
            heads = max(held.shape[-1], found.shape[-1])
            wider = torch.zeros(*held.shape[:2], max(layers, held.shape[2]), heads, dtype=torch.float64)
            wider[:, :, : held.shape[2], : held.shape[-1]] = held
            held = self.values[column] = wider
        for layer in chosen:
            held[:, :, layer, : found.shape[-1]].add_(found)

    def merge(self, other: Sums) -> None:
        """Add another corpus' or shard's sums.

        Raises:
            ValueError: The two are of different models.
        """
        for column, theirs in other.values.items():
            ours = self.values.get(column)
            if ours is not None and ours.shape != theirs.shape:
                raise ValueError(
                    f"{column} has sums {tuple(ours.shape)} here and {tuple(theirs.shape)} there: only sums over "
                    "the same model, by the same version, add up."
                )
            self.values[column] = theirs.clone() if ours is None else ours + theirs
        for document, rows in other.documents.items():
            self.documents[document] = self.documents.get(document, 0) + rows

    def value(self, column: str, half: int | None = None) -> Tensor:
        """The measure, [layers, H]: over all documents, or one half; NaN where nothing was measured."""
        sums = self.values[column]
        part = sums[0] + sums[1] if half is None else sums[half]
        return part[0] / torch.where(part[1] == 0, torch.nan, part[1])

    def interval(self, column: str, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Where the second half's value lies when other documents are drawn: low and high, [layers, H].

        Raises:
            ValueError: No replicates are kept for this column.
        """
        drawn = self.values[column][2:]
        if not len(drawn):
            raise ValueError(f"no replicates are kept for {column!r}, so there is no interval.")
        ratios = drawn[:, 0] / torch.where(drawn[:, 1] == 0, torch.nan, drawn[:, 1])
        low, high = ratios.nanquantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64), dim=0)
        return low, high


def weights_of(documents: Iterable[tuple[str, int]], replicates: int = REPLICATES) -> Tensor:
    """[2 + replicates, B]: a batch's documents, each with its half."""
    return torch.stack([document_weights(name, half, replicates) for name, half in documents], 1)
