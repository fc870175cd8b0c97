"""HeadAtlas: what every head of a model does and is worth, one row a head, with the sums behind every number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headscope.errors import AtlasError
from headscope.heads.atlas import file as atlas_file
from headscope.heads.atlas.measuring import Measurements
from headscope.heads.effects import HeadEffects, agreement
from headscope.heads.measures import REPEATED
from headscope.heads.relations.counts import RelationCounts
from headscope.heads.relations.score import RelationScore, scores
from headscope.heads.roles import Evidence, find_roles, missing_evidence
from headscope.heads.statistics import cluster_bootstrap

__all__ = ["HeadAtlas", "Worth"]

_PLANNED = {"length": "lengths of pieces", "period": "periods of repeats", "worth_tokens": "lengths of texts for worth"}


@dataclass(eq=False)
class Worth:
    """What heads are worth on some texts: for each method and each text one value a head.

    Attributes:
        values: By method ("ablation_zero", "ablation_mean", "gradient"): [texts, layers, H] float64.
        clean: The unchanged model's metric for each text, [texts].
        documents: The texts' documents, in this order.
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
            raise ValueError(f"the worth of heads is in {self.unit} here and in {other.unit} there: not to be merged.")
        for method, theirs in other.values.items():
            ours = self.values.get(method)
            self.values[method] = theirs if ours is None else torch.cat([ours, theirs])
        self.clean = torch.cat([self.clean, other.clean])
        self.documents = self.documents + other.documents
        self.unit = other.unit

    def without(self, documents: Sequence[str]) -> Worth:
        """The worth on all other texts."""
        kept = [i for i, name in enumerate(self.documents) if name not in documents]
        values = {method: value[kept] for method, value in self.values.items()}
        return Worth(values, self.clean[kept], [self.documents[i] for i in kept], self.unit)

    def sorted(self) -> Worth:
        """The same in the order of the documents, so that it does not matter who finished first."""
        order = sorted(range(len(self.documents)), key=lambda i: self.documents[i])
        values = {method: value[order] for method, value in sorted(self.values.items())}
        return Worth(values, self.clean[order], [self.documents[i] for i in order], self.unit)

    def interval(self, method: str, level: float = 0.95, replicates: int = 1000) -> tuple[Tensor, Tensor]:
        """Percentile bootstrap of the mean over documents, [layers, H] each; NaN with fewer than two."""
        values = self.values[method]
        names = sorted(set(self.documents))
        if len(names) < 2:
            nothing = torch.full(values.shape[1:], torch.nan, dtype=values.dtype)
            return nothing, nothing
        rows = torch.tensor([names.index(name) for name in self.documents])
        sums = torch.zeros(len(names), *values.shape[1:], dtype=values.dtype).index_add(0, rows, values)
        return cluster_bootstrap(sums.movedim(0, -1), rows.bincount(), replicates, level=level)


