"""profile(): all measures, relations and effects of a model over a corpus, in parts that are saved and never lost.

The work is cut into parts that do not depend on who does them. Each is written whole or not at all; processes take
turns (part i belongs to process i modulo their number), a run that was killed does only what is not there yet, and
parts are added up in the order of their names, so that any number of processes gives the same sums.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from headscope import corpus
from headscope.atlas import FORMAT, HeadAtlas, Worth
from headscope.corpus import Document, Piece
from headscope.effects import head_effects
from headscope.errors import AtlasError
from headscope.measures import Measure, standard
from headscope.models import Loaded, reader
from headscope.profiling import columns_of, measure
from headscope.recording import record
from headscope.relations import Example, count_relations, reads
from headscope.seam import AttentionCall
from headscope.training.processes import processes, rank

__all__ = ["Plan", "profile", "weights_hash"]

_DOCUMENTS, _EXAMPLES = 4, 200  # of texts and sentences in one part
Told = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Plan:
    """What a survey does; every number has a default that suits two slow cores.

    Attributes:
        length: Tokens in a piece of text.
        pieces: Pieces of each document, from its start; 0 for all.
        repeats: Texts of repeated random tokens.
        period: Tokens that are repeated in them.
        worth: How many documents are used to find what heads are worth; 0 for none.
        worth_tokens: Tokens of each of these.
        seed: Of the random tokens.
        tokens: Tokens in a batch.
    """

    length: int = 512
    pieces: int = 1
    repeats: int = 16
    period: int = 50
    worth: int = 8
    worth_tokens: int = 48
    seed: int = 0
    tokens: int = 2048


@dataclass(eq=False)
class _Survey:
    """One model, one corpus, one plan."""

    loaded: Loaded
    documents: Sequence[Document]
    examples: dict[str, list[Example]]
    measures: Sequence[Measure]
    plan: Plan
    info: dict[str, Any]
    heads: tuple[int, ...]
    means: Tensor | None = None

    def first(self) -> dict[str, Callable[[], HeadAtlas]]:
        """The parts that need nothing else: texts, repeats, relations."""
        work: dict[str, Callable[[], HeadAtlas]] = {}
        for start in range(0, len(self.documents), _DOCUMENTS):
            work[f"texts-{start:08d}"] = lambda start=start: self._texts(start)  # type: ignore[misc]
        if self.plan.repeats:
            work["repeats-00000000"] = self._repeats
        for name, examples in self.examples.items():
            for start in range(0, len(examples), _EXAMPLES):
                part = examples[start : start + _EXAMPLES]
                work[f"relations-{_short(name)}-{start:08d}"] = lambda part=part: self._relations(part)  # type: ignore[misc]
        return work

    def second(self) -> dict[str, Callable[[], HeadAtlas]]:
        """The parts that need the means of all head outputs: what heads are worth."""
        count = min(self.plan.worth, len(self.documents))
        return {f"worth-{i:08d}": lambda i=i: self._worth(i) for i in range(count)}  # type: ignore[misc]

    def _texts(self, start: int) -> HeadAtlas:
        part = HeadAtlas(self.info | {"documents": {}, "texts": {}, "examples": {}})
        pieces: list[Piece] = []
        for number, document in enumerate(self.documents[start : start + _DOCUMENTS], start):
            half = number % 2
            most = self.plan.pieces or 1 << 62
            found = corpus.cut(self.loaded, document, half, length=self.plan.length, most=most + 1)
            if not found:
                part.measured.notes.append(f"{document.name} has fewer than two tokens: left out.")
                continue
            if len(found) > 1 < most:
                told = f"Texts longer than {self.plan.length} tokens are read in pieces, each after a start token."
                part.measured.notes.append(told)
            if len(found) > most:
                found = found[:most]
                told = f"Of longer texts only the beginning was read, {most} times {self.plan.length} tokens at most; "
                part.measured.notes.append(told + "--pieces 0 reads all.")
            pieces += found
            part.info["documents"][document.name] = half
            part.info["texts"][document.name] = corpus.digest([document])
        notes = part.measured.notes
        part.measured = measure(self.loaded, pieces, self.measures, tokens=self.plan.tokens)
        part.measured.notes = list(dict.fromkeys(notes + part.measured.notes))
        return part

    def _repeats(self) -> HeadAtlas:
        plan = self.plan
        pieces = corpus.repeats(self.loaded, count=plan.repeats, period=plan.period, seed=plan.seed)
        documents = {piece.document: piece.half for piece in pieces}
        part = HeadAtlas(self.info | {"documents": documents, "texts": {}, "examples": {}})
        part.measured = measure(self.loaded, pieces, self.measures, tokens=plan.tokens)
        return part

    def _relations(self, examples: Sequence[Example]) -> HeadAtlas:
        part = HeadAtlas(self.info | {"documents": {}, "texts": {}, "examples": {}})
        note = part.measured.notes.append
        part.relations = count_relations(self.loaded, examples, batch_tokens=self.plan.tokens, on_note=note)
        return part

    def _worth(self, number: int) -> HeadAtlas:
        part = HeadAtlas(self.info | {"documents": {}, "texts": {}, "examples": {}})
        document = self.documents[number]
        pieces = corpus.cut(self.loaded, document, 0, length=self.plan.worth_tokens, most=1)
        if not pieces or self.means is None:
            return part
        ids = torch.tensor([pieces[0].ids], device=self.loaded.model.device)
        entry, _ = reader(self.loaded.model)  # the heads that were measured: of two sides, the encoder's
        values: dict[str, Tensor] = {}
        zero = head_effects(entry, ids)
        values["ablation_zero"] = zero.per_example.double()
        values["ablation_mean"] = head_effects(entry, ids, to=self.means).per_example.double()
        if zero.unit != "1 - cosine":  # whose derivative is zero at the clean run
            values["gradient"] = head_effects(entry, ids, method="gradient").per_example.double()
        part.worth = Worth(values, zero.clean.double(), [document.name], zero.unit)
        return part


def profile(
    loaded: Loaded,
    documents: Sequence[Document] | None = None,
    *,
    examples: dict[str, list[Example]] | None = None,
    measures: Sequence[Measure] | None = None,
    plan: Plan | None = None,
    parts: Path | None = None,
    on_part: Told | None = None,
) -> HeadAtlas:
    """Profile every head of a model.

    Args:
        loaded: The model.
        documents: The texts; without any, docstrings and licence texts that every machine has.
        examples: Sentences with known relations, by the name of their collection.
        measures: What to take; :func:`headscope.measures.standard` by default.
        plan: How much of it.
        parts: A folder for finished parts: the same call goes on where it was stopped, and several processes
            started by torchrun share the work. Without it everything happens here and now.
        on_part: Told after each part how many are done, of how many, and what it was.

    Raises:
        AtlasError: The folder holds the parts of other work, or several processes have no folder.
        TextError: A document cannot be read.
    """
    count = processes()
    if count > 1 and parts is None:
        raise AtlasError(f"{count} processes share work through a folder: give parts=, or --out on the command line.")
    given = corpus.default_documents() if documents is None else list(documents)
    chosen, refused = _readable(loaded, examples or {})
    plan = plan or Plan()
    taken = tuple(measures) if measures is not None else standard()
    survey = _Survey(loaded, given, chosen, taken, plan, {}, _head_counts(loaded))
    survey.info = _info(survey)
    works = _Parts(survey, parts, rank(), count, on_part)
    first = works.run(survey.first(), len(survey.second()))
    survey.means = _means(first)
    second = works.run(survey.second(), 0)
    atlas = _together([*first, *second], survey.info)
    atlas.info["examples"] = {name: [e.language, len(e_s)] for name, e_s in chosen.items() for e in e_s[:1]}
    atlas.measured.notes = list(dict.fromkeys(atlas.measured.notes + refused + _too_few(atlas)))
    return atlas


def _too_few(atlas: HeadAtlas) -> list[str]:
    """A note where no role can come from the texts: heads are picked on one half, and reported on two of the other."""
    halves = [half for name, half in atlas.info["documents"].items() if not name.startswith("repeat:")]
    if not halves or (0 in halves and halves.count(1) > 1):
        return []
    return [
        f"{len(halves)} {'text is' if len(halves) == 1 else 'texts are'} too few for roles that come from texts "
        "(previous token, rest, broad …): every second one picks heads, and two others must confirm them. Give four."
    ]


def _readable(loaded: Loaded, examples: dict[str, list[Example]]) -> tuple[dict[str, list[Example]], list[str]]:
    """The collections in languages that the model reads, and why not the others."""
    chosen, refused = {}, []
    for name, given in examples.items():
        can, why = reads(loaded, [example.text for example in given[:200]]) if given else (False, "it is empty")
        if can:
            chosen[name] = given
        else:
            refused.append(f"{name}: not profiled, the model does not read it: {why}.")
    return chosen, refused


class _Parts:
    """Does the parts that are this process's and are not there yet; gives all, in the order of their names."""

    def __init__(self, survey: _Survey, folder: Path | None, rank: int, count: int, on_part: Told | None) -> None:
        self.survey, self.folder, self.rank, self.count, self.on_part = survey, folder, rank, count, on_part
        self.done = 0
        self._named = {document.name: document for document in survey.documents}
        if folder is not None:
            self._claim(folder)

    def _claim(self, folder: Path) -> None:
        """Make the folder, or see that it is this work's."""
        folder.mkdir(parents=True, exist_ok=True)
        mine = json.dumps({"format": FORMAT, "work": _fingerprint(self.survey)}, sort_keys=True)
        path = folder / "work.json"
        if not path.exists():
            scratch = folder / f".work-{self.rank}-{os.getpid()}"
            scratch.write_text(mine, "utf-8")
            os.replace(scratch, path)
        if path.read_text("utf-8") != mine:
            raise AtlasError(
                f"{folder} holds the finished parts of other work (another model, text, plan or version). "
                "Remove the folder, or give another --out."
            )

    def run(self, work: dict[str, Callable[[], HeadAtlas]], later: int) -> list[HeadAtlas]:
        """Do one round of parts."""
        of = self.done + len(work) + later
        here: dict[str, HeadAtlas] = {}
        for number, name in enumerate(sorted(work)):
            if self.folder is None:
                here[name] = work[name]()
            elif number % self.count == self.rank:
                held = self._load(name)
                if held is None:
                    self._save(name, work[name]())
                else:
                    self._check_texts(held)
            self.done += 1
            if self.on_part is not None:
                self.on_part(self.done, of, name.partition("-")[0])
        if self.folder is None:
            return [here[name] for name in sorted(here)]
        return list(self._gather(sorted(work)))

    def _check_texts(self, part: HeadAtlas) -> None:
        """Raise AtlasError if a text has changed since its part was finished."""
        for name, held in part.info["texts"].items():
            if held != corpus.digest([self._named[name]]):
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
        tensors |= {f"outputs/{key}": value for key, value in part.measured.outputs.items()}
        scratch = self._path(name).with_suffix(f".{self.rank}-{os.getpid()}.tmp")
        save_file(tensors, scratch, metadata={"headscope": json.dumps(data)})
        os.replace(scratch, self._path(name))

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
        part.measured.outputs = {n.removeprefix("outputs/"): t for n, t in tensors.items() if n.startswith("outputs/")}
        return part


