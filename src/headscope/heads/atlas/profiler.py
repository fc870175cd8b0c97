"""profile(): all measures, relations and effects of a model over a corpus.

The work is cut into parts that do not depend on who does them, and which are added up in the order of their names:
any number of processes, and a run that was killed and begun again, give the same sums.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headscope.distributed import processes
from headscope.errors import AtlasError
from headscope.heads import corpus
from headscope.heads.atlas.atlas import HeadAtlas, Worth
from headscope.heads.atlas.measuring import columns_of, measure
from headscope.heads.atlas.shards import Parts, Told
from headscope.heads.corpus import Document, Piece
from headscope.heads.effects import head_effects
from headscope.heads.measures import Measure, standard
from headscope.heads.relations import Example, count_relations
from headscope.heads.relations.collections import collections_of, notes_on, readable
from headscope.models.loading import Loaded, reader
from headscope.watching.texts import record_batch

__all__ = ["Plan", "head_counts", "profile", "weights_hash"]

_DOCUMENTS, _EXAMPLES = 4, 200  # of texts and sentences in one part
_HELD = 1 << 16  # tokens of a part's texts that are held before they are measured


@dataclass(frozen=True)
class Plan:
    """What a survey does; every number has a default that suits two slow cores.

    Attributes:
        length: Tokens in a piece of text.
        pieces: Pieces of each document, from its start; 0 for all.
        repeats: Texts of repeated random tokens.
        period: Tokens that are repeated in them.
        worth: How many documents, spread evenly over all, are used to find what heads are worth; 0 for none.
        worth_tokens: Tokens of each of these, from a place that follows from its name.
        seed: Of the random tokens.
        tokens: Tokens in a batch.
    """

    length: int = 512
    pieces: int = 1
    repeats: int = 16
    period: int = 50
    worth: int = 12
    worth_tokens: int = 32
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

    @property
    def first_half(self) -> int:
        """The half of the first text; a lone one's follows from its name, so that atlases of one text can be merged."""
        return _number(self.documents[0]) & 1 if len(self.documents) == 1 else 0

    def first(self) -> dict[str, Callable[[], HeadAtlas]]:
        """The parts that need nothing else: texts, repeats, relations."""
        work: dict[str, Callable[[], HeadAtlas]] = {}
        for start in range(0, len(self.documents), _DOCUMENTS):
            work[f"texts-{start:08d}"] = lambda start=start: self._texts(start)  # type: ignore[misc]
        if self.plan.repeats:
            work["repeats-00000000"] = self._repeats
        for name, examples in self.examples.items():
            for start in range(0, len(examples), _EXAMPLES):
                given = examples[start : start + _EXAMPLES]
                part = f"relations-{hashlib.sha256(name.encode()).hexdigest()[:12]}-{start:08d}"
                work[part] = lambda name=name, given=given: self._relations(name, given)  # type: ignore[misc]
        return work

    def second(self) -> dict[str, Callable[[], HeadAtlas]]:
        """The parts that need the means of all head outputs: what heads are worth."""
        count = min(self.plan.worth, len(self.documents))
        return {f"worth-{i:08d}": lambda i=i: self._worth(i, count) for i in range(count)}  # type: ignore[misc]

    def _texts(self, start: int) -> HeadAtlas:
        part = HeadAtlas(self.info | {"documents": {}, "texts": {}, "examples": {}})
        notes: list[str] = []
        held: list[Piece] = []
        for number, document in enumerate(self.documents[start : start + _DOCUMENTS], start):
            half = (number + self.first_half) % 2
            found = self._pieces(document, half, notes)
            if not found:
                continue
            held += found
            part.info["documents"][document.name] = half
            part.info["texts"][document.name] = corpus.digest(document)
            if sum(len(piece.ids) for piece in held) >= _HELD:
                part.measurements.merge(measure(self.loaded, held, self.measures, tokens=self.plan.tokens))
                held = []
        part.measurements.merge(measure(self.loaded, held, self.measures, tokens=self.plan.tokens))
        part.measurements.notes = list(dict.fromkeys(notes + part.measurements.notes))
        return part

    def _pieces(self, document: Document, half: int, notes: list[str]) -> list[Piece]:
        """What is read of a text; ``notes`` is told what is not."""
        most = self.plan.pieces or 1 << 62
        found = corpus.cut(self.loaded, document, half, length=self.plan.length, most=most + 1)
        length = min(self.plan.length, self.loaded.context or self.plan.length)
        if not found:
            notes.append(f"{document.name} has fewer than two tokens: left out.")
        if len(found) > 1 < most:
            notes.append(f"Texts longer than {length} tokens are read in pieces, each after a start token.")
        if len(found) > most:
            pieces_read = f"{length} tokens" if most == 1 else f"{most} times {length} tokens"
            notes.append(f"Of longer texts only the beginning was read, {pieces_read} at most; --pieces 0 reads all.")
        return found[:most]

    def _repeats(self) -> HeadAtlas:
        plan = self.plan
        pieces = corpus.repeats(self.loaded, count=plan.repeats, period=plan.period, seed=plan.seed)
        documents = {piece.document: piece.half for piece in pieces}
        part = HeadAtlas(self.info | {"documents": documents, "texts": {}, "examples": {}})
        part.measurements = measure(self.loaded, pieces, self.measures, tokens=plan.tokens)
        return part

    def _relations(self, name: str, examples: Sequence[Example]) -> HeadAtlas:
        part = HeadAtlas(self.info | {"documents": {}, "texts": {}, "examples": {}})
        note = part.measurements.notes.append
        part.relations = count_relations(self.loaded, examples, batch_tokens=self.plan.tokens, on_note=note)
        part.info["examples"][name] = {"read": part.relations.examples, "too_long": part.relations.skipped}
        return part

    def _worth(self, number: int, count: int) -> HeadAtlas:
        """What heads are worth on text ``number`` of ``count``, spread evenly; the place in it by its name."""
        part = HeadAtlas(self.info | {"documents": {}, "texts": {}, "examples": {}})
        document = self.documents[number * len(self.documents) // count]
        tokens = self.plan.worth_tokens
        found = corpus.cut(self.loaded, document, 0, length=tokens, most=max(1, self.plan.length // tokens))
        if not found:
            return part
        whole = [piece for piece in found if len(piece.ids) == len(found[0].ids)]
        piece = whole[_number(document) % len(whole)]
        ids = torch.tensor([piece.ids], device=self.loaded.model.device)
        entry, _ = reader(self.loaded.model)  # the heads that were measured: of two sides, the encoder's
        zero = head_effects(entry, ids)
        made = {"ablation_zero": zero}
        if self.means is None:
            told = "Ablation to the mean is left out: the heads' outputs are not of one shape in all layers."
            part.measurements.notes.append(told)
        else:
            made["ablation_mean"] = head_effects(entry, ids, to=self.means)
        if zero.unit != "1 - cosine":  # whose derivative is zero at the clean run
            made["gradient"] = head_effects(entry, ids, method="gradient")
        values = {name: effects.per_example.double() for name, effects in made.items()}
        for effects in made.values():
            part.measurements.notes += [f"What heads are worth: {note}." for note in effects.notes]
        part.worth = Worth(values, zero.clean.double(), [document.name], zero.unit)
        return part


def profile(
    model: Any,
    tokenizer: Any = None,
    texts: Sequence[str | Document] | None = None,
    *,
    measures: Sequence[Measure] | None = None,
    relations: dict[str, list[Example]] | None = None,
    plan: Plan | None = None,
    parts: Path | None = None,
    on_part: Told | None = None,
) -> HeadAtlas:
    """Profile every head of a model.

    Args:
        model: What :func:`headscope.load` gives, tokenizer and all; or a model of `transformers`, in evaluation.
        tokenizer: Its tokenizer, if it is the latter.
        texts: The texts, or documents that are read when it is their turn; without any, docstrings and licence texts
            that every machine has.
        measures: What to take; :func:`headscope.heads.measures.standard` by default.
        relations: Sentences with known relations, by the name of their collection, as in
            ``{"English frames": headscope.heads.relations.english_sentences()}``.
        plan: How much of it.
        parts: A folder for finished parts: the same call goes on where it was stopped, and several processes
            started by torchrun share the work. Without it everything happens here and now.
        on_part: Told after each part how many are done, of how many, and what it was.

    Raises:
        AtlasError: The folder holds the parts of other work, or several processes have no folder; two documents or
            two collections are the same.
        TextError: A document cannot be read, or two have one name.
        ValueError: A model without its tokenizer, or in training; or one text where a list of them is wanted.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
        >>> from tokenizers import Tokenizer, models
        >>> words = "<s> ? the cat sat on a mat".split()
        >>> inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "?"))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?", bos_token="<s>")
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=24, n_layer=2, n_head=3)).eval()
        >>> atlas = profile(model, tokenizer, ["cat", "sat on"], plan=Plan(repeats=2, period=5, worth=0))
        >>> atlas.value("induction").shape
        torch.Size([2, 3])
    """
    if (count := processes()) > 1 and parts is None:
        raise AtlasError(f"{count} processes share work through a folder: give parts=, or --out on the command line.")
    loaded, given = _loaded(model, tokenizer), _documents(texts)
    chosen, notes = readable(loaded, relations or {})
    collections = collections_of(chosen)
    taken = tuple(measures) if measures is not None else standard()
    survey = _Survey(loaded, given, chosen, taken, plan or Plan(), {}, head_counts(loaded))
    survey.info = _info(survey)
    told = {"info": survey.info, "documents": [d.name for d in given], "examples": collections}
    works = Parts(parts, told, given, on_part)
    atlas = HeadAtlas(survey.info | {"documents": {}, "texts": {}, "examples": collections})
    _add(atlas, works.run(survey.first(), len(survey.second())))
    survey.means = _means(atlas.measurements.outputs)
    _add(atlas, works.run(survey.second(), 0))
    atlas.worth, notes = atlas.worth.sorted(), notes + notes_on(atlas.info["examples"], chosen)
    atlas.measurements.notes = list(dict.fromkeys(atlas.measurements.notes + notes))
    return atlas


def _loaded(model: Any, tokenizer: Any) -> Loaded:
    if isinstance(model, Loaded):
        return model if tokenizer is None else replace(model, tokenizer=tokenizer)
    if tokenizer is None:
        raise ValueError(
            "a model without its tokenizer: profile(model, tokenizer, texts), or profile(headscope.load(…))."
        )
    return Loaded.of(model, tokenizer)


def _documents(texts: Sequence[str | Document] | None) -> list[Document]:
    if texts is None:
        return corpus.default_documents()
    if isinstance(texts, str):
        raise ValueError("one text where a list of texts is wanted: [text].")
    found = [text if isinstance(text, Document) else _document(text, number) for number, text in enumerate(texts, 1)]
    corpus.check_names(found)
    return found


def _document(text: str, number: int) -> Document:
    """Its name holds some of its digest: atlases of other texts can be merged, whose first text is not this one."""
    return Document(f"text {number} ({corpus.digest(Document('', lambda: text))[:8]})", lambda: text)


def _number(document: Document) -> int:
    """A number that follows from a document's name, the same in every corpus."""
    return zlib.crc32(document.name.encode("utf-8", "replace"))


def _add(atlas: HeadAtlas, parts: Iterable[HeadAtlas]) -> None:
    """Add up parts in the order given; one is held at a time."""
    for part in parts:
        atlas.measurements.merge(part.measurements)
        atlas.relations.merge(part.relations)
        atlas.worth.merge(part.worth)
        for name in ("documents", "texts"):
            atlas.info[name] |= part.info[name]
        for name, counted in part.info["examples"].items():
            held = atlas.info["examples"][name]
            held |= {key: held.get(key, 0) + number for key, number in counted.items()}
    corpus.check_texts(atlas.info["texts"].items(), AtlasError)


def _means(outputs: dict[str, Tensor]) -> Tensor | None:
    """Mean head outputs over all valid positions of the corpus, [layers, H, Dv]."""
    return (outputs["sum"] / outputs["count"].clamp(min=1)).float() if outputs else None


def head_counts(loaded: Loaded) -> tuple[int, ...]:
    """Heads of each attention site, found by running two tokens."""
    recording = record_batch(loaded, torch.tensor([[1, 2]]), reduce=lambda call: call.shape[1])
    return tuple(answer.values for answer in recording.answers)


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
