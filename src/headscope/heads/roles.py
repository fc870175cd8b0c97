"""Roles: names for strong measures, each with a threshold, a null, and evidence from texts that did not choose it.

Heads are picked on one half of the documents and reported on the other. A role says where a head looks, not what it
is worth: that is an effect.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from headscope.heads.measures.sums import Sums
from headscope.heads.relations import RelationCounts
from headscope.heads.relations.counts import with_arrow
from headscope.heads.relations.score import LEVEL, RelationScore
from headscope.heads.statistics import fewest_clusters

__all__ = ["LEAST_TEXT", "ROLES", "Evidence", "Role", "find_roles", "why_no_role"]

LEAST_TEXT = 0.05  # a head that gives text less than this has no role from what it gives to text


@dataclass(frozen=True)
class Role:
    """A name for a strong measure.

    Attributes:
        name: The role.
        column: The measure that it rests on.
        threshold: What the measure must reach, on both halves.
        source: Where the threshold comes from.
        about: What such a head does.
        over_text: Whether the measure leaves sinks out.
        is_null: Whether it is what an even head does, so that there is nothing for it to be better than.
        counted: The column whose denominator is the number of rows behind the measure; its own if empty.
    """

    name: str
    column: str
    threshold: float
    source: str
    about: str
    over_text: bool = False
    is_null: bool = False
    counted: str = ""


ROLES: tuple[Role, ...] = (
    Role("previous token", "offset_hits-1", 0.9, "arXiv 1905.09418", "looks at the token before", True),
    Role("next token", "offset_hits+1", 0.9, "arXiv 1905.09418", "looks at the token after", True),
    Role("self", "offset_hits+0", 0.9, "as arXiv 1905.09418 for ±1", "looks at the token itself", True),
    Role("induction", "induction", 0.4, "ours", "finds what came after the same token before (arXiv 2209.11895)"),
    Role("duplicate", "duplicate", 0.4, "ours", "finds the same token before"),
    Role("rest", "first", 0.3, "arXiv 2410.10781", "rests on the first position: a sink"),
    Role("broad", "entropy_share", 0.8, "ours", "looks at everything nearly evenly", is_null=True, counted="entropy"),
    Role(
        "delimiter",
        "delimiter",
        0.5,
        "ours",
        "looks at punctuation and line ends (arXiv 1906.04341)",
        over_text=True,
        counted="delimiter_raw",
    ),
)


@dataclass(frozen=True)
class Evidence:
    """One role of one head, and what speaks for it.

    Attributes:
        role: The role's name.
        layer: From 0.
        head: From 0.
        score: The measure on the half that did not choose the head.
        null: The same for uniform attention; for a relation what luck reaches, see `RelationScore.null`.
        low: Lower end of the score's 95 % interval, documents (or frames) drawn again.
        high: Its upper end.
        picked: The measure on the half that chose it.
        p: For a relation, after Holm's correction over all heads and both directions; NaN otherwise.
        examples: Rows that could choose, or pairs, behind the score; of repeats the rows of the second copy.
        documents: From how many documents, or frames.
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
    sums: Sums, null: Sums, relations: Sequence[RelationScore] = (), halves: dict[str, int] | None = None
) -> list[Evidence]:
    """All roles that hold, by role in the order of the list, then by score.

    Args:
        sums: Every head's sums.
        null: Those of a head that is even over what it may see.
        relations: The heads' scores for relations between words.
        halves: For each document its half, to count those behind a score.
    """
    found: list[Evidence] = []
    on_text = _on_text(sums)
    for role in ROLES:
        if role.column in sums.values:
            found += _of_measure(role, sums, null, on_text, halves or {})
    rows = [_of_relation(row) for row in relations if row.role]
    kept = [row for row in rows if on_text is None or float(on_text[row.layer, row.head]) >= LEAST_TEXT]
    return found + sorted(kept, key=lambda row: (row.role, -row.score))


def _on_text(sums: Sums) -> Tensor | None:
    """What each head gives to text: the rest lies on special tokens, or on a sink that the model learned."""
    return sums.value("text") if "text" in sums.values else None


def _of_measure(role: Role, sums: Sums, null: Sums, on_text: Tensor | None, halves: dict[str, int]) -> list[Evidence]:
    picked, score = sums.value(role.column, 0), sums.value(role.column, 1)
    even = null.value(role.column, 1)
    low, high = sums.interval(role.column)
    repeated = role.column in ("induction", "duplicate")
    documents = [name for name, half in halves.items() if half == 1 and name.startswith("repeat:") == repeated]
    if halves and len(documents) < 2:  # one document has no interval
        return []
    holds = (picked >= role.threshold) & (score >= role.threshold)
    holds &= (low > even) | role.is_null
    if role.over_text and on_text is not None:
        holds &= on_text >= LEAST_TEXT
    behind = sums.values[role.counted or role.column][1, 1]
    rows = [
        Evidence(
            role=role.name,
            layer=layer,
            head=head,
            score=float(score[layer, head]),
            null=float(even[layer, min(head, even.shape[1] - 1)]),
            low=float(low[layer, head]),
            high=float(high[layer, head]),
            picked=float(picked[layer, head]),
            p=math.nan,
            examples=round(float(behind[layer, head])),
            documents=len(documents),
        )
        for layer, head in holds.nonzero().tolist()
    ]
    return sorted(rows, key=lambda row: -row.score)


def _of_relation(row: RelationScore) -> Evidence:
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


def why_no_role(halves: Mapping[str, int], counts: RelationCounts) -> list[str]:
    """What is too little for any role to come from it, in sentences.

    Args:
        halves: Each text's half, by its name.
        counts: Of the relations.
    """
    return [*_too_few_texts(halves), *_too_few_rivals(counts)]


def _too_few_texts(halves: Mapping[str, int]) -> list[str]:
    """Heads are picked on one half, and reported on two texts of the other."""
    found = [half for name, half in halves.items() if not name.startswith("repeat:")]
    if not found or (0 in found and found.count(1) > 1):
        return []
    return [
        f"Too few texts for roles that come from texts (previous token, rest, broad …): {found.count(0)} to pick heads "
        f"where one is needed, {found.count(1)} to confirm them where two are. Give four at once."
    ]


def _too_few_rivals(counts: RelationCounts) -> list[str]:
    """Relations that are frequent enough, but not where a head could take one word for another."""
    least = fewest_clusters(1, LEVEL)
    named = set()
    for relation, direction, half in counts.keys:
        tally = counts.tally(relation, direction, half)
        contested = int((tally.contested > 0).sum())
        if len(tally.clusters) >= least > contested > 0:
            named.add(with_arrow(direction))
    if not named:
        return []
    return [
        f"No head can have a role from {', '.join(sorted(named))}: in fewer than {least} documents that pick heads, or "
        "that confirm them, does a pair have another word of the right class to choose from."
    ]
