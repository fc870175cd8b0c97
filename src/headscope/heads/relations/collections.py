"""Collections of sentences with known relations: which of them a model reads, and notes about each."""

from __future__ import annotations

import hashlib
from typing import Any

from headscope.errors import AtlasError
from headscope.heads.relations.evaluate import can_read
from headscope.heads.relations.score import LEVEL
from headscope.heads.relations.sentences import Example
from headscope.heads.statistics import fewest_clusters
from headscope.models.loading import Loaded


def readable(loaded: Loaded, examples: dict[str, list[Example]]) -> tuple[dict[str, list[Example]], list[str]]:
    """The collections in languages that the model reads, and why not the others, or what is doubtful."""
    chosen, notes = {}, []
    for name, sentences in examples.items():
        can, why = can_read(loaded, [e.text for e in sentences[:200]]) if sentences else (False, "it is empty")
        if can:
            chosen[name] = sentences
        if why:
            notes.append(f"{name}: {'profiled, but' if can else 'not profiled, the model does not read it:'} {why}.")
    return chosen, notes


def collections_of(examples: dict[str, list[Example]]) -> dict[str, dict[str, Any]]:
    """What an atlas stores about each collection, so that none counts twice where two atlases are merged."""
    collections: dict[str, dict[str, Any]] = {}
    names: dict[str, str] = {}
    for name, sentences in examples.items():
        digest = hashlib.sha256(repr(sentences).encode("utf-8", "surrogatepass")).hexdigest()
        if names.setdefault(digest, name) != name:
            raise AtlasError(f"{names[digest]} and {name} hold the same sentences: give them once.")
        clusters = sorted({example.cluster for example in sentences})
        for other, entry in collections.items():
            if both := sorted(set(clusters) & set(entry["clusters"])):
                raise AtlasError(
                    f"{other} and {name} both hold {both[0]!r}: its sentences would count twice. Give one of them."
                )
        collections[name] = {"language": sentences[0].language, "sha256": digest, "clusters": clusters}
    return collections


def notes_on(collections: dict[str, Any], examples: dict[str, list[Example]]) -> list[str]:
    """What a reader should know about the collections that were counted."""
    return _too_long(collections) + _too_few_clusters(examples) + _without_classes(examples)


def _too_long(collections: dict[str, Any]) -> list[str]:
    """A note for each collection with sentences that are longer than the model reads."""
    return [
        f"{name}: {entry['too_long']} of {entry['read'] + entry['too_long']} sentences are longer than the model "
        "reads, and were left out."
        for name, entry in collections.items()
        if entry["too_long"]
    ]


def _too_few_clusters(examples: dict[str, list[Example]]) -> list[str]:
    """A note for each collection in which even a head that is always right cannot get a role."""
    least = fewest_clusters(1, LEVEL)  # to pick a head; and to confirm it, if it is the only one
    notes = []
    for name, sentences in examples.items():
        halves = [len({example.cluster for example in sentences if example.half == half}) for half in (0, 1)]
        if min(halves) < least:
            notes.append(
                f"{name} has {sum(halves)} documents ({halves[0]} to pick heads, {halves[1]} to confirm them): too few "
                f"for roles that come from it, which take {least} of each."
            )
    return notes


def _without_classes(examples: dict[str, list[Example]]) -> list[str]:
    """A note for each collection whose words have no class: none of its pairs is contested."""
    return [
        f"{name} gives no parts of speech: a head with a role from it may attend to any word of the right class."
        for name, sentences in examples.items()
        if not any(any(example.classes) for example in sentences)
    ]
