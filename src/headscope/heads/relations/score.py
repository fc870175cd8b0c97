"""How well each head finds the words that belong to each other, against three ways of being right by luck.

A head may look the same number of words away always; it may like the right word whoever asks; it may look at any word
of the right word's class. Heads are picked on one half of the sentences and reported on the other. A head has a
relation's role if on both halves it is better than each of the three: on the first, which picks, by itself; on the
second by a lead, and after Holm's correction over all heads and directions that were picked. Clusters of sentences
are the cases.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headscope.heads.relations.counts import MAX_OFFSET, RelationCounts, Tally, direction_of
from headscope.heads.statistics import cluster_bootstrap, cluster_score_test, holm

__all__ = ["LEAD", "LEVEL", "RelationScore", "best_heads", "scores"]

LEVEL = 0.05  # of a role, on either half
LEAD = 0.1  # how far a role's accuracy is above what luck reaches at least
_MOST_FIXED = 0.5  # a baseline above it says that the sentences hardly vary


@dataclass(frozen=True, slots=True)
class RelationScore:
    """One head's accuracy for a relation in one direction, on the reported half.

    Attributes:
        relation: The relation's name.
        direction: The same, with " (reverse)" if the pair's target is the one that looks.
        layer: The layer, from 0.
        head: The head in it, from 0.
        accuracy: The share of pairs whose gold word has the head's strongest weight.
        baseline: The same for the best fixed offset.
        baseline_offset: That offset in words; -1 is the word before.
        control: How often other words of the query's class (of any, where there are none), on average, chose the
            same word in this head.
        contested: How many pairs have rivals: other words of the right word's class to choose from.
        contested_accuracy: The accuracy in these; NaN if there are none.
        blind: What it would be there if the head chose as often a word of the right class, and any of them alike.
        low: The lower end of the accuracy's 95 % interval, clusters drawn again.
        high: Its upper end.
        p: One-sided p that the head hits more than the best fixed offset, more than its control, and among rivals more
            than blind.
        p_holm: The same after Holm's correction over the heads and directions of the relation that the other half
            picked; 1 for those that it did not.
        pairs: How many pairs were asked.
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
    blind: float
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
    def lucky(self) -> float:
        """The accuracy if the head were blind among rivals: NaN if no pair has any."""
        return self.accuracy - (self.contested_accuracy - self.blind) * self.contested / self.pairs

    @property
    def null(self) -> float:
        """The most that luck reaches: the best fixed offset, the control, or, where there are rivals, being blind."""
        return max(self.baseline, self.control, self.lucky if self.contested else 0.0)

    @property
    def role(self) -> bool:
        """Whether the head has this relation's role."""
        good = self.picked_p < LEVEL and self.p_holm < LEVEL and not self.too_fixed
        leads = self.accuracy >= max(self.baseline, self.control) + LEAD
        return good and leads and (not self.contested or self.contested_accuracy >= self.blind + LEAD)


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
    found: list[RelationScore] = []
    for relation in counts.relations:
        parts = []
        for direction in (direction_of(relation, False), direction_of(relation, True)):
            tally = counts.tally(relation, direction, half)
            if tally.clusters:
                parts.append(_Part(counts, tally, relation, direction, half))
        tested = [(part, i) for part in parts for i, p in enumerate(part.picked_p) if p < LEVEL]
        for (part, i), p in zip(tested, holm([part.p[i] for part, i in tested]), strict=True):
            part.p_holm[i] = p
        for part in parts:
            found += part.scores()
    return found


class _Part:
    """One relation in one direction, all heads."""

    def __init__(self, counts: RelationCounts, tally: Tally, relation: str, direction: str, half: int) -> None:
        self.relation, self.direction = relation, direction
        self.there = _there(counts)
        self.tally = tally
        self.hits = tally.hits[:, self.there].T  # [heads of all layers, C]
        self.best = _best_offset(tally)
        self.total = float(tally.pairs.sum())
        self.baseline = float(tally.offsets[:, self.best].sum()) / self.total
        self.p: list[float] = _p(tally, self.there)
        picks = counts.tally(relation, direction, 1 - half)
        self.picked, self.picked_p = _accuracy(picks, self.there), _p(picks, self.there)
        self.p_holm = [1.0] * len(self.p)  # of those that were not picked

    def scores(self) -> list[RelationScore]:
        """One row for each head."""
        low, high = cluster_bootstrap(self.hits, self.tally.pairs)
        accuracy = (self.hits.sum(-1) / self.total).tolist()
        control = (self.tally.controls[:, self.there].sum(0) / self.total).tolist()
        contested = self.tally.contested.sum()  # no pair: 0 ÷ 0 is NaN
        hit, blind = (x[:, self.there].sum(0) / contested for x in (self.tally.contested_hits, self.tally.blind))
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
                contested_accuracy=float(hit[i]),
                blind=float(blind[i]),
                low=float(low[i]),
                high=float(high[i]),
                p=self.p[i],
                p_holm=self.p_holm[i],
                pairs=int(self.total),
                clusters=len(self.tally.clusters),
                picked_accuracy=float(self.picked[i]),
                picked_p=self.picked_p[i],
                too_fixed=self.baseline > _MOST_FIXED,
            )
            for i, (layer, head) in enumerate(self.there.nonzero().tolist())
        ]


def _there(counts: RelationCounts) -> Tensor:
    """The heads that there are, [layers, heads] bool: layers may have different numbers."""
    heads = torch.tensor(counts.heads).reshape(-1, 1)
    return torch.arange(max(counts.heads, default=0)) < heads


def _best_offset(tally: Tally) -> int:
    """The column of the offset that most pairs have."""
    return int(tally.offsets.sum(0).argmax())


def _p(tally: Tally, there: Tensor) -> list[float]:
    """For each head the p that it hits more than each of the three kinds of luck.

    It must do all, so the largest counts (an intersection-union test). Where no pair has rivals, there are two kinds.
    """
    hits = tally.hits[:, there].T
    legs = [hits - tally.offsets[:, _best_offset(tally)], hits - tally.controls[:, there].T]
    if tally.contested.sum() > 0:
        legs.append((tally.contested_hits - tally.blind)[:, there].T)
    found: list[float] = torch.stack([cluster_score_test(leg) for leg in legs]).amax(0).tolist()
    return found


def _accuracy(tally: Tally, there: Tensor) -> Tensor:
    return tally.hits[:, there].sum(0) / tally.pairs.sum()


def best_heads(
    counts: RelationCounts, relation: str, direction: str | None = None, *, half: int = 0
) -> list[tuple[int, int, float]]:
    """All heads by their accuracy on the half that picks: (layer, head, accuracy), the best first.

    Args:
        counts: What `count_relations` counted.
        relation: The relation's name.
        direction: The relation's name, or that with " (reverse)"; the first by default.
        half: The half on which they are picked.

    Raises:
        ValueError: Nothing was counted for this relation and direction on this half.
    """
    direction = relation if direction is None else direction
    tally = counts.tally(relation, direction, half)
    if not tally.clusters:
        counted = ", ".join(sorted({repr(d) for _, d, h in counts.keys if h == half})) or "nothing"
        raise ValueError(
            f"best_heads got the relation {relation!r} in the direction {direction!r}, for which half {half} has no "
            f"pairs. It has: {counted}."
        )
    there = _there(counts)
    accuracy = _accuracy(tally, there).tolist()
    places = there.nonzero().tolist()
    ranked = sorted(zip(places, accuracy, strict=True), key=lambda item: (-item[1], item[0]))
    return [(layer, head, share) for (layer, head), share in ranked]
