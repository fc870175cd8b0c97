"""Tests and intervals for counts in clusters.

Sentences from one frame, or from one document, depend on each other: a thousand of them are not a thousand
independent cases. Here a cluster is a case: the sums of clusters are tested and resampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_BOUND = 0.25 / (0.5 * math.erfc(1.0))  # 1 ÷ (4 P(Z > √2)) = 3.18: a smaller factor is not a bound for all differences
_MAX_REPLICATES = 4_000_000  # in memory at once


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for multiple tests (Holm 1979, Scand. J. Statist. 6, 65–70).

    If nulls with adjusted p < 0.05 are rejected, then at most one of 20 families of tests has a false rejection.

    Raises:
        ValueError: A p-value is not between 0 and 1.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    wrong = [value for value in p if not 0 <= value <= 1]
    if wrong:
        raise ValueError(f"holm got the p-value {wrong[0]}: wanted numbers from 0 to 1.")
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, least = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = least
    return adjusted


def cluster_score_test(differences: Tensor) -> Tensor:
    """An upper bound on the one-sided p that the clusters' differences are centred at 0; [..., C] to [...].

    The bound is 3.18 times the normal tail of T = Σd ÷ √Σd². It holds for any number of clusters of any sizes, if under
    the null each difference could as well have the other sign (Bentkus and Dzindzalieta 2015, arXiv 1307.3451). The
    variance is taken about 0, the mean under the null: so T is at most √C, few clusters never give a small p, and
    clusters that all agree do not divide by zero. Where all differences are 0, p is 1.

    >>> cluster_score_test(torch.tensor([[1.0] * 9, [1.0, -1.0] + [0.0] * 7, [0.0] * 9]))
    tensor([0.0043, 1.0000, 1.0000], dtype=torch.float64)
    """
    d = differences.double()
    spread = d.square().sum(-1).sqrt()
    score = d.sum(-1) / torch.where(spread > 0, spread, 1)
    p = (_BOUND * 0.5 * torch.erfc(score / 2**0.5)).clamp(max=1)
    return torch.where(spread > 0, p, torch.ones_like(p))


def fewest_clusters(tests: int, level: float) -> int:
    """The smallest number of clusters that can give p < ``level`` after Holm's correction, if all of them agree.

    >>> fewest_clusters(1, 0.05), fewest_clusters(540, 0.05)
    (5, 17)
    """
    return next(c for c in range(1, 10_000) if float(cluster_score_test(torch.ones(c))) * tests < level)


def cluster_bootstrap(
    numerators: Tensor, denominators: Tensor, replicates: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[Tensor, Tensor]:
    """The percentile interval of a ratio of sums, by a bootstrap over whole clusters.

    Args:
        numerators: [..., C], for instance the hits in each cluster.
        denominators: [C], for instance the pairs in each cluster. Clusters without any are left out.
        replicates: How often C clusters are drawn, with replacement.
        seed: The seed of the draws.
        level: The share of replicates inside the interval.

    Returns:
        The lower and the upper end, each [...]; NaN if there is no cluster.

    Raises:
        ValueError: The shapes do not match, or `level` or `replicates` is out of range.
    """
    if denominators.dim() != 1 or numerators.shape[-1:] != denominators.shape:
        raise ValueError(
            f"cluster_bootstrap got numerators {tuple(numerators.shape)} and denominators "
            f"{tuple(denominators.shape)}: wanted [..., C] and [C]."
        )
    if not 0 < level < 1 or replicates < 1:
        raise ValueError(
            f"cluster_bootstrap got level {level} and {replicates} replicates: wanted a level between 0 and 1, "
            "and at least 1 replicate."
        )
    filled = denominators > 0
    top, bottom = numerators.double()[..., filled].cpu(), denominators.double()[filled].cpu()
    count = len(bottom)
    if count == 0:
        undefined = torch.full(numerators.shape[:-1], torch.nan, dtype=torch.float64)
        return undefined, undefined.clone()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (replicates, count), generator=generator)
    times = torch.zeros(replicates, count, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(replicates, count, dtype=torch.float64)
    )
    sums = times @ bottom
    flat = top.reshape(-1, count)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    parts = [
        torch.quantile(part @ times.T / sums, ends, dim=-1)
        for part in flat.split(max(1, _MAX_REPLICATES // replicates))
    ]
    low, high = torch.cat(parts, dim=-1) if parts else flat.new_zeros(2, 0)
    return low.reshape(top.shape[:-1]), high.reshape(top.shape[:-1])
