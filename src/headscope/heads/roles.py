"""Roles: names for high scores of heads, each with a threshold, a null and evidence from held-out texts.

Heads are picked on one half of the documents and reported on the other. A role says what a head attends to. What the
model loses without the head is an effect.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from headscope.heads.measures import REPEATED
from headscope.heads.measures.sums import MeasureSums
from headscope.heads.relations import RelationCounts
from headscope.heads.relations.counts import with_arrow
from headscope.heads.relations.score import LEVEL, RelationScore
from headscope.heads.statistics import fewest_clusters

MIN_TEXT_WEIGHT = 0.05  # a head with less weight on text has no role from how it attends to text


@dataclass(frozen=True)
class Role:
    """A name for a high score.

    Attributes:
        name: The role.
        column: The column of the atlas that decides.
        threshold: What the column must reach, on both halves.
        source: Where the threshold comes from.
        about: What such a head does.
        over_text: Whether the column leaves sinks out.
        is_null: Whether uniform attention has this role, so that no null applies.
        count_column: The column whose denominator counts the rows behind the score; ``column`` itself if empty.
    """

    name: str
    column: str
    threshold: float
    source: str
    about: str
    over_text: bool = False
    is_null: bool = False
    count_column: str = ""


ROLES: tuple[Role, ...] = (
    Role("previous token", "offset_hits-1", 0.9, "arXiv 1905.09418", "attends to the token before", True),
    Role("next token", "offset_hits+1", 0.9, "arXiv 1905.09418", "attends to the token after", True),
    Role("self", "offset_hits+0", 0.9, "as arXiv 1905.09418 for ±1", "attends to the token itself", True),
    Role("induction", "induction", 0.4, "ours", "attends to what followed the same token before (arXiv 2209.11895)"),
    Role("duplicate", "duplicate", 0.4, "ours", "attends to the same token before"),
    Role("sink", "first", 0.3, "arXiv 2410.10781", "attends to the first position, an attention sink"),
    Role(
        "uniform",
        "entropy_share",
        0.8,
        "ours",
        "attends to everything nearly uniformly",
        is_null=True,
        count_column="entropy",
    ),
    Role(
        "delimiter",
        "delimiter",
        0.5,
        "ours",
        "attends to punctuation and line ends (arXiv 1906.04341)",
        over_text=True,
        count_column="delimiter_raw",
    ),
)


@dataclass(frozen=True)
class Evidence:
    """One role of one head, with its score and the uncertainty of that score.

    Attributes:
        role: The role's name.
        layer: From 0.
        head: From 0.
        score: The column's value on the half that did not pick the head.
        null: The value for uniform attention; for a relation the largest null, see `RelationScore.null`.
        low: Lower end of the score's 95 % interval, from a bootstrap over documents (or frames).
        high: Its upper end.
        picked: The value on the half that picked the head.
        p: For a relation, after Holm's correction over all heads and both directions; NaN otherwise.
        examples: The number of rows (or pairs) behind the score; for repeats, rows of the second copy.
        documents: The number of documents (or frames) behind the score.
    """

    role: str
    layer: int
    head: int
    score: float
    null: float
    low: float
    high: float
    picked: float
    p: float
    examples: int
    documents: int


def find_roles(
    sums: MeasureSums, null: MeasureSums, relations: Sequence[RelationScore] = (), halves: dict[str, int] | None = None
) -> list[Evidence]:
    """All roles, in the order of ``ROLES`` and then of relations, the highest score first.

    Args:
        sums: The sums of every head.
        null: The sums of a head with uniform attention.
        relations: The heads' scores for relations between words.
        halves: The half of each document; used to count the documents behind a score.
    """
    text_weight = sums.value("text") if "text" in sums.values else None
    evidence: list[Evidence] = []
    for role in ROLES:
        if role.column in sums.values:
            evidence += _from_column(role, sums, null, text_weight, halves or {})
    rows = [_from_relation(row) for row in relations if row.role]
    if text_weight is not None:
        rows = [row for row in rows if float(text_weight[row.layer, row.head]) >= MIN_TEXT_WEIGHT]
    return evidence + sorted(rows, key=lambda row: (row.role, -row.score))


def _from_column(
    role: Role, sums: MeasureSums, null: MeasureSums, text_weight: Tensor | None, halves: dict[str, int]
) -> list[Evidence]:
    picked, score = sums.value(role.column, 0), sums.value(role.column, 1)
    uniform = null.value(role.column, 1)
    low, high = sums.interval(role.column)
    repeated = role.column in REPEATED
    documents = [name for name, half in halves.items() if half == 1 and name.startswith("repeat:") == repeated]
    if halves and len(documents) < 2:  # one document has no interval
        return []
    holds = (picked >= role.threshold) & (score >= role.threshold)
    holds &= (low > uniform) | role.is_null
    if role.over_text and text_weight is not None:
        holds &= text_weight >= MIN_TEXT_WEIGHT
    row_counts = sums.values[role.count_column or role.column][1, 1]
    rows = [
        Evidence(
            role=role.name,
            layer=layer,
            head=head,
            score=float(score[layer, head]),
            null=float(uniform[layer, min(head, uniform.shape[1] - 1)]),
            low=float(low[layer, head]),
            high=float(high[layer, head]),
            picked=float(picked[layer, head]),
            p=math.nan,
            examples=round(float(row_counts[layer, head])),
            documents=len(documents),
        )
        for layer, head in holds.nonzero().tolist()
    ]
    return sorted(rows, key=lambda row: -row.score)


def _from_relation(row: RelationScore) -> Evidence:
    return Evidence(
        role=row.direction,
        layer=row.layer,
        head=row.head,
        score=row.accuracy,
        null=row.null,
        low=row.low,
        high=row.high,
        picked=row.picked_accuracy,
        p=row.p_holm,
        examples=row.pairs,
        documents=row.clusters,
    )


def missing_evidence(halves: Mapping[str, int], counts: RelationCounts) -> list[str]:
    """Sentences that say where there was too little text, or too few contested pairs, for any role.

    Args:
        halves: The half of each text, by its name.
        counts: The counts of the relations.
    """
    return [*_too_few_texts(halves), *_too_few_distractors(counts)]


def _too_few_texts(halves: Mapping[str, int]) -> list[str]:
    """One half picks heads; two texts of the other half confirm them."""
    text_halves = [half for name, half in halves.items() if not name.startswith("repeat:")]
    if not text_halves or (0 in text_halves and text_halves.count(1) > 1):
        return []
    return [
        f"Too few texts for roles that come from texts (previous token, sink, uniform …): {text_halves.count(0)} to "
        f"pick heads (needed: 1), {text_halves.count(1)} to confirm them (needed: 2). Give four at once."
    ]


def _too_few_distractors(counts: RelationCounts) -> list[str]:
    """Relations with enough documents, but too few with contested pairs."""
    least = fewest_clusters(1, LEVEL)
    directions = set()
    for relation, direction, half in counts.keys:
        tally = counts.tally(relation, direction, half)
        contested = int((tally.contested > 0).sum())
        if len(tally.clusters) >= least > contested > 0:
            directions.add(with_arrow(direction))
    if not directions:
        return []
    return [
        f"No head can have a role from {', '.join(sorted(directions))}: in fewer than {least} documents that pick "
        "heads, or that confirm them, does a pair have another word of the right class to choose from."
    ]