class HeadAtlas:
    """What every head of a model does. Made by :func:`headscope.profile`, or by ``headscope heads``.

    Attributes:
        info: Where it comes from: model, hash of its weights, texts with their hashes, version, seeds, definitions.
        measured: The sums behind all measures.
        relations: The counts behind all relations.
        worth: What each head is worth on each text.
    """

    def __init__(
        self,
        info: Mapping[str, Any] | None = None,
        measured: Measurements | None = None,
        relations: RelationCounts | None = None,
        worth: Worth | None = None,
    ) -> None:
        self.info: dict[str, Any] = dict(info or {})
        self.measurements = measured or Measurements()
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
        """Every head's accuracy for every relation and direction, on the half that did not choose heads."""
        if self._scores is None:
            self._scores = scores(self.relations)
        return self._scores

    def roles(self) -> list[Evidence]:
        """All roles that hold, with their evidence. A head may have several, or none."""
        return find_roles(
            self.measurements.sums, self.measurements.null, self.relation_scores(), self.info.get("documents", {})
        )

    def value(self, column: str) -> Tensor:
        """A column as [layers, H]: NaN where a layer has fewer heads, or nothing was measured.

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
        found: dict[str, Tensor] = {}
        for column in self.info.get("columns", {}):
            if column in self.measurements.sums.values:
                found[column] = _padded(self.measurements.sums.value(column), shape)
        for row in self.relation_scores():
            name = f"relation:{row.direction}"
            found.setdefault(name, torch.full(shape, torch.nan, dtype=torch.float64))[row.layer, row.head] = (
                row.accuracy
            )
        for method, values in sorted(self.worth.values.items()):
            if method == "gradient":
                importance = values.mean(0)
                norm = importance.nan_to_num().norm(dim=1, keepdim=True)
                found["gradient"] = _padded(importance / torch.where(norm > 0, norm, 1.0), shape)
                continue
            low, high = self.worth.interval(method)
            for name, part in ((method, values.mean(0)), (f"{method}_low", low), (f"{method}_high", high)):
                found[name] = _padded(part, shape)
        return found

    def rows(self) -> list[dict[str, Any]]:
        """One row a head: layer, head, roles, then all columns."""
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
        """One row a head as an Arrow table; ``.to_pandas()`` makes a data frame of it."""
        return atlas_file.table(self.rows())

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        """The same for whatever reads Arrow: ``polars.DataFrame(atlas)``, ``pandas.DataFrame.from_arrow(atlas)``."""
        return self.to_table().__arrow_c_stream__(requested_schema)

    def save(self, path: str | Path) -> Path:
        """Write a Parquet file, whole or not at all; docs/atlas.md says what lies in it.

        Raises:
            HeadscopeError: It cannot be written.
        """
        path = Path(path)
        atlas_file.write(path, self.to_table(), *self.to_parts())
        return path

    @classmethod
    def load(cls, path: str | Path) -> HeadAtlas:
        """Read such a file.

        Raises:
            AtlasError: It is not there, not an atlas, cut short, or of another version.
        """
        return cls.from_parts(*atlas_file.read(Path(path)), str(path))

    def to_parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that an atlas holds, as tensors and as JSON data."""
        tensors: dict[str, Tensor] = {}
        for name, sums in (("sums", self.measurements.sums), ("null", self.measurements.null)):
            tensors |= {f"{name}/{column}": value.contiguous() for column, value in sums.values.items()}
        counts, told = self.relations.to_tensors()
        tensors |= {f"relations/{name}": value.contiguous() for name, value in counts.items()}
        tensors |= {f"worth/{method}": value.contiguous() for method, value in self.worth.values.items()}
        tensors["worth_clean"] = self.worth.clean.contiguous()
        data = {
            "format": atlas_file.FORMAT,
            "info": self.info,
            "relations": told,
            "rows": self.measurements.sums.documents,
            "notes": self.measurements.notes,
            "worth": {"documents": self.worth.documents, "unit": self.worth.unit},
        }
        return tensors, data

    @classmethod
    def from_parts(cls, tensors: dict[str, Tensor], data: dict[str, Any], where: str) -> HeadAtlas:
        """The atlas that :meth:`to_parts` took apart. Raises AtlasError when it was another version's."""
        atlas_file.check_format(data, where)
        try:
            measured = Measurements()
            for name, sums in (("sums", measured.sums), ("null", measured.null)):
                sums.values = _under(tensors, f"{name}/")
            measured.sums.documents = dict(data["rows"])
            measured.notes = list(data["notes"])
            relations = RelationCounts.from_tensors(_under(tensors, "relations/"), data["relations"])
            told = data["worth"]
            worth = Worth(_under(tensors, "worth/"), tensors["worth_clean"], list(told["documents"]), told["unit"])
            info = data["info"]
            for name in ("model", "columns", "plan", "texts", "documents", "examples", "versions"):
                _ = info[name]
            for name in ("name", "type", "weights", "heads", "causal"):
                _ = info["model"][name]
            return cls(info, measured, relations, worth)
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

        Collections of sentences and random tokens that both read count once, and so do texts if both read the same.

        Raises:
            AtlasError: Another model, other definitions, pieces of another length; or a document that both have while
                others differ: it would count twice.
        """
        for name, ours, theirs in (
            ("types", self.info["model"]["type"], other.info["model"]["type"]),
            ("weights", self.info["model"]["weights"], other.info["model"]["weights"]),
            ("definitions", self.info["columns"], other.info["columns"]),
            *((_PLANNED[name], self.info["plan"][name], other.info["plan"][name]) for name in _PLANNED),
        ):
            if ours != theirs:
                raise AtlasError(f"two atlases of different {name} cannot be merged: {self.name} and {other.name}.")
        ours, known = self.info["texts"], set(self.info["texts"].values())
        both = sorted(name for name, text in other.info["texts"].items() if name in ours or text in known)
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
            merged.measurements.merge(self._new_in(other))
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
        """What happened on the way, and what is too little for a role."""
        return [*self.measurements.notes, *missing_evidence(self.info["documents"], self.relations)]

    def _sources(self) -> list[dict[str, Any]]:
        """The plans and the versions behind this atlas: one, or those of all that were merged."""
        found: list[dict[str, Any]] = self.info.get("merged") or [
            {name: self.info[name] for name in ("plan", "versions")}
        ]
        return found

    def _new_in(self, other: HeadAtlas) -> Measurements:
        """What another atlas measured that this one did not: repeated random tokens that both read count once."""
        ours, theirs = ({n for n in a.info["documents"] if n.startswith("repeat:")} for a in (self, other))
        if not ours & theirs:
            return other.measurements
        if ours != theirs:
            raise AtlasError("both atlases read some of the same random tokens, but not all: use one seed, or two.")
        new = Measurements()
        for held, given in ((new.sums, other.measurements.sums), (new.null, other.measurements.null)):
            held.values = {name: value for name, value in given.values.items() if name not in REPEATED}
        new.sums.documents = {n: rows for n, rows in other.measurements.sums.documents.items() if n not in ours}
        new.notes, new.outputs = other.measurements.notes, other.measurements.outputs
        return new

    def _new_relations(self, other: HeadAtlas) -> RelationCounts:
        """The other atlas' counts without those of collections that both read."""
        ours, theirs = self.info["examples"], other.info["examples"]
        known = {held["sha256"] for held in ours.values()}
        new = {name: held for name, held in theirs.items() if held["sha256"] not in known}
        for name in sorted(set(new) & set(ours)):
            raise AtlasError(f"both atlases hold sentences named {name!r}, and these differ: rename one of the files.")
        again = {cluster for name, held in theirs.items() if name not in new for cluster in held["clusters"]}
        here = again.union(*(held["clusters"] for held in ours.values()))
        both = sorted(here & {cluster for held in new.values() for cluster in held["clusters"]})
        if both:
            raise AtlasError(f"both atlases hold sentences of {both[0]!r}, in collections that differ.")
        counts = other.relations.without(again)
        counts.examples = sum(held["read"] for held in new.values())
        counts.skipped = sum(held["too_long"] for held in new.values())
        return counts

    @property
    def name(self) -> str:
        """The model's name."""
        return str(self.info["model"]["name"])

    def __repr__(self) -> str:
        documents = len(self.info.get("documents", {}))
        return f"HeadAtlas({self.name}: {len(self)} heads, {len(self.columns())} columns, {documents} documents)"


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _padded(values: Tensor, shape: tuple[int, int]) -> Tensor:
    out = torch.full(shape, torch.nan, dtype=torch.float64)
    rows, columns = min(shape[0], values.shape[0]), min(shape[1], values.shape[1])
    out[:rows, :columns] = values[:rows, :columns]
    return out


def _number(value: float) -> float | None:
    return None if value != value else value
