"""The standard measures of every atlas; docs/heads.md says what each is for."""

from __future__ import annotations

import torch
from torch import Tensor

from headscope.heads.corpus import TextBatch
from headscope.heads.measures.measure import AttentionBatch, Column, Measure, Ratio
from headscope.heads.measures.products import Distance, Product
from headscope.heads.measures.strongest import Strongest
from headscope.ops.reductions import Entropy, Reduction, TransposedProduct

REPEATED = ("induction", "duplicate")  # columns measured on repeated random tokens
RADIUS = 8  # offsets go from −8 to +8
_CLARK, _VOITA, _VIG, _GU = "arXiv 1906.04341", "arXiv 1905.09418", "arXiv 1906.04284", "arXiv 2410.10781"
_H2O, _KOBAYASHI, _OLSSON = "arXiv 2306.14048", "arXiv 2004.10102", "arXiv 2209.11895"
_DELTAS = range(-RADIUS, RADIUS + 1)


def standard() -> tuple[Measure, ...]:
    """Entropy, confidence, distance, offsets, sinks, received, norm-weighted mass, induction and duplicates."""
    return (
        Spread(),
        Confidence(),
        MeanDistance(),
        OffsetMass(),
        OffsetHits(),
        Sinks(),
        HeavyHitters(),
        Norms(),
        Repeats(),
    )


class Spread(Measure):
    """How uniform a head's attention is."""

    columns = (
        Column("entropy", "−Σ a ln a, mean over rows", "nats", _CLARK),
        Column("entropy_share", "Σ entropy ÷ Σ ln n, n the number of visible keys", "share", _CLARK, evidence=True),
    )

    def reductions(self, batch: AttentionBatch) -> dict[str, Reduction]:
        return {"entropy": Entropy()}

    def sums(self, batch: AttentionBatch) -> dict[str, Ratio]:
        total = batch.over_rows(batch.results["entropy"])
        possible = batch.over_rows(batch.visibility.keys_per_query.clamp(min=1).log().unsqueeze(1)).expand_as(total)
        return {"entropy": Ratio(total, batch.row_count), "entropy_share": Ratio(total, possible)}


class Confidence(Measure):
    """How much weight the strongest key gets."""

    columns = (
        Column("confidence", "largest weight on text ÷ weight on text", "share", _VOITA, over_text=True),
        Column("confidence_raw", "largest weight, sinks included", "share", _VOITA),
    )

    def reductions(self, batch: AttentionBatch) -> dict[str, Reduction]:
        return {"strongest": _strongest(batch), "mass": _mass(batch)}

    def sums(self, batch: AttentionBatch) -> dict[str, Ratio]:
        text, _, others, _ = batch.results["strongest"]
        raw = batch.over_rows(torch.maximum(text, others))
        return {
            "confidence": Ratio(batch.over_rows(text), _on_text(batch)),
            "confidence_raw": Ratio(raw, batch.row_count),
        }


class MeanDistance(Measure):
    """How far away the attended keys are."""

    columns = (
        Column("distance", "Σ a·|i − j| over text ÷ weight on text", "tokens", _VIG, over_text=True),
        Column("distance_raw", "Σ a·|i − j|, sinks included", "tokens", _VIG),
    )

    def reductions(self, batch: AttentionBatch) -> dict[str, Reduction]:
        among = torch.stack([batch.text, batch.texts.sinks], -1)
        return {"distance": batch.visibility.cached("distance", lambda: Distance(among)), "mass": _mass(batch)}

    def sums(self, batch: AttentionBatch) -> dict[str, Ratio]:
        text, sinks = batch.over_rows(batch.results["distance"]).unbind(-1)
        return {"distance": Ratio(text, _on_text(batch)), "distance_raw": Ratio(text + sinks, batch.row_count)}


class OffsetMass(Measure):
    """The weight at fixed offsets: −1 is the token before."""

    columns = (
        *(
            Column(f"offset_mass{d:+d}", f"a[i, i{d:+d}] ÷ weight on text", "share", _CLARK, False, True)
            for d in _DELTAS
        ),
        *(Column(f"offset_mass{d:+d}_raw", f"a[i, i{d:+d}], sinks included", "share", _CLARK) for d in _DELTAS),
    )

    def reductions(self, batch: AttentionBatch) -> dict[str, Reduction]:
        return {"strongest": _strongest(batch), "mass": _mass(batch)}

    def sums(self, batch: AttentionBatch) -> dict[str, Ratio]:
        offsets, on_text = batch.results["strongest"].near, _on_text(batch)
        on_keys = batch.visibility.cached("text at offsets", lambda: _at_offsets(batch.text.to(offsets.dtype))[:, None])
        raw, text = batch.over_rows(offsets).unbind(-1), batch.over_rows(offsets * on_keys).unbind(-1)
        sums = {f"offset_mass{d:+d}": Ratio(part, on_text) for d, part in zip(_DELTAS, text, strict=True)}
        return sums | {
            f"offset_mass{d:+d}_raw": Ratio(part, batch.row_count) for d, part in zip(_DELTAS, raw, strict=True)
        }


