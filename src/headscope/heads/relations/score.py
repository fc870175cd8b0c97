"""How well each head finds the words that belong to each other, against three nulls, and which heads get a role.

The nulls: the best fixed offset; the control, other words that attend to the same word; the class baseline, a uniform
draw from the gold word's class. Heads are picked on one half of the sentences and reported on the other. A head has a
relation's role if it is better than each null on both halves: on the picking half in each test by itself; on the
reported half by a lead, and after Holm's correction over all heads and directions that were picked. Clusters of
sentences are the cases.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headscope.heads.relations.counts import MAX_OFFSET, RelationCounts, Tally, direction_of
from headscope.heads.statistics import cluster_bootstrap, cluster_score_test, holm

LEVEL = 0.05  # of a role, on either half
LEAD = 0.1  # how far a role's accuracy is above each null at least
_MAX_BASELINE = 0.5  # a baseline above it says that the sentences hardly vary


@dataclass(frozen=True, slots=True)
class RelationScore:
    """One head's accuracy for a relation in one direction, on the reported half.

    Attributes:
        relation: The relation's name.
        direction: The same, with " (reverse)" if the pair's target is the query.
        layer: The layer, from 0.
        head: The head in it, from 0.
        accuracy: The share of pairs whose gold word has the head's strongest weight.
        baseline: The same for the best fixed offset.
        baseline_offset: That offset in words; -1 is the word before.
        control: How often other words of the query's class (of any, where there are none) attend most to the same
            word in this head, on average.
        contested: How many pairs have distractors: other candidates of the gold word's class.
        contested_accuracy: The accuracy in these; NaN if there are none.
        class_baseline: The accuracy in these if the head drew uniformly from the class each time it chooses from it.
        low: The lower end of the accuracy's 95 % interval, from a bootstrap of clusters.
        high: Its upper end.
        p: One-sided p that the head hits more than the best fixed offset, more than its control, and in contested
            pairs more than the class baseline: the largest of the three.
        p_holm: The same after Holm's correction over the heads and directions of the relation that the other half
            picked; 1 for those that it did not.
        pairs: How many pairs were counted.
        clusters: From how many frames or documents.
        picked_accuracy: The accuracy on the other half, on which heads are picked; NaN if it has no pairs.
        picked_p: As `p`, on that other half and against its own best offset; 1 if it has no pairs.
        too_fixed: Whether the best fixed offset is right more than half the time; then nobody gets the role.
    """

    relation: str
    direction: str
    layer: int
    head: int
    accuracy: float
    baseline: float
    baseline_offset: int
    control: float
    contested: int
    contested_accuracy: float
    class_baseline: float
    low: float
    high: float
    p: float
    p_holm: float
    pairs: int
    clusters: int
    picked_accuracy: float
    picked_p: float
    too_fixed: bool

    @property
    def class_null(self) -> float:
        """The accuracy in all pairs if that in contested ones were the class baseline; NaN if none is contested."""
        return self.accuracy - (self.contested_accuracy - self.class_baseline) * self.contested / self.pairs

    @property
    def null(self) -> float:
        """The largest null: the best fixed offset, the control or, where pairs are contested, the class."""
        return max(self.baseline, self.control, self.class_null if self.contested else 0.0)

    @property
    def role(self) -> bool:
        """Whether the head has this relation's role."""
        good = self.picked_p < LEVEL and self.p_holm < LEVEL and not self.too_fixed
        leads = self.accuracy >= max(self.baseline, self.control) + LEAD
        return good and leads and (not self.contested or self.contested_accuracy >= self.class_baseline + LEAD)


