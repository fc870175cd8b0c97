"""How often each head's strongest weight fell on the right word: sums that can be merged.

Counts of parts of a corpus, of ranks or machines, add up to the counts of the whole.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["MAX_OFFSET", "RelationCounts", "Tally", "direction_of"]

MAX_OFFSET = 30  # in words; a pair that is further apart agrees with no fixed offset

Key = tuple[str, str, int]


def direction_of(relation: str, reverse: bool) -> str:
    """The name of a direction.

    >>> direction_of("cause", True)
    'cause (reverse)'
    """
    return f"{relation} (reverse)" if reverse else relation


@dataclass(frozen=True, eq=False, slots=True)
class Tally:
    """The counts of one relation in one direction and one half, by cluster.

    Attributes:
        clusters: The names of the C clusters.
        hits: How many pairs each head hit, [C, layers, heads]; 0 for heads that a layer does not have.
        pairs: How many pairs were counted, [C].
        offsets: How many pairs are this many words apart, [C, 61]: the key is from 30 before the query to 30
            behind it.
        controls: As ``hits``, but how often the other words of the sentence, on average, chose the same word.
    """

    clusters: tuple[str, ...]
    hits: Tensor
    pairs: Tensor
    offsets: Tensor
    controls: Tensor


class RelationCounts:
    """Hits, pairs and offsets of every relation, direction and half.

    Attributes:
        heads: How many heads each layer has.
        examples: How many examples were run.
        skipped: How many were not, because the model cannot read so many tokens.
    """

    def __init__(self, heads: Sequence[int] = ()) -> None:
        self.heads = tuple(heads)
        self.examples = 0
        self.skipped = 0
        self._rows: dict[Key, dict[str, tuple[Tensor, Tensor, Tensor]]] = {}

    @property
    def keys(self) -> tuple[Key, ...]:
        """What was counted: (relation, direction, half), sorted."""
        return tuple(sorted(self._rows))

    @property
    def relations(self) -> tuple[str, ...]:
        """The names of the relations that were counted, sorted."""
        return tuple(sorted({relation for relation, _, _ in self._rows}))

    def add(self, key: Key, cluster: str, hits: Tensor, offset: int, controls: Tensor | None = None) -> None:
        """Count one pair: hits and controls [layers, heads], and by how many words the key follows the query."""
        sums, flat, others = self._row(key, cluster)
        sums += hits
        if controls is not None:
            others += controls
        flat[-1] += 1
        if abs(offset) <= MAX_OFFSET:
            flat[offset + MAX_OFFSET] += 1

    def _row(self, key: Key, cluster: str) -> tuple[Tensor, Tensor, Tensor]:
        """The sums of a cluster: hits, the counts of offsets with the number of pairs at the end, controls."""
        rows = self._rows.setdefault(key, {})
        if cluster not in rows:
            shape = len(self.heads), max(self.heads, default=0)
            rows[cluster] = (
                torch.zeros(shape, dtype=torch.float64),
                torch.zeros(2 * MAX_OFFSET + 2, dtype=torch.float64),
                torch.zeros(shape, dtype=torch.float64),
            )
        return rows[cluster]

    def tally(self, relation: str, direction: str, half: int) -> Tally:
        """The counts of one relation, direction and half, its clusters sorted by name; empty if there are none."""
        rows = self._rows.get((relation, direction, half), {})
        names = tuple(sorted(rows))
        shape = len(self.heads), max(self.heads, default=0)
        if not names:
            empty = controls = torch.zeros(0, *shape, dtype=torch.float64)
            flat = torch.zeros(0, 2 * MAX_OFFSET + 2, dtype=torch.float64)
        else:
            empty = torch.stack([rows[name][0] for name in names])
            flat = torch.stack([rows[name][1] for name in names])
            controls = torch.stack([rows[name][2] for name in names])
        return Tally(names, empty, flat[:, -1], flat[:, :-1], controls)

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
        for key, rows in other._rows.items():
            for cluster, theirs in rows.items():
                for mine, added in zip(self._row(key, cluster), theirs, strict=True):
                    mine.add_(added)

    def without(self, clusters: Collection[str]) -> RelationCounts:
        """The counts of all other clusters; how many examples these came from is not known, and 0."""
        rest = RelationCounts(self.heads)
        for key, rows in self._rows.items():
            kept = {cluster: sums for cluster, sums in rows.items() if cluster not in clusters}
            if kept:
                rest._rows[key] = kept
        return rest

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The counts as tensors, for a safetensors file, and the names that go with them, for JSON."""
        tensors: dict[str, Tensor] = {}
        names = []
        for number, key in enumerate(self.keys):
            tally = self.tally(*key)
            tensors |= {f"{number}.hits": tally.hits, f"{number}.pairs": tally.pairs.clone()}
            tensors |= {f"{number}.offsets": tally.offsets.clone(), f"{number}.controls": tally.controls}
            relation, direction, half = key
            names.append({"relation": relation, "direction": direction, "half": half, "clusters": list(tally.clusters)})
        told = {"heads": list(self.heads), "examples": self.examples, "skipped": self.skipped, "keys": names}
        return tensors, told

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], names: Mapping[str, Any]) -> RelationCounts:
        """The counts that `to_tensors` gave.

        Raises:
            ValueError: A tensor is missing, or its shape does not fit the names.
        """
        counts = cls(names["heads"])
        counts.examples, counts.skipped = names["examples"], names["skipped"]
        shape = len(counts.heads), max(counts.heads, default=0)
        for number, told in enumerate(names["keys"]):
            key = (told["relation"], told["direction"], told["half"])
            clusters = told["clusters"]
            wanted = {
                f"{number}.hits": (len(clusters), *shape),
                f"{number}.pairs": (len(clusters),),
                f"{number}.offsets": (len(clusters), 2 * MAX_OFFSET + 1),
                f"{number}.controls": (len(clusters), *shape),
            }
            for name, size in wanted.items():
                found = tuple(tensors[name].shape) if name in tensors else None
                if found != size:
                    raise ValueError(
                        f"The counts of {told['direction']!r} need the tensor {name!r} of shape {size}, and got "
                        f"{'none' if found is None else found}. Give what to_tensors() returned, both parts."
                    )
            hits, pairs, offsets, controls = (tensors[name].double() for name in wanted)
            for row, cluster in enumerate(clusters):
                mine = counts._row(key, cluster)
                mine[0].add_(hits[row])
                mine[1].add_(torch.cat([offsets[row], pairs[row, None]]))
                mine[2].add_(controls[row])
        return counts
