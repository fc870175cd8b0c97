"""profile(): all measures, relations and effects of a model over a corpus.

The work is cut into shards, which do not depend on the number of processes and are added up in the order of their
names: any number of processes, and a run that was killed and started again, give the same sums.
"""

from __future__ import annotations

import hashlib
import inspect
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headscope.distributed import processes
from headscope.errors import AtlasError, HeadscopeError
from headscope.heads import corpus
from headscope.heads.atlas.atlas import HeadAtlas
from headscope.heads.atlas.measuring import columns_of, measure
from headscope.heads.atlas.shards import OnProgress, Shard, ShardFolder
from headscope.heads.atlas.worth import Worth
from headscope.heads.corpus import Document, Piece
from headscope.heads.effects import head_effects
from headscope.heads.measures import Measure, standard
from headscope.heads.relations import Example, count_relations
from headscope.heads.relations.collections import collections_of, notes_on, readable
from headscope.models.encoding import start_in_words
from headscope.models.loading import Loaded, reader
from headscope.watching.recording import record
from headscope.watching.texts import record_batch

_DOCUMENTS, _EXAMPLES = 4, 200  # texts and sentences in a shard
_TOKENS = 1 << 16  # tokens of a shard's texts that wait to be measured together


@dataclass(frozen=True)
class Plan:
    """How much of everything :func:`profile` measures; the defaults suit two slow cores.

    Attributes:
        length: Tokens in a piece of text.
        pieces: Pieces of each document, from its start; 0 for all.
        repeats: Texts of repeated random tokens.
        period: Tokens that are repeated in them.
        worth: How many documents, spread evenly over all, are used to find what heads are worth; 0 for none.
        worth_tokens: Tokens of each of these, from a position that follows from its name.
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
class _Work:
    """The shards of one model, one corpus and one plan."""

    loaded: Loaded
    documents: Sequence[Document]
    examples: dict[str, list[Example]]
    measures: Sequence[Measure]
    plan: Plan
    head_counts: tuple[int, ...]
    means: Tensor | None = None

    @property
    def first_half(self) -> int:
        """The half of the first text; of a single text by its name, so that atlases of one text can be merged."""
        return _number(self.documents[0]) & 1 if len(self.documents) == 1 else 0

    def first_round(self) -> dict[str, Callable[[], Shard]]:
        """The shards that need no others: texts, repeats, relations."""
        work: dict[str, Callable[[], Shard]] = {}
        for start in range(0, len(self.documents), _DOCUMENTS):
            work[f"texts-{start:08d}"] = partial(self._texts, start)
        if self.plan.repeats:
            work["repeats-00000000"] = self._repeats
        for name, examples in self.examples.items():
            for start in range(0, len(examples), _EXAMPLES):
                key = f"relations-{hashlib.sha256(name.encode()).hexdigest()[:12]}-{start:08d}"
                work[key] = partial(self._relations, name, examples[start : start + _EXAMPLES])
        return work

    def second_round(self) -> dict[str, Callable[[], Shard]]:
        """The shards that need the means of all head outputs: what heads are worth."""
        count = min(self.plan.worth, len(self.documents))
        return {f"worth-{number:08d}": partial(self._worth, number, count) for number in range(count)}

    def _texts(self, start: int) -> Shard:
        shard, notes = Shard(), list[str]()
        waiting: list[Piece] = []
        for number, document in enumerate(self.documents[start : start + _DOCUMENTS], start):
            half = (number + self.first_half) % 2
            pieces = self._pieces(document, half, notes)
            if not pieces:
                continue
            waiting += pieces
            shard.documents[document.name] = half
            shard.texts[document.name] = corpus.digest(document)
            if sum(len(piece.ids) for piece in waiting) >= _TOKENS:
                shard.measurements.merge(measure(self.loaded, waiting, self.measures, tokens=self.plan.tokens))
                waiting = []
        shard.measurements.merge(measure(self.loaded, waiting, self.measures, tokens=self.plan.tokens))
        shard.measurements.notes = list(dict.fromkeys(notes + shard.measurements.notes))
        return shard

    def _pieces(self, document: Document, half: int, notes: list[str]) -> list[Piece]:
        """The pieces of a text that are read; adds to ``notes`` what is not."""
        most = self.plan.pieces or 1 << 62
        pieces = corpus.cut(self.loaded, document, half, length=self.plan.length, most=most + 1)
        length = min(self.plan.length, self.loaded.context or self.plan.length)
        if not pieces:
            notes.append(f"{document.name} has fewer than two tokens: left out.")
        if len(pieces) > 1 < most:
            notes.append(f"Texts longer than {length} tokens are read in pieces, each after a start token.")
        if len(pieces) > most:
            pieces_read = f"{length} tokens" if most == 1 else f"{most} times {length} tokens"
            notes.append(f"Of longer texts only the beginning was read, {pieces_read} at most; --pieces 0 reads all.")
        return pieces[:most]

    def _repeats(self) -> Shard:
        plan = self.plan
        pieces = corpus.repeats(self.loaded, count=plan.repeats, period=plan.period, seed=plan.seed)
        measurements = measure(self.loaded, pieces, self.measures, tokens=plan.tokens)
        return Shard(measurements, documents={piece.document: piece.half for piece in pieces})

    def _relations(self, name: str, examples: Sequence[Example]) -> Shard:
        shard = Shard()
        note = shard.measurements.notes.append
        shard.relations = count_relations(self.loaded, examples, batch_tokens=self.plan.tokens, on_note=note)
        shard.examples[name] = {"read": shard.relations.examples, "too_long": shard.relations.skipped}
        return shard

    def _worth(self, number: int, count: int) -> Shard:
        """What heads are worth on text ``number`` of ``count``; texts are spread evenly over the corpus.

        The text's name decides which piece of it is read.
        """
        shard, length = Shard(), self.plan.worth_tokens
        document = self.documents[number * len(self.documents) // count]
        pieces = corpus.cut(self.loaded, document, 0, length=length, most=max(1, self.plan.length // length))
        if not pieces:
            return shard
        pieces = [piece for piece in pieces if len(piece.ids) == len(pieces[0].ids)]
        piece = pieces[_number(document) % len(pieces)]
        ids = torch.tensor([piece.ids], device=self.loaded.model.device)
        entry, _ = reader(self.loaded.model)  # of an encoder and a decoder the encoder, whose heads are measured
        zero = head_effects(entry, ids)
        effects = {"ablation_zero": zero}
        if self.means is None:
            shard.measurements.notes.append(
                "Ablation to the mean is left out: the heads' outputs are not of one shape in all layers."
            )
        else:
            effects["ablation_mean"] = head_effects(entry, ids, to=self.means)
        if zero.unit != "1 - cosine":  # its gradient at the unchanged model is zero
            effects["gradient"] = head_effects(entry, ids, method="gradient")
        for effect in effects.values():
            shard.measurements.notes += [f"What heads are worth: {note}." for note in effect.notes]
        values = {name: effect.per_example.double() for name, effect in effects.items()}
        shard.worth = Worth(values, zero.clean.double(), [document.name], zero.unit)
        return shard


def profile(
    model: Any,
    tokenizer: Any = None,
    texts: Sequence[str | Document] | None = None,
    *,
    measures: Sequence[Measure] | None = None,
    relations: dict[str, list[Example]] | None = None,
    plan: Plan | None = None,
    shards: Path | None = None,
    on_progress: OnProgress | None = None,
) -> HeadAtlas:
    """Profile every head of a model.

    Args:
        model: What :func:`headscope.load` returns, which includes the tokenizer; or a model of `transformers` in
            evaluation mode.
        tokenizer: The tokenizer of a `transformers` model.
        texts: The texts, or documents, which are read one after another; None: docstrings and licence texts, which
            every machine has.
        measures: The measures; :func:`headscope.heads.measures.standard` by default.
        relations: Sentences with known relations, by the name of their collection, as in
            ``{"English frames": headscope.heads.relations.english_sentences()}``.
        plan: How much of everything is measured.
        shards: A folder for finished shards: the same call continues where it was stopped, and several processes
            started by torchrun share the work. None: this process does everything and stores nothing.
        on_progress: Called after each shard with how many are done, of how many, and what kind it was.

    Raises:
        AtlasError: The folder holds shards of other work, or several processes have no folder; two documents or
            two collections are the same.
        TextError: A document cannot be read, or two have one name.
        ValueError: A model without its tokenizer, or in training mode; or one text instead of a list.

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
    if (count := processes()) > 1 and shards is None:
        raise AtlasError(f"{count} processes share work through a folder: give shards=, or --out on the command line.")
    loaded, documents = _loaded(model, tokenizer), _documents(texts)
    collections, notes = readable(loaded, relations or {})
    measures = standard() if measures is None else measures
    work = _Work(loaded, documents, collections, measures, plan or Plan(), head_counts(loaded))
    atlas = _run(work, shards, on_progress)
    notes += _left_out(loaded, work.head_counts)
    notes += notes_on(atlas.info["examples"], collections)
    atlas.measurements.notes = list(dict.fromkeys(atlas.measurements.notes + notes))
    return atlas