class OffsetHits(Measure):
    """How often the strongest key is at a fixed offset."""

    columns = tuple(
        Column(f"offset_hits{d:+d}", f"rows whose strongest text key is at {d:+d}", "share", _VOITA, abs(d) < 2, True)
        for d in _DELTAS
    )

    def reductions(self, batch: AttentionBatch) -> dict[str, Reduction]:
        return {"strongest": _strongest(batch)}

    def sums(self, batch: AttentionBatch) -> dict[str, Ratio]:
        offsets = batch.results["strongest"].offsets
        hits = torch.zeros(*offsets.shape[:2], 2 * RADIUS + 2, dtype=torch.float64, device=offsets.device)  # last: far
        rows = batch.rows.double().unsqueeze(1).expand(offsets.shape)
        hits.scatter_add_(-1, (offsets + RADIUS).clamp(max=2 * RADIUS + 1), rows)
        return {f"offset_hits{d:+d}": Ratio(hits[..., d + RADIUS], batch.row_count) for d in _DELTAS}


class Sinks(Measure):
    """The weight on sinks, on the first position, on delimiters and on text."""

    columns = (
        Column("text", "weight on text, without special tokens and learned sinks", "share", _GU),
        Column("sink", "weight on the start token and other special tokens", "share", _GU),
        Column("first", "weight on the first position alone", "share", _GU, evidence=True),
        Column("delimiter", "weight on punctuation and line ends ÷ weight on text", "share", _CLARK, True, True),
        Column("delimiter_raw", "weight on punctuation and line ends", "share", _CLARK),
    )

    def reductions(self, batch: AttentionBatch) -> dict[str, Reduction]:
        return {"mass": _mass(batch)}

    def sums(self, batch: AttentionBatch) -> dict[str, Ratio]:
        _, sink, first, delimiter = batch.over_rows(batch.results["mass"]).unbind(-1)
        return {
            "text": Ratio(_on_text(batch), batch.row_count),
            "sink": Ratio(sink, batch.row_count),
            "first": Ratio(first, batch.row_count),
            "delimiter": Ratio(delimiter, _on_text(batch)),
            "delimiter_raw": Ratio(delimiter, batch.row_count),
        }


class HeavyHitters(Measure):
    """How much of the weight on text few keys get."""

    columns = (
        Column(
            "received_top",
            "share of the weight on text that the tenth of text keys with the most weight get",
            "share",
            _H2O,
        ),
    )

    def reductions(self, batch: AttentionBatch) -> dict[str, Reduction]:
        rows = batch.rows[:, None, :, None].float().expand(-1, batch.matrix.shape[1], -1, -1)
        return {"received": TransposedProduct(rows)}

    def sums(self, batch: AttentionBatch) -> dict[str, Ratio]:
        """Received weight is divided by the queries that see the key: early keys have more of them."""
        received = batch.results["received"][..., 0].double() / batch.visibility.queries_per_key.clamp(min=1).unsqueeze(
            1
        )
        received = received * batch.text.unsqueeze(1)
        tenth = (batch.text.sum(-1) * 0.1).ceil().long()
        ordered = received.topk(int(tenth.max()), -1).values
        among = torch.arange(ordered.shape[-1], device=ordered.device) < tenth[:, None]
        return {"received_top": Ratio((ordered * among.unsqueeze(1)).sum(-1), received.sum(-1))}


