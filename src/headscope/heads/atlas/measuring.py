"""Run a model over texts and take every measure of every head; no L×S matrix is built, and no query or key is stored.

The reductions of a layer share one pass over its weights, which happens as the layer runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from headscope.errors import is_out_of_memory
from headscope.heads.corpus import Piece, TextBatch, batches
from headscope.heads.effects import output_sum
from headscope.heads.examples import TokenExamples
from headscope.heads.measures import AttentionBatch, Column, Measure, Ratio, Visibility, take
from headscope.heads.measures.strongest import MaxAmong
from headscope.heads.measures.sums import MeasureSums, weights_of
from headscope.models.loading import Loaded, reader
from headscope.ops.masks import Mask
from headscope.ops.masks.codec import encode
from headscope.ops.reductions import Reduction
from headscope.watching.hooks import AttentionCall, unwatched
from headscope.watching.texts import record_batch

_PROJECTIONS = (
    "o_proj",
    "out_proj",
    "c_proj",
    "out_lin",
    "wo",
    "Wo",
    "o",
    "dense",
    "to_out.0",
    "proj",
    "attention_output",
)
_OUTSIDE = ("output.dense", "output.o_proj", "out_proj")


class Measurements:
    """The sums of every head, and those of uniform attention (the null)."""

    def __init__(self) -> None:
        self.sums = MeasureSums()
        self.null = MeasureSums()
        self.notes: list[str] = []
        self.outputs: dict[str, Tensor] = {}  # "sum" [layers, H, Dv] of head outputs, "count" of positions
        self.token_examples = TokenExamples()

    def merge(self, other: Measurements) -> None:
        """Add the sums of other texts."""
        self.sums.merge(other.sums)
        self.null.merge(other.null)
        self.token_examples.merge(other.token_examples)
        for name, value in other.outputs.items():
            self.outputs[name] = self.outputs[name] + value if name in self.outputs else value
        self.notes += [note for note in other.notes if note not in self.notes]


class _LargestWeights(Measure):
    """Each row's largest weight on text with its key, for examples; no column."""

    def reductions(self, batch: AttentionBatch) -> dict[str, Reduction]:
        """The largest weight."""
        return {"largest weights": MaxAmong(batch.text)}

    def sums(self, batch: AttentionBatch) -> dict[str, Ratio]:
        """None."""
        return {}


def columns_of(measures: Iterable[Measure]) -> tuple[Column, ...]:
    """All columns, each once.

    Raises:
        ValueError: Two measures have a column of the same name.
    """
    columns: dict[str, Column] = {}
    for measure in measures:
        for column in measure.columns:
            if column.name in columns:
                raise ValueError(f"two measures have a column {column.name!r}: give one of them another name.")
            columns[column.name] = column
    return tuple(columns.values())


def measure(
    loaded: Loaded,
    pieces: Sequence[Piece],
    measures: Sequence[Measure],
    *,
    tokens: int = 2048,
) -> Measurements:
    """Run a model over pieces of text and add up all measures.

    Args:
        loaded: The model.
        pieces: The texts; texts of repeated tokens may be among them.
        measures: The measures.
        tokens: Tokens in a batch of several texts; halved, with a note, where memory does not suffice.
    """
    measurements = Measurements()
    waiting = _in_batches(pieces, tokens, loaded)
    layers = int(getattr(loaded.model.config.get_text_config(), "num_hidden_layers", 1))
    while waiting:
        batch = waiting.pop(0)
        try:
            part = _measure_batch(loaded, batch, measures, layers)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or len(batch.pieces) == 1:
                raise
            half = len(batch.pieces) // 2
            waiting[:0] = [
                b for part in (batch.pieces[:half], batch.pieces[half:]) for b in batches(part, tokens=1 << 62)
            ]
            note = "Not enough memory for whole batches of texts: smaller ones were used."
            measurements.notes += [note] if note not in measurements.notes else []
            continue
        measurements.merge(part)
    return measurements


def _in_batches(pieces: Sequence[Piece], tokens: int, loaded: Loaded) -> list[TextBatch]:
    device = loaded.model.device
    kinds = [[p for p in pieces if not p.period], [p for p in pieces if p.period]]
    pad = int(loaded.tokenizer.pad_token_id or 0)
    return [batch for kind in kinds for batch in batches(kind, tokens=tokens, pad=pad, device=device)]


