"""The measures that every atlas holds; docs/heads.md says what each is for."""

from __future__ import annotations

import torch
from torch import Tensor

from headscope.heads.corpus import Batch
from headscope.heads.measures.measure import Column, Measure, Page, Ratio
from headscope.heads.measures.products import Distance, Product
from headscope.heads.measures.strongest import Strongest
from headscope.ops.reductions import Entropy, Reduction, TransposedProduct

__all__ = ["RADIUS", "REPEATED", "standard"]

REPEATED = ("induction", "duplicate")  # the columns that repeated random tokens give
RADIUS = 8  # offsets from −8 to +8
_CLARK, _VOITA, _VIG, _GU = "arXiv 1906.04341", "arXiv 1905.09418", "arXiv 1906.04284", "arXiv 2410.10781"
_H2O, _KOBAYASHI, _OLSSON = "arXiv 2306.14048", "arXiv 2004.10102", "arXiv 2209.11895"
_DELTAS = range(-RADIUS, RADIUS + 1)


def standard() -> tuple[Measure, ...]:
    """Entropy, confidence, distance, offsets, sinks, received, norm-weighted mass, induction and duplicates."""
    return (Spread(), Confidence(), MeanDistance(), OffsetMass(), OffsetHits(), Sinks(), Heavy(), Norms(), Repeats())


class Spread(Measure):
    """How evenly a head looks."""

    columns = (
        Column("entropy", "−Σ a ln a, mean over rows", "nats", _CLARK),
        Column("entropy_share", "Σ entropy ÷ Σ ln n, n the number of visible keys", "share", _CLARK, evidence=True),
    )

    def questions(self, page: Page) -> dict[str, Reduction]:
        """The entropy of every row."""
        return {"entropy": Entropy()}

    def sums(self, page: Page) -> dict[str, Ratio]:
        """Rows that may see one key only cannot choose, and do not count."""
        total = page.over_rows(page.answers["entropy"])
        possible = page.over_rows(page.seen.keys.clamp(min=1).log().unsqueeze(1)).expand_as(total)
        return {"entropy": Ratio(total, page.count), "entropy_share": Ratio(total, possible)}


class Confidence(Measure):
    """How much the strongest key gets."""

    columns = (
        Column("confidence", "largest weight on text ÷ weight on text", "share", _VOITA, over_text=True),
        Column("confidence_raw", "largest weight, sinks included", "share", _VOITA),
    )

    def questions(self, page: Page) -> dict[str, Reduction]:
        """The largest weights, with sinks and without."""
        return {"strongest": _strongest(page), "mass": _mass(page)}

    def sums(self, page: Page) -> dict[str, Ratio]:
        """Over the weight on text, and over rows."""
        text, _, others, _ = page.answers["strongest"]
        raw = page.over_rows(torch.maximum(text, others))
        return {"confidence": Ratio(page.over_rows(text), _on_text(page)), "confidence_raw": Ratio(raw, page.count)}


class MeanDistance(Measure):
    """How far a head looks."""

    columns = (
        Column("distance", "Σ a·|i − j| over text ÷ weight on text", "tokens", _VIG, over_text=True),
        Column("distance_raw", "Σ a·|i − j|, sinks included", "tokens", _VIG),
    )

    def questions(self, page: Page) -> dict[str, Reduction]:
        """Mean distances, with sinks and without."""
        among = torch.stack([page.text, page.batch.sinks], -1)
        return {"distance": page.seen.once("distance", lambda: Distance(among)), "mass": _mass(page)}

    def sums(self, page: Page) -> dict[str, Ratio]:
        """The raw one adds what lies on sinks."""
        text, sinks = page.over_rows(page.answers["distance"]).unbind(-1)
        return {"distance": Ratio(text, _on_text(page)), "distance_raw": Ratio(text + sinks, page.count)}


