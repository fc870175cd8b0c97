"""Sums of measures over texts, which add up over shards, machines and corpora.

Each column has two sums per head, for each half of the documents. Columns with evidence also have replicates of the
second half, for intervals: in each replicate a document counts Poisson(1) times. That number follows from the
document's name, so that the replicates of shards add up (streaming bootstrap, arXiv 1312.5021). Pieces of a document
count together.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headscope.heads.measures import Ratio

REPLICATES = 100


def document_weights(document: str, half: int, replicates: int = REPLICATES) -> Tensor:
    """How often a document counts in half 0, in half 1 and in each replicate of half 1: [2 + replicates]."""
    random = torch.Generator().manual_seed(zlib.crc32(document.encode("utf-8", "surrogatepass")))
    counts = torch.poisson(torch.ones(replicates, dtype=torch.float64), generator=random)
    halves = torch.tensor([1.0 - half, float(half)], dtype=torch.float64)
    return torch.cat([halves, counts * half])


@dataclass(eq=False)
class MeasureSums:
    """``values[column]`` [K, 2, layers, H] float64: numerators and denominators; K is 2, or 2 + replicates.

    ``documents`` counts the tokens of each document.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    documents: dict[str, int] = field(default_factory=dict)

    def add(self, columns: Mapping[str, Ratio], layer: int | list[int], layers: int, weights: Tensor) -> None:
        """Add one layer of a batch, or several that have the same sums.

        Args:
            columns: By name, sums [B, H] over the rows of each text.
            layer: The layer, from 0, or all layers with these sums.
            layers: The number of layers.
            weights: [K, B] from :func:`weights_of`; only its first two rows for columns without replicates.
        """
        if not columns:
            return
        numerators = torch.stack([ratio.numerator.double() for ratio in columns.values()])
        denominators = torch.stack([ratio.denominator.double() for ratio in columns.values()])
        sums = torch.einsum("kb,ncbh->cknh", weights, torch.stack([numerators, denominators]).cpu())
        for column, part in zip(columns, sums, strict=True):
            self._add(column, [layer] if isinstance(layer, int) else layer, layers, part)

    def _add(self, column: str, chosen: list[int], layers: int, sums: Tensor) -> None:
        """Add sums [K, 2, H] to some layers of one column."""
        total = self.values.get(column)
        if total is None:
            total = self.values[column] = torch.zeros(len(sums), 2, layers, sums.shape[-1], dtype=torch.float64)
        if layers > total.shape[2] or sums.shape[-1] > total.shape[-1]:  # more than the config says; more heads
            heads = max(total.shape[-1], sums.shape[-1])
            wider = torch.zeros(*total.shape[:2], max(layers, total.shape[2]), heads, dtype=torch.float64)
            wider[:, :, : total.shape[2], : total.shape[-1]] = total
            total = self.values[column] = wider
        for layer in chosen:
            total[:, :, layer, : sums.shape[-1]].add_(sums)

    def merge(self, other: MeasureSums) -> None:
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

    def interval(self, column: str) -> tuple[Tensor, Tensor]:
        """The 95 % bootstrap interval of the second half's value, over documents: low and high, [layers, H].

        Raises:
            ValueError: No replicates are kept for this column.
        """
        replicates = self.values[column][2:]
        if not len(replicates):
            raise ValueError(f"no replicates are kept for {column!r}, so there is no interval.")
        ratios = replicates[:, 0] / torch.where(replicates[:, 1] == 0, torch.nan, replicates[:, 1])
        low, high = ratios.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
        return low, high


def weights_of(documents: Iterable[tuple[str, int]]) -> Tensor:
    """The weights of a batch's documents, given with their halves: [2 + replicates, B]."""
    return torch.stack([document_weights(name, half) for name, half in documents], 1)
