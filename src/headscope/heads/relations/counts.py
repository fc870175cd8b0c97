"""How often each head's strongest weight is on the right word: sums that can be merged.

Counts of parts of a corpus, of ranks or machines, add up to the counts of the whole.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headscope.heads.examples import PairExamples

MAX_OFFSET = 30  # in words; a pair that is further apart agrees with no fixed offset

Key = tuple[str, str, int]


def direction_of(relation: str, reverse: bool) -> str:
    """The name of a direction.

    >>> direction_of("cause", True)
    'cause (reverse)'
    """
    return f"{relation} (reverse)" if reverse else relation


def with_arrow(direction: str) -> str:
    """A direction's name, or that of another role, as tables and figures write it.

    >>> with_arrow("cause (reverse)"), with_arrow("self")
    ('cause ←', 'self')
    """
    return direction.removesuffix(" (reverse)") + " ←" if direction.endswith(" (reverse)") else direction


@dataclass(frozen=True, eq=False, slots=True)
class Tally:
    """The counts of one relation in one direction and one half, by cluster.

    Attributes:
        clusters: The names of the C clusters.
        pairs: How many pairs were counted, [C].
        offsets: How many pairs are this many words apart, [C, 61]: the key is from 30 before the query to 30
            behind it.
        contested: How many pairs have distractors: other candidates of the gold word's class, [C].
        hits: How many pairs each head hit, [C, layers, heads]; 0 for heads that a layer does not have.
        controls: As ``hits``, but how often other words of the query's class (of any, where there are none) attend
            most to the same word, on average.
        contested_hits: As ``hits``, of the contested pairs alone.
        class_baseline: As ``contested_hits``, if the head drew uniformly from the class each time it chooses from it.
    """

    clusters: tuple[str, ...]
    pairs: Tensor
    offsets: Tensor
    contested: Tensor
    hits: Tensor
    controls: Tensor
    contested_hits: Tensor
    class_baseline: Tensor


_BY_HEAD = ("hits", "controls", "contested_hits", "class_baseline")
_BY_PAIR = {"pairs": (), "offsets": (2 * MAX_OFFSET + 1,), "contested": ()}


class RelationCounts:
    """Hits, pairs and offsets of every relation, direction and half.

    Attributes:
        heads: How many heads each layer has.
        examples: How many examples were run.
        skipped: How many were not, because the model cannot read so many tokens.
        empty: How many were not, because the tokenizer keeps nothing of them.
        pair_examples: Pairs of the second half that heads get right and wrong most clearly.
    """

    def __init__(self, heads: Sequence[int] = ()) -> None:
        self.heads = tuple(heads)
        self.examples = 0
        self.skipped = 0
        self.empty = 0
        self.pair_examples = PairExamples()
        self._rows: dict[Key, dict[str, dict[str, Tensor]]] = {}

    @property
    def keys(self) -> tuple[Key, ...]:
        """What was counted: (relation, direction, half), sorted."""
        return tuple(sorted(self._rows))

    @property
    def relations(self) -> tuple[str, ...]:
        """The names of the relations that were counted, sorted."""
        return tuple(sorted({relation for relation, _, _ in self._rows}))

    def add(
        self,
        key: Key,
        cluster: str,
        hits: Tensor,
        offset: int,
        controls: Tensor | None = None,
        class_baseline: Tensor | None = None,
    ) -> None:
        """Count one pair.

        Args:
            key: Its relation, direction and half.
            cluster: Its frame or document.
            hits: [layers, heads], which heads hit it.
            offset: By how many words the key follows the query.
            controls: [layers, heads], as in `Tally`; none hit if not given.
            class_baseline: The same; None if the pair is not contested.
        """
        row = self._row(key, cluster)
        row["hits"] += hits
        row["pairs"] += 1
        if controls is not None:
            row["controls"] += controls
        if class_baseline is not None:
            row["contested"] += 1
            row["contested_hits"] += hits
            row["class_baseline"] += class_baseline
        if abs(offset) <= MAX_OFFSET:
            row["offsets"][offset + MAX_OFFSET] += 1

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        by_head = len(self.heads), max(self.heads, default=0)
        return {**_BY_PAIR, **dict.fromkeys(_BY_HEAD, by_head)}

    def _row(self, key: Key, cluster: str) -> dict[str, Tensor]:
        """The sums of a cluster."""
        rows = self._rows.setdefault(key, {})
        if cluster not in rows:
            rows[cluster] = {name: torch.zeros(size, dtype=torch.float64) for name, size in self._shapes().items()}
        return rows[cluster]

    def tally(self, relation: str, direction: str, half: int) -> Tally:
        """The counts of one relation, direction and half, its clusters sorted by name; empty if there are none."""
        rows = self._rows.get((relation, direction, half), {})
        names = tuple(sorted(rows))
        sums = {
            name: torch.stack([rows[cluster][name] for cluster in names])
            if names
            else torch.zeros((0, *size), dtype=torch.float64)
            for name, size in self._shapes().items()
        }
        return Tally(names, **sums)

    def merge(self, other: RelationCounts) -> None:
        """Add the counts of another part of the corpus. Clusters of the same name become one.

        Raises:
            ValueError: The other counts are of a model with other heads.
        """
        if not self.heads and not self._rows:
            self.heads = other.heads
        if self.heads != other.heads and (other.heads or other._rows):
            raise ValueError(
                f"merge got counts of {len(other.heads)} layers with {sorted(set(other.heads))} heads, and has "
                f"{len(self.heads)} layers with {sorted(set(self.heads))}: wanted counts of the same model."
            )
        self.examples += other.examples
        self.skipped += other.skipped
        self.empty += other.empty
        self.pair_examples.merge(other.pair_examples)
        for key, rows in other._rows.items():
            ours = self._rows.setdefault(key, {})
            for cluster, sums in rows.items():
                row = ours.get(cluster, {})
                ours[cluster] = {name: x + row[name] if row else x.clone() for name, x in sums.items()}

    def without(self, clusters: Collection[str]) -> RelationCounts:
        """The counts of all other clusters; how many examples these came from is not known, and 0.

        Directions that lose a cluster lose their pair examples.
        """
        others = RelationCounts(self.heads)
        fewer = {direction for (_, direction, _), rows in self._rows.items() if not rows.keys().isdisjoint(clusters)}
        others.pair_examples = self.pair_examples.without(fewer)
        for key, rows in self._rows.items():
            clusters_left = {
                cluster: {name: x.clone() for name, x in sums.items()}
                for cluster, sums in rows.items()
                if cluster not in clusters
            }
            if clusters_left:
                others._rows[key] = clusters_left
        return others

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The counts as tensors, for a safetensors file, and the names that go with them, for JSON."""
        tensors: dict[str, Tensor] = {}
        names = []
        for number, key in enumerate(self.keys):
            tally = self.tally(*key)
            tensors |= {f"{number}.{name}": getattr(tally, name) for name in self._shapes()}
            relation, direction, half = key
            names.append({"relation": relation, "direction": direction, "half": half, "clusters": list(tally.clusters)})
        data: dict[str, Any] = {"heads": list(self.heads), "examples": self.examples, "skipped": self.skipped}
        return tensors, data | {"empty": self.empty, "keys": names}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], names: Mapping[str, Any]) -> RelationCounts:
        """The counts that `to_tensors` gave.

        Raises:
            ValueError: A tensor is missing, or its shape does not fit the names.
        """
        counts = cls(names["heads"])
        counts.examples, counts.skipped, counts.empty = names["examples"], names["skipped"], names["empty"]
        for number, entry in enumerate(names["keys"]):
            key = (entry["relation"], entry["direction"], entry["half"])
            clusters = entry["clusters"]
            for name, size in counts._shapes().items():
                wanted, stored = (len(clusters), *size), f"{number}.{name}"
                shape = tuple(tensors[stored].shape) if stored in tensors else None
                if shape != wanted:
                    raise ValueError(
                        f"The counts of {entry['direction']!r} need the tensor {stored!r} of shape {wanted}, and got "
                        f"{'none' if shape is None else shape}. Give what to_tensors() returned, both parts."
                    )
                for cluster, row in zip(clusters, tensors[stored].double(), strict=True):
                    counts._row(key, cluster)[name] += row
        return counts
