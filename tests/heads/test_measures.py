"""Measures against their definitions on dense matrices."""

import math

import pytest
import torch
from torch import Tensor

from headscope import AttentionMatrix, masks
from headscope.heads.atlas.measuring import _mask_key, columns_of
from headscope.heads.corpus import Piece, TextBatch, batches
from headscope.heads.measures import AttentionBatch, Column, Measure, Ratio, Visibility, standard, take
from headscope.heads.measures.products import Distance
from headscope.ops.kernels import tiles
from headscope.ops.reductions import Block, Reduction
from tests.options import one_thread  # noqa: F401  (for the whole module)

HEADS, SIZE = 6, 5


def piece(length: int, *, end: bool, name: str = "a", half: int = 0, period: int = 0) -> Piece:
    """A text with a start token, and an end token if wanted; every fifth token is a delimiter."""
    sinks = tuple(i == 0 or (end and i == length - 1) for i in range(length))
    delimiters = tuple(i % 5 == 4 and not sinks[i] for i in range(length))
    return Piece(tuple(range(length)), sinks, delimiters, name, half, period=period)


def batch_of(*lengths: int, end: bool = False) -> TextBatch:
    (batch,) = batches([piece(n, end=end, name=f"doc {n}") for n in lengths], tokens=1 << 30)
    return batch


def attention_of(batch: TextBatch, mask: masks.Mask | None, seed: int = 0) -> AttentionBatch:
    random = torch.Generator().manual_seed(seed)
    rows, length = batch.ids.shape
    query, key, value = (torch.randn(rows, n, length, SIZE, generator=random) for n in (HEADS, 3, 3))
    weight = torch.randn(11, HEADS * SIZE, generator=random)
    return AttentionBatch(AttentionMatrix(2 * query, key, mask=mask), Visibility(batch, mask, HEADS), value, weight)


def values(ratios: dict[str, Ratio]) -> dict[str, Tensor]:
    """Each measure over the batch: [H]."""
    return {name: ratio.numerator.sum(0) / ratio.denominator.sum(0) for name, ratio in ratios.items()}


