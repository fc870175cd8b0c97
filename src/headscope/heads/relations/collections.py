"""Collections of sentences with known relations: which of them a model reads, and what must be said of each."""

from __future__ import annotations

import hashlib
from typing import Any

from headscope.errors import AtlasError
from headscope.heads.relations import Example, reads
from headscope.heads.relations.score import LEVEL
from headscope.heads.statistics import fewest_clusters
from headscope.models.loading import Loaded

__all__ = ["collections_of", "notes_on", "readable"]


def readable(loaded: Loaded, examples: dict[str, list[Example]]) -> tuple[dict[str, list[Example]], list[str]]:
    """The collections in languages that the model reads, and why not the others, or what is doubtful."""
    chosen, notes = {}, []
    for name, given in examples.items():
        can, why = reads(loaded, [example.text for example in given[:200]]) if given else (False, "it is empty")
        if can:
            chosen[name] = given
        if why:
            notes.append(f"{name}: {'profiled, but' if can else 'not profiled, the model does not read it:'} {why}.")
    return chosen, notes


def collections_of(examples: dict[str, list[Example]]) -> dict[str, dict[str, Any]]:
    """What an atlas keeps of each collection, so that none counts twice where two atlases are merged."""
    found: dict[str, dict[str, Any]] = {}
    names: dict[str, str] = {}
    for name, given in examples.items():
        same = hashlib.sha256(repr(given).encode("utf-8", "surrogatepass")).hexdigest()
        if names.setdefault(same, name) != name:
            raise AtlasError(f"{names[same]} and {name} hold the same sentences: give them once.")
        clusters = sorted({example.cluster for example in given})
        for other, held in found.items():
            if both := sorted(set(clusters) & set(held["clusters"])):
                raise AtlasError(
                    f"{other} and {name} both hold {both[0]!r}: its sentences would count twice. Give one of them."
                )
        found[name] = {"language": given[0].language, "sha256": same, "clusters": clusters}
    return found


def notes_on(collections: dict[str, Any], examples: dict[str, list[Example]]) -> list[str]:
    """What must be said of collections that were counted, and of their sentences."""
    return _too_long(collections) + _too_few_clusters(examples) + _without_classes(examples)


def _too_long(collections: dict[str, Any]) -> list[str]:
    """A note for each collection with sentences that the model cannot read."""
    return [
        f"{name}: {held['too_long']} of {held['read'] + held['too_long']} sentences are longer than the model reads, "
        "and were left out."
        for name, held in collections.items()
        if held["too_long"]
    ]


def _too_few_clusters(examples: dict[str, list[Example]]) -> list[str]:
    """A note for each collection in which even a head that is always right cannot get a role."""
    least = fewest_clusters(1, LEVEL)  # to pick a head; and to confirm it, if it is the only one
    notes = []
    for name, given in examples.items():
        halves = [len({example.cluster for example in given if example.half == half}) for half in (0, 1)]
        if min(halves) < least:
            notes.append(
                f"{name} has {sum(halves)} documents ({halves[0]} to pick heads, {halves[1]} to confirm them): too few "
                f"for roles that come from it, which take {least} of each."
            )
    return notes


def _without_classes(examples: dict[str, list[Example]]) -> list[str]:
    """A note for each collection whose words have no class, so that one cannot be taken for another."""
    return [
        f"{name} gives no parts of speech: a head with a role from it may look at any word of the right kind."
        for name, given in examples.items()
        if not any(any(example.classes) for example in given)
    ]
