"""Parts of a survey in a folder: each whole or not at all, never done twice, shared by any number of processes.

Part i belongs to process i modulo their number, in the order of the parts' names. Nothing but these files goes from
one process to another, so that none can hang on another that died.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file

from headscope.distributed import processes, rank
from headscope.errors import AtlasError
from headscope.heads import corpus
from headscope.heads.atlas.atlas import HeadAtlas
from headscope.heads.atlas.file import FORMAT
from headscope.heads.corpus import Document

__all__ = ["Parts", "Told"]

Told = Callable[[int, int, str], None]


class Parts:
    """Does the parts that are this process's and are not there yet; gives all, in the order of their names.

    Args:
        folder: Where finished parts are kept; None to keep them in memory.
        told: What decides the work, as JSON data: a folder that holds other work is refused.
        documents: The texts; one that has changed since its part was finished is refused.
        on_part: Told after each part how many are done, of how many, and what it was.

    Raises:
        AtlasError: The folder holds other work, a damaged part, or one of a text that has changed.
    """

    def __init__(
        self, folder: Path | None, told: Mapping[str, Any], documents: Sequence[Document], on_part: Told | None
    ) -> None:
        self.folder, self.rank, self.count, self.on_part = folder, rank(), processes(), on_part
        self.done = 0
        self._named = {document.name: document for document in documents}
        if folder is not None:
            self._claim(folder, told)

    def _claim(self, folder: Path, told: Mapping[str, Any]) -> None:
        """Make the folder, or see that it is this work's."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AtlasError(f"Cannot make the folder {folder} for finished parts: {error.strerror}.") from None
        work = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        mine = json.dumps({"format": FORMAT, "work": work}, sort_keys=True)
        path = folder / "work.json"
        if not path.exists():
            scratch = folder / f".work-{self.rank}-{os.getpid()}"
            try:
                scratch.write_text(mine, "utf-8")
                os.replace(scratch, path)
            except OSError as error:
                raise AtlasError(f"Cannot write {path}: {error.strerror}.") from None
        if path.read_text("utf-8") != mine:
            raise AtlasError(
                f"{folder} holds the finished parts of other work (another model, text, plan or version). "
                "Remove the folder, or give another --out."
            )

    def run(self, work: dict[str, Callable[[], HeadAtlas]], later: int) -> Iterator[HeadAtlas]:
        """Do one round of parts, and give everybody's one after another: none is held here."""
        of = self.done + len(work) + later
        for number, name in enumerate(sorted(work)):
            if self.folder is None:
                yield work[name]()
            elif number % self.count == self.rank:
                held = self._load(name)
                if held is None:
                    self._save(name, work[name]())
                else:
                    self._check_texts(held)
            self.done += 1
            if self.on_part is not None:
                self.on_part(self.done, of, name.partition("-")[0])
        if self.folder is not None:
            yield from self._gather(sorted(work))

    def _check_texts(self, part: HeadAtlas) -> None:
        """Raise AtlasError if a text has changed since its part was finished."""
        for name, held in part.info["texts"].items():
            if held != corpus.digest(self._named[name]):
                raise AtlasError(
                    f"{self.folder} holds what was measured on another text named {name!r}: remove it, "
                    "or give another --out."
                )

    def _gather(self, names: Sequence[str]) -> Iterator[HeadAtlas]:
        """Everybody's parts; waits for those that another process is still at."""
        for name in names:
            part = self._load(name)
            while part is None:
                time.sleep(0.5)
                part = self._load(name)
            yield part

    def _path(self, name: str) -> Path:
        assert self.folder is not None  # asked only where there is one
        return self.folder / f"{name}.safetensors"

    def _save(self, name: str, part: HeadAtlas) -> None:
        tensors, data = part.to_parts()
        tensors |= {f"outputs/{key}": value for key, value in part.measurements.outputs.items()}
        scratch = self._path(name).with_suffix(f".{self.rank}-{os.getpid()}.tmp")
        try:
            save_file(tensors, scratch, metadata={"headscope": json.dumps(data)})
            os.replace(scratch, self._path(name))
        except (OSError, safetensors.SafetensorError) as error:
            scratch.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or error
            raise AtlasError(f"Cannot write {self._path(name)}: {reason}. Finished parts stay.") from None

    def _load(self, name: str) -> HeadAtlas | None:
        path = self._path(name)
        if not path.exists():
            return None
        try:
            with safetensors.safe_open(path, "pt") as file:
                data = json.loads(file.metadata()["headscope"])
            tensors = load_file(path)
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise AtlasError(f"{path} is damaged ({error}): remove it, and give the same command again.") from None
        part = HeadAtlas.from_parts(tensors, data, str(path))
        part.measurements.outputs = {
            n.removeprefix("outputs/"): t for n, t in tensors.items() if n.startswith("outputs/")
        }
        return part