def by_definition(attention: AttentionBatch) -> dict[str, Tensor]:
    """Every pattern measure from the dense matrix, cell by cell where that is clearest."""
    p = attention.matrix.dense().double()
    rows, heads, length, _ = p.shape
    text = attention.texts.valid & ~attention.texts.sinks
    visible = Visibility(attention.texts, attention.visibility.mask, HEADS).uniform.dense()[:, 0] > 0  # [B, L, S]
    index = torch.arange(length)
    sums: dict[str, Tensor] = {}
    norms = []
    weight = attention.out_weight.double().unflatten(1, (HEADS, SIZE))
    for h in range(heads):
        norms.append((attention.value.double()[:, h // 2] @ weight[:, h].T).norm(dim=-1))
    norm = torch.stack(norms, 1)

    def add(name: str, value: Tensor | float) -> None:
        sums[name] = sums.get(name, torch.zeros(heads, dtype=torch.float64)) + value

    for b in range(rows):
        received = torch.zeros(heads, length, dtype=torch.float64)
        queries_per_key = torch.zeros(length, dtype=torch.float64)
        for i in range(length):
            if not text[b, i] or int((visible[b, i] & text[b]).sum()) < 2:
                continue
            a = p[b, :, i]
            on_text = a * text[b]
            add("rows", 1.0)
            add("on_text", on_text.sum(-1))
            add("entropy", -torch.xlogy(a, a).sum(-1))
            add("possible", math.log(int(visible[b, i].sum())))
            add("confidence", on_text.amax(-1))
            add("confidence_raw", a.amax(-1))
            add("distance", (on_text * (index - i).abs()).sum(-1))
            add("distance_raw", (a * (index - i).abs()).sum(-1))
            add("text", (a * text[b]).sum(-1))
            add("sink", (a * (attention.texts.sinks & attention.texts.valid)[b]).sum(-1))
            add("first", a[:, 0])
            add("delimiter", (a * attention.texts.delimiters[b]).sum(-1))
            carried = a * norm[b]
            carried = carried / carried.sum(-1, keepdim=True)
            add("norm_sink", (carried * attention.texts.sinks[b]).sum(-1))
            add("norm_first", carried[:, 0])
            add("norm_delimiter", (carried * attention.texts.delimiters[b]).sum(-1))
            for d in range(-8, 9):
                if 0 <= i + d < length:
                    add(f"offset_mass{d:+d}", on_text[:, i + d])
                    add(f"offset_mass{d:+d}_raw", a[:, i + d])
                    add(f"offset_hits{d:+d}", (on_text.argmax(-1) == i + d).double())
                    if abs(d) < 2:
                        add(f"norm_offset{d:+d}", carried[:, i + d])
            received += a
            queries_per_key += visible[b, i]
        shares = torch.where(text[b], received / queries_per_key.clamp(min=1), 0)
        tenth = math.ceil(0.1 * int(text[b].sum()) - 1e-9)
        add("received_top", shares.sort(-1, descending=True).values[:, :tenth].sum(-1))
        add("received", shares.sum(-1))
    over = {"confidence": "on_text", "distance": "on_text", "entropy_share": "possible", "received_top": "received"}
    over |= {f"offset_mass{d:+d}": "on_text" for d in range(-8, 9)}
    sums["delimiter_raw"], sums["entropy_share"] = sums["delimiter"], sums["entropy"]
    over["delimiter"] = "on_text"
    helpers = {"rows", "on_text", "possible", "received"}
    return {name: value / sums[over.get(name, "rows")] for name, value in sums.items() if name not in helpers}


@pytest.mark.parametrize("kind", ["decoder", "encoder", "window", "alone"])
@pytest.mark.parametrize("blocks", ["whole", "small", "short"])
def test_every_measure_is_its_definition(kind: str, blocks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if blocks == "small":  # some rows, and 128 keys in a block: texts of 300 tokens cross several
        monkeypatch.setattr(tiles, "_BLOCK", 1 << 12)
        monkeypatch.setattr(tiles, "_ROWS", 64)
    lengths = {"whole": [23, 17, 9], "small": [300, 170, 9], "short": [14, 9, 5]}[blocks]
    lengths = lengths[:1] if kind == "alone" else lengths
    batch = batch_of(*lengths, end=kind == "encoder")
    mask = masks.padding(lengths)
    mask = {"decoder": mask & masks.causal(), "encoder": mask, "window": mask & masks.sliding_window(6)}.get(
        kind, masks.causal()
    )
    attention = attention_of(batch, mask)
    actual, wanted = values(take(standard(), attention)), by_definition(attention)
    assert set(wanted) == {column.name for column in columns_of(standard())} - {"induction", "duplicate"}
    for name, value in wanted.items():
        torch.testing.assert_close(actual[name], value, atol=2e-5, rtol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_distance_is_exact_far_into_a_text() -> None:
    """At position 60,000 float32 has two digits after the point."""
    length, random = 60_000, torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 1, 500, 3, generator=random), torch.randn(1, 1, length, 3, generator=random)
    matrix = AttentionMatrix(query, key, mask=masks.sliding_window(4))
    (distance,) = matrix.reduce(Distance(torch.ones(1, length, 1, dtype=torch.bool)))
    offsets = torch.arange(-4, 5).abs().double()
    torch.testing.assert_close(distance[..., 0].double(), matrix.offsets(4).double() @ offsets, atol=3e-4, rtol=0)


def test_layers_with_equal_masks_share_a_visibility() -> None:
    """Each layer has a mask object of its own; what depends on it is computed once for equal masks."""
    equal = [masks.causal(), masks.causal() & masks.padding([5, 7]), masks.dense(torch.eye(9).bool()), None]
    again = [masks.causal(), masks.causal() & masks.padding([5, 7]), masks.dense(torch.eye(9).bool()), None]
    assert [_mask_key(mask) for mask in equal] == [_mask_key(mask) for mask in again]
    others = [masks.sliding_window(4), masks.causal() & masks.padding([5, 6]), masks.dense(torch.ones(9, 9).bool())]
    assert len({_mask_key(mask) for mask in equal + others}) == 7


def test_measures_of_a_text_do_not_depend_on_padding_or_other_texts() -> None:
    batch = batch_of(23, 17, end=True)
    attention = attention_of(batch, masks.padding([23, 17]))
    alone = batch_of(17, end=True)
    cut = AttentionMatrix(attention.matrix._scores.query[1:, :, :17], attention.matrix._scores.key[1:, :, :17])
    single = AttentionBatch(cut, Visibility(alone, None, HEADS), attention.value[1:, :, :17], attention.out_weight)
    both, one = take(standard(), attention), take(standard(), single)
    for name, ratio in one.items():
        torch.testing.assert_close(both[name].numerator[1:], ratio.numerator, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(both[name].denominator[1:], ratio.denominator, atol=1e-4, rtol=1e-5)


def test_nulls_are_the_values_of_uniform_attention() -> None:
    batch = batch_of(30)
    visibility = Visibility(batch, masks.causal(), HEADS)
    nulls = values(take(standard(), AttentionBatch(visibility.uniform, visibility)))
    visible = torch.arange(2, 30, dtype=torch.float64) + 1  # row 1 sees one text key only and does not count
    torch.testing.assert_close(nulls["entropy"], visible.log().mean()[None], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(nulls["entropy_share"], torch.ones(1).double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(nulls["first"], (1 / visible).mean()[None], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(nulls["norm_first"], nulls["first"], atol=1e-6, rtol=1e-5)


class FarMass(Reduction):
    def start(self, shape: tuple[int, int, int, int], like: Tensor) -> Tensor:
        return like.new_zeros(shape[:3])

    def update(self, state: Tensor, block: Block) -> None:
        state[block.at] += (block.weights * (block.q_idx - block.kv_idx > 4)).sum(-1)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.float32, torch.float64])
def test_over_rows_counts_exactly_in_every_dtype(dtype: torch.dtype) -> None:
    attention = attention_of(batch_of(301), masks.causal())
    ones = torch.ones(attention.matrix.shape[:3], dtype=dtype)
    total = attention.over_rows(ones)
    assert total.dtype == torch.float64
    assert total.tolist() == [[299.0] * HEADS]  # which bfloat16 does not have


class Far(Measure):
    columns = (Column("far", "weight on keys more than 4 tokens back"),)

    def reductions(self, batch: AttentionBatch) -> dict[str, Reduction]:
        return {"far": FarMass()}

    def sums(self, batch: AttentionBatch) -> dict[str, Ratio]:
        return {"far": Ratio(batch.over_rows(batch.results["far"]), batch.row_count)}


def test_take_computes_a_measure_of_ones_own() -> None:
    attention = attention_of(batch_of(23), masks.causal())
    p, index = attention.matrix.dense().double(), torch.arange(23)
    wanted = (p * (index[:, None] - index > 4)).sum(-1)[:, :, 2:].mean((0, 2))
    torch.testing.assert_close(values(take([*standard(), Far()], attention))["far"], wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="two measures have a column 'far'"):
        columns_of([Far(), Far()])


def test_norms_are_nan_without_an_output_projection() -> None:
    attention = attention_of(batch_of(23), masks.causal())
    actual = values(take(standard(), AttentionBatch(attention.matrix, attention.visibility, attention.value, None)))
    assert actual["norm_sink"].isnan().all()
    assert not actual["sink"].isnan().any()
