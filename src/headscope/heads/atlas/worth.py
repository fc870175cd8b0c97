"""Worth: what heads are worth on each text, with intervals over documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headscope.heads.statistics import cluster_bootstrap


@dataclass(eq=False)
class Worth:
    """What heads are worth on some texts: for each method and each text one value per head.

    Attributes:
        values: By method ("ablation_zero", "ablation_mean", "gradient"): [texts, layers, H] float64.
        clean: The unchanged model's metric for each text, [texts].
        documents: The names of the texts' documents, in this order.
        unit: "nats per token", or "1 - cosine" for a model without logits.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    clean: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    documents: list[str] = field(default_factory=list)
    unit: str = ""

    def merge(self, other: Worth) -> None:
        """Add other texts. Raises ValueError when they were measured in another unit."""
        if not other.documents:
            return
        if self.documents and other.unit != self.unit:
            raise ValueError(f"the worth of heads is in {self.unit} here and in {other.unit} there: wanted one unit.")
        for method, theirs in other.values.items():
            ours = self.values.get(method)
            self.values[method] = theirs if ours is None else torch.cat([ours, theirs])
        self.clean = torch.cat([self.clean, other.clean])
        self.documents = self.documents + other.documents
        self.unit = other.unit

    def without(self, documents: Sequence[str]) -> Worth:
        """The worth on all other texts."""
        return self._at([i for i, name in enumerate(self.documents) if name not in documents])

    def sorted(self) -> Worth:
        """The same in the order of the documents' names, whichever process finished first."""
        return self._at(sorted(range(len(self.documents)), key=lambda i: self.documents[i]))

    def _at(self, rows: list[int]) -> Worth:
        values = {method: value[rows] for method, value in sorted(self.values.items())}
        return Worth(values, self.clean[rows], [self.documents[i] for i in rows], self.unit)

    def interval(self, method: str, level: float = 0.95, replicates: int = 1000) -> tuple[Tensor, Tensor]:
        """Percentile bootstrap of the mean over documents, [layers, H] each; NaN with fewer than two."""
        values = self.values[method]
        names = sorted(set(self.documents))
        if len(names) < 2:
            undefined = torch.full(values.shape[1:], torch.nan, dtype=values.dtype)
            return undefined, undefined
        rows = torch.tensor([names.index(name) for name in self.documents])
        sums = torch.zeros(len(names), *values.shape[1:], dtype=values.dtype).index_add(0, rows, values)
        return cluster_bootstrap(sums.movedim(0, -1), rows.bincount(), replicates, level=level)