def scores(counts: RelationCounts, *, half: int = 1) -> list[RelationScore]:
    """Every head's score for every relation and direction that has pairs: by relation, direction, layer, head.

    Args:
        counts: What `count_relations` counted.
        half: The half that is reported; the other is the one to pick heads on.

    Raises:
        ValueError: There is no such half.
    """
    if half not in (0, 1):
        raise ValueError(f"scores got half={half}: wanted 0 or 1.")
    rows: list[RelationScore] = []
    for relation in counts.relations:
        directions = []
        for direction in (direction_of(relation, False), direction_of(relation, True)):
            tally = counts.tally(relation, direction, half)
            if tally.clusters:
                directions.append(_Direction(counts, tally, relation, direction, half))
        tested = [(one, i) for one in directions for i, p in enumerate(one.picked_p) if p < LEVEL]
        for (one, i), p in zip(tested, holm([one.p[i] for one, i in tested]), strict=True):
            one.p_holm[i] = p
        for one in directions:
            rows += one.scores()
    return rows


class _Direction:
    """One relation in one direction, all heads."""

    def __init__(self, counts: RelationCounts, tally: Tally, relation: str, direction: str, half: int) -> None:
        self.relation, self.direction = relation, direction
        self.is_head = _is_head(counts)
        self.tally = tally
        self.hits = tally.hits[:, self.is_head].T  # [heads of all layers, C]
        self.best = _best_offset(tally)
        self.total = float(tally.pairs.sum())
        self.baseline = float(tally.offsets[:, self.best].sum()) / self.total
        self.p: list[float] = _p(tally, self.is_head)
        picks = counts.tally(relation, direction, 1 - half)
        self.picked, self.picked_p = _accuracy(picks, self.is_head), _p(picks, self.is_head)
        self.p_holm = [1.0] * len(self.p)  # of those that were not picked

    def scores(self) -> list[RelationScore]:
        """One row for each head."""
        low, high = cluster_bootstrap(self.hits, self.tally.pairs)
        accuracy = (self.hits.sum(-1) / self.total).tolist()
        control = (self.tally.controls[:, self.is_head].sum(0) / self.total).tolist()
        contested = self.tally.contested.sum()  # no pair: 0 ÷ 0 is NaN
        hits, baseline = (
            x[:, self.is_head].sum(0) / contested for x in (self.tally.contested_hits, self.tally.class_baseline)
        )
        return [
            RelationScore(
                relation=self.relation,
                direction=self.direction,
                layer=layer,
                head=head,
                accuracy=accuracy[i],
                baseline=self.baseline,
                baseline_offset=self.best - MAX_OFFSET,
                control=control[i],
                contested=int(contested),
                contested_accuracy=float(hits[i]),
                class_baseline=float(baseline[i]),
                low=float(low[i]),
                high=float(high[i]),
                p=self.p[i],
                p_holm=self.p_holm[i],
                pairs=int(self.total),
                clusters=len(self.tally.clusters),
                picked_accuracy=float(self.picked[i]),
                picked_p=self.picked_p[i],
                too_fixed=self.baseline > _MAX_BASELINE,
            )
            for i, (layer, head) in enumerate(self.is_head.nonzero().tolist())
        ]


def _is_head(counts: RelationCounts) -> Tensor:
    """The heads that exist, [layers, heads] bool: layers may have different numbers."""
    heads = torch.tensor(counts.heads).reshape(-1, 1)
    return torch.arange(max(counts.heads, default=0)) < heads


def _best_offset(tally: Tally) -> int:
    """The column of the offset that most pairs have."""
    return int(tally.offsets.sum(0).argmax())


def _p(tally: Tally, is_head: Tensor) -> list[float]:
    """For each head the largest p against the nulls: it must beat all of them (an intersection-union test).

    Where no pair is contested, there are two nulls.
    """
    hits = tally.hits[:, is_head].T
    differences = [hits - tally.offsets[:, _best_offset(tally)], hits - tally.controls[:, is_head].T]
    if tally.contested.sum() > 0:
        differences.append((tally.contested_hits - tally.class_baseline)[:, is_head].T)
    p: list[float] = torch.stack([cluster_score_test(d) for d in differences]).amax(0).tolist()
    return p


def _accuracy(tally: Tally, is_head: Tensor) -> Tensor:
    return tally.hits[:, is_head].sum(0) / tally.pairs.sum()