def _together(parts: Sequence[HeadAtlas], info: dict[str, Any]) -> HeadAtlas:
    """All parts as one atlas: added up in the order given."""
    atlas = HeadAtlas(info | {"documents": {}, "texts": {}, "examples": {}})
    for part in parts:
        atlas.measured.merge(part.measured)
        atlas.relations.merge(part.relations)
        atlas.worth.merge(part.worth)
        for name in ("documents", "texts"):
            atlas.info[name] |= part.info[name]
    atlas.worth = atlas.worth.sorted()
    return atlas


def _means(parts: Sequence[HeadAtlas]) -> Tensor | None:
    """Mean head outputs over all valid positions of the corpus, [layers, H, Dv]."""
    sums = [part.measured.outputs for part in parts if part.measured.outputs]
    if not sums:
        return None
    total = torch.stack([part["sum"] for part in sums]).sum(0)
    count = torch.stack([part["count"] for part in sums]).sum(0)
    return (total / count.clamp(min=1)).float()


def _head_counts(loaded: Loaded) -> tuple[int, ...]:
    """Heads of each attention site, found by running one token pair."""
    entry, options = reader(loaded.model)
    found: list[int] = []

    def see(call: AttentionCall) -> None:
        found.append(call.shape[1])

    with torch.no_grad(), record(entry, reduce=see):
        entry(input_ids=torch.tensor([[1, 2]], device=loaded.model.device), **options)
    return tuple(found)


def weights_hash(model: torch.nn.Module) -> str:
    """A sha256 over all weights with their names."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\0".encode())
        if data.numel():
            found.update(memoryview(data.view(torch.uint8).numpy()))
    return found.hexdigest()


def _info(survey: _Survey) -> dict[str, Any]:
    from importlib.metadata import version

    columns = columns_of(survey.measures)
    loaded = survey.loaded
    return {
        "model": {
            "name": loaded.name,
            "type": type(loaded.model).__name__,
            "weights": weights_hash(loaded.model),
            "heads": list(survey.heads),
            "causal": loaded.causal,
        },
        "columns": {c.name: {"about": c.about, "unit": c.unit, "source": c.source} for c in columns},
        "plan": vars(survey.plan) | {},
        "versions": {name: version(name) for name in ("headscope", "torch", "transformers")},
    }


def _fingerprint(survey: _Survey) -> str:
    told = {
        "info": survey.info,
        "documents": [document.name for document in survey.documents],
        "examples": {name: _short(repr(given)) for name, given in survey.examples.items()},
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _short(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
