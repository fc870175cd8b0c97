"""Sums, counts and worth as tensors and JSON data, and back: the state that an atlas and its shards store."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from headscope.heads.atlas.measuring import Measurements
from headscope.heads.atlas.worth import Worth
from headscope.heads.examples import PairExamples, TokenExamples
from headscope.heads.relations.counts import RelationCounts


def pack(
    measurements: Measurements, relations: RelationCounts, worth: Worth
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors by name, and the JSON data that goes with them."""
    tensors: dict[str, Tensor] = {}
    for name, sums in (("sums", measurements.sums), ("null", measurements.null)):
        tensors |= {f"{name}/{column}": value.contiguous() for column, value in sums.values.items()}
    counts, relation_data = relations.to_tensors()
    tensors |= {f"relations/{name}": value.contiguous() for name, value in counts.items()}
    example_tensors, pair_examples = relations.pair_examples.to_state()
    tensors |= {f"examples/{name}": value.contiguous() for name, value in example_tensors.items()}
    tensors |= {f"worth/{method}": value.contiguous() for method, value in worth.values.items()}
    tensors["worth_clean"] = worth.clean.contiguous()
    data = {
        "relations": relation_data,
        "rows": measurements.sums.documents,
        "notes": measurements.notes,
        "token_examples": measurements.token_examples.to_data(),
        "pair_examples": pair_examples,
        "worth": {"documents": worth.documents, "unit": worth.unit},
    }
    return tensors, data


def unpack(tensors: dict[str, Tensor], data: dict[str, Any]) -> tuple[Measurements, RelationCounts, Worth]:
    """What :func:`pack` was given. Raises KeyError, TypeError or ValueError where something is missing."""
    measurements = Measurements()
    for name, sums in (("sums", measurements.sums), ("null", measurements.null)):
        sums.values = with_prefix(tensors, f"{name}/")
    measurements.sums.documents = dict(data["rows"])
    measurements.notes = list(data["notes"])
    measurements.token_examples = TokenExamples.from_data(data["token_examples"])
    relations = RelationCounts.from_tensors(with_prefix(tensors, "relations/"), data["relations"])
    relations.pair_examples = PairExamples.from_state(with_prefix(tensors, "examples/"), data["pair_examples"])
    documents, unit = list(data["worth"]["documents"]), data["worth"]["unit"]
    return measurements, relations, Worth(with_prefix(tensors, "worth/"), tensors["worth_clean"], documents, unit)


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