class OffsetMass(Measure):
    """The weight at fixed distances: −1 is the token before."""

    columns = (
        *(
            Column(f"offset_mass{d:+d}", f"a[i, i{d:+d}] ÷ weight on text", "share", _CLARK, False, True)
            for d in _DELTAS
        ),
        *(Column(f"offset_mass{d:+d}_raw", f"a[i, i{d:+d}], sinks included", "share", _CLARK) for d in _DELTAS),
    )

    def questions(self, page: Page) -> dict[str, Reduction]:
        """The diagonals, which the search for the strongest key reads."""
        return {"strongest": _strongest(page), "mass": _mass(page)}

    def sums(self, page: Page) -> dict[str, Ratio]:
        """Each diagonal, with what lies on sinks and without."""
        offsets, on_text = page.answers["strongest"].near, _on_text(page)
        kept = page.seen.once("text at offsets", lambda: _at_offsets(page.text.to(offsets.dtype))[:, None])
        raw, text = page.over_rows(offsets).unbind(-1), page.over_rows(offsets * kept).unbind(-1)
        found = {f"offset_mass{d:+d}": Ratio(part, on_text) for d, part in zip(_DELTAS, text, strict=True)}
        return found | {f"offset_mass{d:+d}_raw": Ratio(part, page.count) for d, part in zip(_DELTAS, raw, strict=True)}


class OffsetHits(Measure):
    """How often the strongest key stands at a fixed distance."""

    columns = tuple(
        Column(f"offset_hits{d:+d}", f"rows whose strongest text key is at {d:+d}", "share", _VOITA, abs(d) < 2, True)
        for d in _DELTAS
    )

    def questions(self, page: Page) -> dict[str, Reduction]:
        """The strongest key that is text, if it is near; where two share the largest weight there is none."""
        return {"strongest": _strongest(page)}

    def sums(self, page: Page) -> dict[str, Ratio]:
        """Rows, not weights, are counted: a hit is a hit."""
        apart = page.answers["strongest"].offsets
        hits = torch.zeros(*apart.shape[:2], 2 * RADIUS + 2, dtype=torch.float64, device=apart.device)  # the last: far
        rows = page.rows.double().unsqueeze(1).expand(apart.shape)
        hits.scatter_add_(-1, (apart + RADIUS).clamp(max=2 * RADIUS + 1), rows)
        return {f"offset_hits{d:+d}": Ratio(hits[..., d + RADIUS], page.count) for d in _DELTAS}


class Sinks(Measure):
    """What rests on positions that mean nothing, or little."""

    columns = (
        Column("text", "weight on text, without special tokens and learned sinks", "share", _GU),
        Column("sink", "weight on the start token and other special tokens", "share", _GU),
        Column("first", "weight on the first position alone", "share", _GU, evidence=True),
        Column("delimiter", "weight on punctuation and line ends ÷ weight on text", "share", _CLARK, True, True),
        Column("delimiter_raw", "weight on punctuation and line ends", "share", _CLARK),
    )

    def questions(self, page: Page) -> dict[str, Reduction]:
        """Masses on groups of keys."""
        return {"mass": _mass(page)}

    def sums(self, page: Page) -> dict[str, Ratio]:
        """Each mass over rows; delimiters also over the weight on text."""
        _, sink, first, delimiter = page.over_rows(page.answers["mass"]).unbind(-1)
        return {
            "text": Ratio(_on_text(page), page.count),
            "sink": Ratio(sink, page.count),
            "first": Ratio(first, page.count),
            "delimiter": Ratio(delimiter, _on_text(page)),
            "delimiter_raw": Ratio(delimiter, page.count),
        }


class Heavy(Measure):
    """Whether few keys get most of what is given."""

    columns = (
        Column(
            "received_top",
            "share of the weight on text that the tenth of text keys with the most weight get",
            "share",
            _H2O,
        ),
    )

    def questions(self, page: Page) -> dict[str, Reduction]:
        """What each key gets from the rows that count."""
        rows = page.rows[:, None, :, None].float().expand(-1, page.matrix.shape[1], -1, -1)
        return {"received": TransposedProduct(rows)}

    def sums(self, page: Page) -> dict[str, Ratio]:
        """The mean over the queries that may see a key makes early and late keys equal."""
        received = page.answers["received"][..., 0].double() / page.seen.lookers.clamp(min=1).unsqueeze(1)
        received = received * page.text.unsqueeze(1)
        tenth = (page.text.sum(-1) * 0.1).ceil().long()
        ordered = received.topk(int(tenth.max()), -1).values
        among = torch.arange(ordered.shape[-1], device=ordered.device) < tenth[:, None]
        return {"received_top": Ratio((ordered * among.unsqueeze(1)).sum(-1), received.sum(-1))}


