"""Shards of the work behind an atlas, and the folder in which several processes share them.

A shard in the folder is complete or absent, and never computed twice. Shard i belongs to process i modulo the number
of processes, in the order of the shards' names. Processes exchange these files and nothing else, so that a process
that died stops no other.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from headscope.distributed import processes, rank
from headscope.errors import AtlasError
from headscope.files import whole_file
from headscope.heads import corpus
from headscope.heads.atlas.file import FORMAT, check_format
from headscope.heads.atlas.measuring import Measurements
from headscope.heads.atlas.state import pack, unpack, with_prefix
from headscope.heads.atlas.worth import Worth
from headscope.heads.corpus import Document
from headscope.heads.relations.counts import RelationCounts

OnProgress = Callable[[int, int, str], None]
"""Called after each shard with how many are done, of how many, and what kind it was."""


@dataclass(eq=False)
class Shard:
    """What a part of the work gave.

    Attributes:
        measurements: The sums of measures, and the sums of head outputs.
        relations: The counts of relations.
        worth: What heads are worth.
        documents: The half of each document.
        texts: The digest of each text.
        examples: For each collection of sentences how many were "read", and how many were "too_long".
    """

    measurements: Measurements = field(default_factory=Measurements)
    relations: RelationCounts = field(default_factory=RelationCounts)
    worth: Worth = field(default_factory=Worth)
    documents: dict[str, int] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    examples: dict[str, dict[str, int]] = field(default_factory=dict)

    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The shard as tensors and as JSON data."""
        tensors, data = pack(self.measurements, self.relations, self.worth)
        tensors |= {f"outputs/{name}": value for name, value in self.measurements.outputs.items()}
        own = {"documents": self.documents, "texts": self.texts, "examples": self.examples}
        return tensors, {"format": FORMAT} | data | own

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], data: dict[str, Any]) -> Shard:
        """The shard of such a state. Raises KeyError, TypeError or ValueError where something is missing."""
        measurements, relations, worth = unpack(tensors, data)
        measurements.outputs = with_prefix(tensors, "outputs/")
        return cls(measurements, relations, worth, data["documents"], data["texts"], data["examples"])


class ShardFolder:
    """Computes the shards of this process that are not there yet, and gives those of all processes in order.

    Args:
        folder: Where shards are stored; None: in memory.
        work: What decides the work, as JSON data; a folder of other work is refused.
        documents: The texts; a text that has changed since its shard was stored is refused.
        on_progress: Called after each shard.

    Raises:
        AtlasError: The folder holds other work, a damaged shard, or one of a text that has changed.
    """

    def __init__(
        self,
        folder: Path | None,
        work: Mapping[str, Any],
        documents: Sequence[Document],
        on_progress: OnProgress | None = None,
    ) -> None:
        self.folder, self.rank, self.processes, self.on_progress = folder, rank(), processes(), on_progress
        self.done = 0
        self._documents = {document.name: document for document in documents}
        if folder is not None:
            self._claim(folder, work)

    def _claim(self, folder: Path, work: Mapping[str, Any]) -> None:
        """Make the folder, or check that it is of this work."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AtlasError(f"Cannot make the folder {folder} for finished shards: {error.strerror}.") from None
        digest = hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()
        description = json.dumps({"format": FORMAT, "work": digest}, sort_keys=True)
        path = folder / "work.json"
        if not path.exists():
            names = {file.name for file in folder.iterdir() if not file.name.startswith(".work-")}
            if names and path.name not in names:  # it would be removed when the atlas is saved
                raise AtlasError(
                    f"{folder} is for finished shards, and holds other files. Move them, or give another --out."
                )
            scratch = folder / f".work-{self.rank}-{os.getpid()}"
            try:
                scratch.write_text(description, "utf-8")
                os.replace(scratch, path)
            except OSError as error:
                raise AtlasError(f"Cannot write {path}: {error.strerror}.") from None
        if path.read_text("utf-8") != description:
            raise AtlasError(
                f"{folder} holds finished shards of other work (another model, text, plan or version). "
                "Remove the folder, or give another --out."
            )

    def run(self, work: dict[str, Callable[[], Shard]], later: int) -> Iterator[Shard]:
        """Compute one round of shards and give those of all processes, one at a time.

        Args:
            work: The functions that compute shards, by name.
            later: How many shards there will be in later rounds.
        """
        total = self.done + len(work) + later
        for number, name in enumerate(sorted(work)):
            if self.folder is None:
                yield work[name]()
            elif number % self.processes == self.rank:
                shard = self._load(name)
                if shard is None:
                    self._save(name, work[name]())
                else:
                    self._check_texts(shard)
            self.done += 1
            if self.on_progress is not None:
                self.on_progress(self.done, total, name.partition("-")[0])
        if self.folder is not None:
            yield from self._gather(sorted(work))

    def _check_texts(self, shard: Shard) -> None:
        """Raise AtlasError if a text has changed since its shard was stored."""
        for name, digest in shard.texts.items():
            if digest != corpus.digest(self._documents[name]):
                raise AtlasError(
                    f"{self.folder} holds what was measured on another text named {name!r}: remove it, "
                    "or give another --out."
                )

    def _gather(self, names: Sequence[str]) -> Iterator[Shard]:
        """The shards of all processes; waits for those that another process is computing."""
        for name in names:
            shard = self._load(name)
            while shard is None:
                time.sleep(0.5)
                shard = self._load(name)
            yield shard

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"

    def _save(self, name: str, shard: Shard) -> None:
        tensors, data = shard.to_state()
        with whole_file(self._path(name), error=AtlasError) as scratch:
            save_file(tensors, scratch, metadata={"headscope": json.dumps(data)})

    def _load(self, name: str) -> Shard | None:
        path = self._path(name)
        if not path.exists():
            return None
        try:
            with safetensors.safe_open(path, "pt") as file:
                data = json.loads(file.metadata()["headscope"])
            check_format(data, path)
            return Shard.from_state(load_file(path), data)
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise AtlasError(f"{path} is damaged ({error}): remove it, and give the same command again.") from None
