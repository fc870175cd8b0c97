"""HeadAtlas: what every head of a model does and is worth, one row per head, with the sums behind every number."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headscope.errors import AtlasError
from headscope.heads.atlas import file as atlas_file
from headscope.heads.atlas.measuring import Measurements
from headscope.heads.atlas.state import pack, unpack
from headscope.heads.atlas.worth import Worth
from headscope.heads.effects import HeadEffects, agreement
from headscope.heads.measures import REPEATED
from headscope.heads.relations.counts import RelationCounts
from headscope.heads.relations.score import RelationScore, scores
from headscope.heads.roles import Evidence, find_roles, missing_evidence

_SAME_PLAN = {"length": "lengths of pieces", "period": "periods of repeats", "worth_tokens": "lengths of worth texts"}


class HeadAtlas:
    """What every head of a model does. Made by :func:`headscope.profile`, or by ``headscope heads``.

    Attributes:
        info: The model with a hash of its weights, texts with their hashes, versions, seeds, definitions of columns.
        measurements: The sums of all measures.
        relations: The counts of all relations.
        worth: What each head is worth on each text.
    """

    def __init__(
        self,
        info: Mapping[str, Any] | None = None,
        measurements: Measurements | None = None,
        relations: RelationCounts | None = None,
        worth: Worth | None = None,
    ) -> None:
        self.info: dict[str, Any] = dict(info or {})
        self.measurements = measurements or Measurements()
        self.relations = relations or RelationCounts()
        self.worth = worth or Worth()
        self._scores: list[RelationScore] | None = None

    @property
    def heads(self) -> tuple[int, ...]:
        """How many heads each layer has."""
        return tuple(self.info["model"]["heads"])

    def __len__(self) -> int:
        return sum(self.heads)

    def relation_scores(self) -> list[RelationScore]:
        """Every head's accuracy for every relation and direction, on the half that did not pick heads."""
        if self._scores is None:
            self._scores = scores(self.relations)
        return self._scores

    def roles(self) -> list[Evidence]:
        """All roles with their evidence. A head may have several, or none."""
        return find_roles(
            self.measurements.sums, self.measurements.null, self.relation_scores(), self.info.get("documents", {})
        )

    def value(self, column: str) -> Tensor:
        """A column as [layers, H]; NaN where a layer has fewer heads or nothing was measured.

        Raises:
            AtlasError: There is no such column.
        """
        columns = self.columns()
        if column not in columns:
            raise AtlasError(f"the atlas has no column {column!r}; it has: {', '.join(columns)}.")
        return columns[column]

    def columns(self) -> dict[str, Tensor]:
        """All numbers of all heads, [layers, H] each: measures, relations, worth."""
        shape = len(self.heads), max(self.heads, default=0)
        columns: dict[str, Tensor] = {}
        for column in self.info.get("columns", {}):
            if column in self.measurements.sums.values:
                columns[column] = _padded(self.measurements.sums.value(column), shape)
        for row in self.relation_scores():
            name = f"relation:{row.direction}"
            columns.setdefault(name, torch.full(shape, torch.nan, dtype=torch.float64))[row.layer, row.head] = (
                row.accuracy
            )
        for method, values in sorted(self.worth.values.items()):
            if method == "gradient":
                importance = values.mean(0)
                norm = importance.nan_to_num().norm(dim=1, keepdim=True)
                columns["gradient"] = _padded(importance / torch.where(norm > 0, norm, 1.0), shape)
                continue
            low, high = self.worth.interval(method)
            for name, part in ((method, values.mean(0)), (f"{method}_low", low), (f"{method}_high", high)):
                columns[name] = _padded(part, shape)
        return columns

    def rows(self) -> list[dict[str, Any]]:
        """One row per head: layer, head, roles, then all columns."""
        roles: dict[tuple[int, int], list[str]] = {}
        for evidence in self.roles():
            roles.setdefault((evidence.layer, evidence.head), []).append(evidence.role)
        columns = {name: value.tolist() for name, value in self.columns().items()}
        return [
            {"layer": layer, "head": head, "roles": roles.get((layer, head), [])}
            | {name: _number(value[layer][head]) for name, value in columns.items()}
            for layer, count in enumerate(self.heads)
            for head in range(count)
        ]

    def to_table(self) -> atlas_file.Table:
        """One row per head as an Arrow table; ``.to_pandas()`` makes a data frame of it."""
        return atlas_file.table(self.rows())

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        """The same for any reader of Arrow: ``polars.DataFrame(atlas)``, ``pandas.DataFrame.from_arrow(atlas)``."""
        return self.to_table().__arrow_c_stream__(requested_schema)

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write a Parquet file, whole or not at all; docs/atlas.md says what lies in it.

        Raises:
            HeadscopeError: It cannot be written, or a file that is no atlas is there and ``force`` is False.
        """
        path = Path(path)
        atlas_file.write(path, self.to_table(), *self.to_state(), force=force)
        return path

    @classmethod
    def load(cls, path: str | Path) -> HeadAtlas:
        """Read such a file.

        Raises:
            AtlasError: It is not there, not an atlas, cut short, or of another version.
        """
        return cls.from_state(*atlas_file.read(Path(path)), str(path))

    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything in an atlas, as tensors and as JSON data."""
        tensors, data = pack(self.measurements, self.relations, self.worth)
        return tensors, {"format": atlas_file.FORMAT, "info": self.info} | data

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], data: dict[str, Any], where: str) -> HeadAtlas:
        """The atlas of such a state. Raises AtlasError when another version wrote it, or something is missing."""
        atlas_file.check_format(data, where)
        try:
            info = data["info"]
            for name in ("model", "columns", "plan", "texts", "documents", "examples", "versions"):
                _ = info[name]
            for name in ("name", "type", "weights", "heads", "causal", "start_token"):
                _ = info["model"][name]
            return cls(info, *unpack(tensors, data))
        except (KeyError, TypeError, ValueError) as error:
            raise AtlasError(f"{where} is not a whole atlas: {error}. Make it again with headscope heads.") from error

    def agreement(self) -> float:
        """Spearman's rank correlation of E abs(ablation effect) and gradient importance over heads; NaN without both.

        The gradient has no sign, so the effect of ablation to zero is taken without its own, text by text.
        """
        if not {"ablation_zero", "gradient"} <= set(self.worth.values):
            return float("nan")
        both = [
            HeadEffects(v.mean(0), v, self.worth.clean, self.worth.unit, m)
            for m, v in ((m, self.worth.values[m].abs()) for m in ("ablation_zero", "gradient"))
        ]
        return agreement(*both)

    def merge(self, other: HeadAtlas) -> HeadAtlas:
        """The atlas of both corpora together; neither is changed.

        Collections of sentences and random tokens that are in both count once, and so do texts if all are the same.

        Raises:
            AtlasError: They differ in the model, the definitions or the lengths of pieces; or they share a document,
                which would count twice, while others differ.
        """
        for what, ours, theirs in (
            ("types", self.info["model"]["type"], other.info["model"]["type"]),
            ("weights", self.info["model"]["weights"], other.info["model"]["weights"]),
            ("start tokens", self.info["model"]["start_token"], other.info["model"]["start_token"]),
            ("definitions", self.info["columns"], other.info["columns"]),
            *((_SAME_PLAN[name], self.info["plan"][name], other.info["plan"][name]) for name in _SAME_PLAN),
        ):
            if ours != theirs:
                raise AtlasError(f"two atlases of different {what} cannot be merged: {self.name} and {other.name}.")
        ours, digests = self.info["texts"], set(self.info["texts"].values())
        both = sorted(name for name, text in other.info["texts"].items() if name in ours or text in digests)
        same = ours == other.info["texts"] and self.info["documents"] == other.info["documents"]
        if both and not same:
            raise AtlasError(f"both atlases hold {both[0]!r} and {len(both) - 1} more: they would be counted twice.")
        merged = HeadAtlas(self.info)
        merged.measurements.merge(self.measurements)
        if same:
            merged.measurements.notes += [
                note for note in other.measurements.notes if note not in merged.measurements.notes
            ]
        else:
            merged.measurements.merge(self._new_measurements(other))
        merged.relations.merge(self.relations)
        merged.relations.merge(self._new_relations(other))
        for part in (self, other):
            merged.worth.merge(part.worth.without(merged.worth.documents))
        for name in ("documents", "examples", "texts"):
            merged.info[name] = self.info[name] | other.info[name]
        merged.info["merged"] = [*self._sources(), *other._sources()]
        merged.worth = merged.worth.sorted()
        return merged

    @property
    def notes(self) -> list[str]:
        """What happened while measuring, and where there is too little for a role."""
        return [*self.measurements.notes, *missing_evidence(self.info["documents"], self.relations)]

    def _sources(self) -> list[dict[str, Any]]:
        """The plans and the versions behind this atlas: one, or those of all that were merged."""
        own = [{name: self.info[name] for name in ("plan", "versions")}]
        return list(self.info.get("merged") or own)

    def _new_measurements(self, other: HeadAtlas) -> Measurements:
        """The other atlas' measurements, without those of repeated random tokens that are in both."""
        mine, others = ({n for n in a.info["documents"] if n.startswith("repeat:")} for a in (self, other))
        if not mine & others:
            return other.measurements
        if mine != others:
            raise AtlasError("both atlases read some of the same random tokens, but not all: use one seed, or two.")
        new = Measurements()
        for sums, theirs in ((new.sums, other.measurements.sums), (new.null, other.measurements.null)):
            sums.values = {name: value for name, value in theirs.values.items() if name not in REPEATED}
        new.sums.documents = {n: rows for n, rows in other.measurements.sums.documents.items() if n not in mine}
        new.notes, new.outputs = other.measurements.notes, other.measurements.outputs
        new.token_examples = other.measurements.token_examples
        return new

    def _new_relations(self, other: HeadAtlas) -> RelationCounts:
        """The other atlas' counts, without those of collections that are in both."""
        ours, theirs = self.info["examples"], other.info["examples"]
        digests = {entry["sha256"] for entry in ours.values()}
        new = {name: entry for name, entry in theirs.items() if entry["sha256"] not in digests}
        for name in sorted(set(new) & set(ours)):
            raise AtlasError(f"both atlases hold sentences named {name!r}, and these differ: rename one of the files.")
        shared = {cluster for name, entry in theirs.items() if name not in new for cluster in entry["clusters"]}
        clusters = shared.union(*(entry["clusters"] for entry in ours.values()))
        both = sorted(clusters & {cluster for entry in new.values() for cluster in entry["clusters"]})
        if both:
            raise AtlasError(f"both atlases hold sentences of {both[0]!r}, in collections that differ.")
        counts = other.relations.without(shared)
        counts.examples = sum(entry["read"] for entry in new.values())
        counts.skipped = sum(entry["too_long"] for entry in new.values())
        return counts

    @property
    def name(self) -> str:
        """The model's name, and which of its two sides was measured."""
        name, side = self.info["model"]["name"], self.info["model"].get("side")
        return f"{name} ({side})" if side else str(name)

    def __repr__(self) -> str:
        documents = len(self.info.get("documents", {}))
        return f"HeadAtlas({self.name}: {len(self)} heads, {len(self.columns())} columns, {documents} documents)"


def _padded(values: Tensor, shape: tuple[int, int]) -> Tensor:
    out = torch.full(shape, torch.nan, dtype=torch.float64)
    rows, columns = min(shape[0], values.shape[0]), min(shape[1], values.shape[1])
    out[:rows, :columns] = values[:rows, :columns]
    return out


def _number(value: float) -> float | None:
    return None if value != value else value