class Norms(Measure):
    """What a weight carries: a[i, j]·‖v_j W_O‖, normalised over each row, beside the raw masses."""

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

    def questions(self, page: Page) -> dict[str, Reduction]:
        """Products with the norms of the keys' values."""
        norms = _norms(page)
        groups = torch.stack([page.batch.valid, page.batch.sinks, _first(page), page.batch.delimiters], -2)
        norms = norms.unsqueeze(-2) * groups.unsqueeze(1)  # [B, H, 4, S]
        return {"norms": Product(norms.transpose(-1, -2)), "strongest": _strongest(page)}

    def sums(self, page: Page) -> dict[str, Ratio]:
        """Row by row a share; then the mean over rows."""
        whole, sink, first, delimiter = page.answers["norms"].unbind(-1)
        scale = 1 / whole.clamp(min=1e-30)
        norms = _norms(page).expand(-1, whole.shape[1], -1)
        offsets = page.answers["strongest"].near
        found = {"norm_sink": sink, "norm_first": first, "norm_delimiter": delimiter}
        found |= {f"norm_offset{d:+d}": offsets[..., d + RADIUS] * _shifted(norms, d) for d in self._SHOWN}
        return {name: Ratio(page.over_rows(part * scale), page.count) for name, part in found.items()}


class Repeats(Measure):
    """On random tokens that come twice: does a head find what came after the first, or the first itself?"""

    columns = (
        Column("induction", "second copy: weight on the token after the same token", "share", _OLSSON, evidence=True),
        Column("duplicate", "second copy: weight on the same token", "share", "as in TransformerLens", evidence=True),
    )

    def reads(self, batch: Batch) -> bool:
        """Repeated texts alone."""
        return all(piece.period for piece in batch.pieces)

    def questions(self, page: Page) -> dict[str, Reduction]:
        """Nothing in the pass: the few cells are read one by one."""
        return {}

    def sums(self, page: Page) -> dict[str, Ratio]:
        """a[i, i − (S − 1)] and a[i, i − S] for the i of the second copy."""
        found: dict[str, list[Tensor]] = {"induction": [], "duplicate": []}
        heads = page.matrix.shape[1]
        for number, piece in enumerate(page.batch.pieces):
            start = piece.sinks.index(False)
            rows = torch.arange(start + piece.period, start + 2 * piece.period, device=page.batch.ids.device)
            every = torch.arange(heads, device=rows.device)[:, None]
            for name, back in (("induction", piece.period - 1), ("duplicate", piece.period)):
                cells = page.matrix[number, every, rows, rows - back]
                found[name].append(cells.double().sum(-1))
        counts = torch.tensor([[float(piece.period)] for piece in page.batch.pieces], dtype=torch.float64)
        counts = counts.to(page.batch.ids.device).expand(-1, heads)
        return {name: Ratio(torch.stack(parts), counts) for name, parts in found.items()}


def _strongest(page: Page) -> Strongest:
    """The strongest key that is text, and what lies on the keys around each row."""
    return page.seen.once("strongest", lambda: Strongest(page.text, RADIUS))


def _mass(page: Page) -> Product:
    """Masses on text, sinks, the first position and delimiters, in this order."""

    def make() -> Product:
        groups = torch.stack([page.text, page.batch.sinks, _first(page), page.batch.delimiters & page.text], -1)
        return Product(groups.unsqueeze(1).float())

    return page.seen.once("mass", make)


def _first(page: Page) -> Tensor:
    first = torch.zeros_like(page.batch.valid)
    first[:, 0] = True
    return first & page.batch.valid


def _on_text(page: Page) -> Tensor:
    """The weight on text, summed over rows: what scores without sinks are shares of."""
    return page.over_rows(page.answers["mass"][..., 0])


def _norms(page: Page) -> Tensor:
    """The norms [B, 1 or H, S]; ones where they are not known, NaN so that nobody takes them for known."""
    if page.norms is not None:
        return page.norms
    known = page.value is None and page.out_weight is None  # the uniform head: every value writes as much
    fill = 1.0 if known else torch.nan
    return torch.full_like(page.batch.valid, fill, dtype=torch.float32).unsqueeze(1)


def _shifted(values: Tensor, d: int) -> Tensor:
    """values[..., i + d] at i; 0 where there is no such position."""
    moved = torch.zeros_like(values)
    size = values.shape[-1]
    if abs(d) < size:
        moved[..., max(0, -d) : size - max(0, d)] = values[..., max(0, d) : size + min(0, d)]
    return moved


def _at_offsets(values: Tensor) -> Tensor:
    """[B, S] → [B, L, 2·RADIUS + 1]: the value at each offset from each position."""
    return torch.stack([_shifted(values, d) for d in _DELTAS], -1)