def _measure_batch(loaded: Loaded, batch: TextBatch, measures: Sequence[Measure], layers: int) -> Measurements:
    measures = [measure for measure in measures if measure.reads(batch)]
    for_examples = [measure for measure in (_LargestWeights(),) if measure.reads(batch)]
    modules = dict(reader(loaded.model)[0].named_modules())
    weights = weights_of((piece.document, piece.half) for piece in batch.pieces)
    visibilities: dict[tuple[object, int], Visibility] = {}  # by mask and number of heads, like the next two
    nulls: dict[tuple[object, int], dict[str, Ratio]] = {}
    layers_of: dict[tuple[object, int], list[int]] = {}
    evidence = {column.name for column in columns_of(measures) if column.evidence}
    measurements = Measurements()
    number = -1
    outputs: list[Tensor] = []

    def on_call(call: AttentionCall) -> None:
        nonlocal number
        number += 1
        count = max(layers, number + 1)
        key = (_mask_key(call.scores.mask), call.shape[1])
        if key not in visibilities:
            visibility = visibilities[key] = Visibility(batch, call.scores.mask, call.shape[1])
            nulls[key], layers_of[key] = take(measures, AttentionBatch(visibility.uniform, visibility)), []
        layers_of[key].append(number)
        attention = AttentionBatch(call.matrix(), visibilities[key], call.value, output_weight(modules, call))
        outputs.append(output_sum(call, batch.valid))
        ratios = take([*measures, *for_examples], attention)
        if for_examples:
            largest = attention.results["largest weights"]
            measurements.token_examples.add(batch, number, largest.values, largest.indices, attention.rows)
        with_replicates = {name: ratio for name, ratio in ratios.items() if name in evidence}
        others = {name: ratio for name, ratio in ratios.items() if name not in evidence}
        measurements.sums.add(with_replicates, number, count, weights)
        measurements.sums.add(others, number, count, weights[:2])

    record_batch(loaded, batch.ids, batch.attention_mask, reduce=on_call)
    for key, numbers in layers_of.items():
        measurements.null.add(nulls[key], numbers, max(layers, number + 1), weights[:2])
    if len({output.shape for output in outputs}) == 1 and not any(piece.period for piece in batch.pieces):
        measurements.outputs = {"sum": torch.stack(outputs), "count": batch.valid.sum().double().reshape(1)}
    for piece, rows in zip(batch.pieces, batch.valid.sum(-1).tolist(), strict=True):
        documents = measurements.sums.documents
        documents[piece.document] = documents.get(piece.document, 0) + int(rows)
    return measurements


def _mask_key(mask: Mask | None) -> object:
    """Equal for masks with the same cells; layers with equal keys share a Visibility."""
    try:
        return json.dumps(encode(mask, _digest))
    except ValueError:  # a function is equal to itself only
        return mask


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return f"{tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(data).hexdigest()}"


def output_weight(modules: dict[str, nn.Module], call: AttentionCall) -> Tensor | None:
    """The output projection of an attention call as a matrix [E, H·Dv]; None if no module looks like one.

    Of a plain linear layer it is the weight, of any other what the layer does to the unit vectors, so that adapters
    and quantised weights are seen; that costs some per cent of a forward over 2,048 tokens.
    """
    width = call.shape[1] * call.value.shape[-1]
    parent = call.name.rpartition(".")[0]
    names = [f"{call.name}.{name}" for name in _PROJECTIONS] + [f"{parent}.{name}" for name in _OUTSIDE]
    for name in names:
        module = modules.get(name)
        weight = getattr(module, "weight", None)
        if module is None or not isinstance(weight, Tensor) or weight.dim() != 2:
            continue
        if type(module).__name__ == "Conv1D":
            weight = weight.T
        if weight.shape[1] != width:
            continue
        if type(module) is nn.Linear or type(module).__name__ == "Conv1D":
            return weight.detach()
        with unwatched():
            units = torch.eye(width, dtype=call.value.dtype, device=call.value.device)
            rows: Tensor = module(units) - module(torch.zeros_like(units[:1]))
        return rows.T
    return None