def _run(work: _Work, shards: Path | None, on_progress: OnProgress | None) -> HeadAtlas:
    """Compute all shards and add them up."""
    info, examples = _info(work), collections_of(work.examples)
    atlas = HeadAtlas(info | {"documents": {}, "texts": {}, "examples": examples})
    identity = {"info": info, "documents": [document.name for document in work.documents], "examples": examples}
    folder = ShardFolder(shards, identity, work.documents, on_progress)
    _add(atlas, folder.run(work.first_round(), len(work.second_round())))
    work.means = _means(atlas.measurements.outputs)
    _add(atlas, folder.run(work.second_round(), 0))
    atlas.worth = atlas.worth.sorted()
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
    documents = [
        text if isinstance(text, Document) else _document(text, number) for number, text in enumerate(texts, 1)
    ]
    corpus.check_names(documents)
    return documents


def _document(text: str, number: int) -> Document:
    """Its name includes a part of its digest, so that two atlases whose first texts differ can be merged."""
    return Document(f"text {number} ({corpus.digest(Document('', lambda: text))[:8]})", lambda: text)


def _number(document: Document) -> int:
    """A number computed from a document's name, the same in every corpus."""
    return zlib.crc32(document.name.encode("utf-8", "replace"))


def _add(atlas: HeadAtlas, shards: Iterable[Shard]) -> None:
    """Add up shards in this order; one is in memory at a time."""
    for shard in shards:
        atlas.measurements.merge(shard.measurements)
        atlas.relations.merge(shard.relations)
        atlas.worth.merge(shard.worth)
        atlas.info["documents"] |= shard.documents
        atlas.info["texts"] |= shard.texts
        for name, counts in shard.examples.items():
            entry = atlas.info["examples"][name]
            entry |= {key: entry.get(key, 0) + count for key, count in counts.items()}
    corpus.check_texts(atlas.info["texts"].items(), AtlasError)