class Norms(Measure):
    """Norm-weighted attention: a[i, j]·‖v_j W_O‖, normalised over each row."""

    _SHOWN = (-1, 0, 1)
    columns = (
        Column("norm_sink", "as sink, each weight times ‖v_j W_O‖, normalised per row", "share", _KOBAYASHI),
        Column("norm_first", "as first, each weight times ‖v_j W_O‖, normalised per row", "share", _KOBAYASHI),
        Column(
            "norm_delimiter", "as delimiter_raw, each weight times ‖v_j W_O‖, normalised per row", "share", _KOBAYASHI
        ),
        *(
            Column(
                f"norm_offset{d:+d}",
                f"a[i, i{d:+d}], each weight times ‖v_j W_O‖, normalised per row",
                "share",
                _KOBAYASHI,
            )
            for d in (-1, 0, 1)
        ),
    )

    def reductions(self, batch: AttentionBatch) -> dict[str, Reduction]:
        norms = _norms(batch)
        groups = torch.stack([batch.texts.valid, batch.texts.sinks, _first(batch), batch.texts.delimiters], -2)
        norms = norms.unsqueeze(-2) * groups.unsqueeze(1)  # [B, H, 4, S]
        return {"norms": Product(norms.transpose(-1, -2)), "strongest": _strongest(batch)}

    def sums(self, batch: AttentionBatch) -> dict[str, Ratio]:
        """A share of each row; then the mean over rows."""
        total, sink, first, delimiter = batch.results["norms"].unbind(-1)
        scale = 1 / total.clamp(min=1e-30)
        norms = _norms(batch).expand(-1, total.shape[1], -1)
        offsets = batch.results["strongest"].near
        parts = {"norm_sink": sink, "norm_first": first, "norm_delimiter": delimiter}
        parts |= {f"norm_offset{d:+d}": offsets[..., d + RADIUS] * _shifted(norms, d) for d in self._SHOWN}
        return {name: Ratio(batch.over_rows(part * scale), batch.row_count) for name, part in parts.items()}


class Repeats(Measure):
    """On repeated random tokens: the weight on the token's first copy, and on the token after that."""

    columns = (
        Column("induction", "second copy: weight on the token after the same token", "share", _OLSSON, evidence=True),
        Column("duplicate", "second copy: weight on the same token", "share", "as in TransformerLens", evidence=True),
    )

    def reads(self, texts: TextBatch) -> bool:
        return all(piece.period for piece in texts.pieces)

    def reductions(self, batch: AttentionBatch) -> dict[str, Reduction]:
        """None: the few cells are indexed."""
        return {}

    def sums(self, batch: AttentionBatch) -> dict[str, Ratio]:
        """a[i, i − (S − 1)] and a[i, i − S] for the i of the second copy."""
        sums: dict[str, list[Tensor]] = {name: [] for name in REPEATED}
        heads = batch.matrix.shape[1]
        for number, piece in enumerate(batch.texts.pieces):
            start = piece.sinks.index(False)
            rows = torch.arange(start + piece.period, start + 2 * piece.period, device=batch.texts.ids.device)
            all_heads = torch.arange(heads, device=rows.device)[:, None]
            for name, back in (("induction", piece.period - 1), ("duplicate", piece.period)):
                cells = batch.matrix[number, all_heads, rows, rows - back]
                sums[name].append(cells.double().sum(-1))
        counts = torch.tensor([[float(piece.period)] for piece in batch.texts.pieces], dtype=torch.float64)
        counts = counts.to(batch.texts.ids.device).expand(-1, heads)
        return {name: Ratio(torch.stack(parts), counts) for name, parts in sums.items()}


def _strongest(batch: AttentionBatch) -> Strongest:
    """The strongest text key, and the weights on near keys."""
    return batch.visibility.cached("strongest", lambda: Strongest(batch.text, RADIUS))


def _mass(batch: AttentionBatch) -> Product:
    """Masses on text, sinks, the first position and delimiters, in this order."""

    def compute() -> Product:
        groups = torch.stack([batch.text, batch.texts.sinks, _first(batch), batch.texts.delimiters & batch.text], -1)
        return Product(groups.unsqueeze(1).float())

    return batch.visibility.cached("mass", compute)


def _first(batch: AttentionBatch) -> Tensor:
    first = torch.zeros_like(batch.texts.valid)
    first[:, 0] = True
    return first & batch.texts.valid


def _on_text(batch: AttentionBatch) -> Tensor:
    """The weight on text, summed over rows: the denominator of scores without sinks."""
    return batch.over_rows(batch.results["mass"][..., 0])


def _norms(batch: AttentionBatch) -> Tensor:
    """The norms [B, 1 or H, S]: ones for uniform attention, NaN where the output projection is unknown."""
    if batch.norms is not None:
        return batch.norms
    is_uniform = batch.value is None and batch.out_weight is None
    fill = 1.0 if is_uniform else torch.nan
    return torch.full_like(batch.texts.valid, fill, dtype=torch.float32).unsqueeze(1)


def _shifted(values: Tensor, d: int) -> Tensor:
    """values[..., i + d] at position i; 0 where there is no such position."""
    shifted = torch.zeros_like(values)
    size = values.shape[-1]
    if abs(d) < size:
        shifted[..., max(0, -d) : size - max(0, d)] = values[..., max(0, d) : size + min(0, d)]
    return shifted


def _at_offsets(values: Tensor) -> Tensor:
    """[B, S] → [B, L, 2·RADIUS + 1]: the value at each offset from each position."""
    return torch.stack([_shifted(values, d) for d in _DELTAS], -1)
