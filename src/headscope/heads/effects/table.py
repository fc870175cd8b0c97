"""HeadEffects: what each head is worth, with intervals, and the agreement of two such tables."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headscope.heads.statistics import cluster_bootstrap


@dataclass(frozen=True, eq=False)
class HeadEffects:
    """What heads are worth on some texts; NaN for heads that were not measured.

    Attributes:
        values: [layers, H], the mean of ``per_example`` over examples; layers are attention sites in the order
            of calls.
        per_example: [B, layers, H]; for "ablate" the metric without the head minus the metric with it, for
            "gradient" the absolute derivative by the head's gate.
        clean: [B], the metric of the unchanged model.
        unit: the unit of all these, "nats per token" for a language model's loss.
        method: "ablate" or "gradient".
        notes: how it was computed, where not in the usual way.
    """

    values: Tensor
    per_example: Tensor
    clean: Tensor
    unit: str
    method: str
    notes: tuple[str, ...] = ()

    def normalized(self) -> HeadEffects:
        """Each layer's values divided by their ℓ2 norm, as Michel et al. 2019 (arXiv 1905.10650) compare heads.

        A layer of zeros stays so.

        Example:
            >>> values = torch.tensor([[3.0, 4.0]])
            >>> HeadEffects(values, values[None], torch.zeros(1), "nats per token", "gradient").normalized().values
            tensor([[0.6000, 0.8000]])
        """
        norm = self.values.nan_to_num().norm(dim=1, keepdim=True)
        norm = torch.where(norm > 0, norm, torch.ones_like(norm))
        unit = f"{self.unit}, ÷ the layer's norm"
        return replace(self, values=self.values / norm, per_example=self.per_example / norm, unit=unit)

    def interval(self, level: float = 0.95, replicates: int = 1000, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Percentile bootstrap over examples (Efron 1979): lower and upper end of ``values``, each [layers, H].

        Raises:
            ValueError: fewer than two examples, or a level that is not between 0 and 1.
        """
        examples = self.per_example.shape[0]
        if examples < 2:
            raise ValueError(f"an interval over {examples} example: wanted at least 2 rows of input_ids.")
        if not 0 < level < 1 or replicates < 1:
            raise ValueError(f"level={level}, replicates={replicates}: wanted 0 < level < 1 and replicates ≥ 1.")
        return cluster_bootstrap(self.per_example.movedim(0, -1), torch.ones(examples), replicates, seed, level)


def agreement(a: HeadEffects, b: HeadEffects) -> float:
    """Spearman's rank correlation over the heads that both tables have; ties share their mean rank.

    NaN where all heads of one table are worth the same.

    Raises:
        ValueError: tables of different shapes, or fewer than two heads in both.
    """
    if a.values.shape != b.values.shape:
        raise ValueError(
            f"agreement of tables {tuple(a.values.shape)} and {tuple(b.values.shape)}, [layers, H]: wanted two of "
            "the same model."
        )
    both = ~(a.values.isnan() | b.values.isnan())
    if int(both.sum()) < 2:
        raise ValueError(f"{int(both.sum())} heads are in both tables: wanted at least 2.")
    first, second = (_ranks(table.values[both]) for table in (a, b))
    first, second = first - first.mean(), second - second.mean()
    size = float(first.norm() * second.norm())
    return float(first @ second) / size if size else math.nan


def _ranks(values: Tensor) -> Tensor:
    _, which, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts - 1) / 2)[which]