def _means(outputs: dict[str, Tensor]) -> Tensor | None:
    """Mean head outputs over all valid positions of the corpus, [layers, H, Dv]."""
    return (outputs["sum"] / outputs["count"].clamp(min=1)).float() if outputs else None


def head_counts(loaded: Loaded) -> tuple[int, ...]:
    """Heads of each attention site, found by running two tokens.

    Raises:
        HeadscopeError: The model cannot be run on a text alone.
    """
    try:
        recording = record_batch(loaded, torch.tensor([[1, 2]]), reduce=lambda call: call.shape[1])
    except (TypeError, ValueError, AttributeError) as error:
        raise HeadscopeError(
            f"{loaded.name} ({type(loaded.model).__name__}) cannot be run on a text alone ({error}). Give a model "
            "that reads text and nothing else, such as the text model inside this one."
        ) from error
    return tuple(answer.values for answer in recording.answers)


def _left_out(loaded: Loaded, measured: Sequence[int]) -> list[str]:
    """A sentence about the heads that are not measured: those of a decoder beside an encoder."""
    if "decoder_input_ids" not in inspect.signature(loaded.model.forward).parameters:
        return []
    ids = torch.tensor([[1, 2]], device=loaded.model.device)
    with torch.no_grad(), record(loaded.model, reduce=lambda call: call.shape[1]) as recording:
        loaded.model(input_ids=ids, decoder_input_ids=ids)
    total = sum(answer.values for answer in recording.answers)
    return [
        f"Of {total} heads the {sum(measured)} of the encoder are measured. The other {total - sum(measured)} are the "
        "decoder's, which attend from the text that it writes, to that text or (cross) to the encoder's. A corpus has "
        "no such text, so they are left out; record(model) shows them for two texts of your own."
    ]


def weights_hash(model: torch.nn.Module) -> str:
    """A sha256 over all weights with their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\0".encode())
        if data.numel():
            digest.update(memoryview(data.view(torch.uint8).numpy()))
    return digest.hexdigest()


def _start_token(loaded: Loaded) -> str:
    """The token before each text, in words."""
    if loaded.start_token_id is None:
        return start_in_words(None)
    return start_in_words(loaded.start_token_id, loaded.tokenizer.convert_ids_to_tokens(loaded.start_token_id))


def _info(work: _Work) -> dict[str, Any]:
    from importlib.metadata import version

    columns = columns_of(work.measures)
    loaded = work.loaded
    return {
        "model": {
            "name": loaded.name,
            "type": type(loaded.model).__name__,
            "weights": weights_hash(loaded.model),
            "heads": list(work.head_counts),
            "causal": loaded.causal,
            "side": "" if reader(loaded.model)[0] is loaded.model else "encoder",
            "start_token": _start_token(loaded),
        },
        "columns": {c.name: {"about": c.about, "unit": c.unit, "source": c.source} for c in columns},
        "plan": vars(work.plan) | {},
        "versions": {name: version(name) for name in ("headscope", "torch", "transformers")},
    }
