"""Facts that papers report of other models hold for the two pulled models, measured by our own tools."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
import torch
from torch import Tensor

from headscope import HeadAtlas, Plan, ablate, edit, profile
from headscope.heads import corpus
from headscope.heads.atlas.measuring import measure
from headscope.heads.measures import standard
from headscope.heads.roles import Evidence
from headscope.models.loading import Loaded
from headscope.watching.edits import knock_out
from tests.options import one_thread  # noqa: F401  (for the whole module)

pytestmark = pytest.mark.slow
Head = tuple[int, int]
PLAN = Plan(length=128, repeats=4, worth=0)


@pytest.fixture(scope="module")
def decoder(smollm2: Loaded) -> HeadAtlas:
    return profile(smollm2, texts=corpus.default_documents(4), plan=PLAN)


@pytest.fixture(scope="module")
def encoder(minilm: Loaded) -> HeadAtlas:
    return profile(minilm, texts=corpus.default_documents(4), plan=PLAN)


def shipped(name: str) -> HeadAtlas:
    return HeadAtlas.load(Path(str(resources.files("headscope.heads.atlas") / "shipped" / f"{name}.parquet")))


def heads_of(rows: Sequence[Evidence], role: str) -> list[Head]:
    return [(row.layer, row.head) for row in rows if row.role == role]


def losses(loaded: Loaded, pieces: Sequence[corpus.Piece], without: Sequence[Head] = ()) -> tuple[float, float]:
    """Nats per token on the first copy of random tokens, and on the second from its second token on."""
    ids = torch.tensor([piece.ids for piece in pieces])
    with torch.no_grad(), edit(loaded.model, *(ablate(*head) for head in without)) if without else nullcontext():
        logs = loaded.model(ids, use_cache=False).logits.log_softmax(-1)
    loss = -logs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    period = pieces[0].period
    return float(loss[:, :period].mean()), float(loss[:, period + 1 :].mean())


def induction(loaded: Loaded, pieces: Sequence[corpus.Piece], *edits: object) -> Tensor:
    with edit(loaded.model, *edits) if edits else nullcontext():
        return measure(loaded, pieces, [m for m in standard() if m.columns[0].name == "induction"]).sums.value(
            "induction"
        )


def test_induction_heads_predict_the_second_copy_of_random_tokens(smollm2: Loaded, decoder: HeadAtlas) -> None:
    """Olsson et al. 2022, arXiv 2209.11895: without them the second copy of random tokens is hard to predict."""
    heads = heads_of(decoder.roles(), "induction")
    assert 4 <= len(heads) <= 20
    assert {(18, 6), (17, 3), (17, 5), (17, 4)} <= set(heads)
    pieces = corpus.repeats(smollm2, count=2, period=50, seed=11)  # other tokens than those that picked the heads
    first, second = losses(smollm2, pieces)
    assert second < 0.3 * first  # the second copy is easy
    first_without, second_without = losses(smollm2, pieces, heads)
    assert first_without == pytest.approx(first, rel=0.03)  # the first copy does not need them
    others = [(layer, (head + 1) % 9) for layer, head in heads if (layer, (head + 1) % 9) not in heads]
    assert len(others) >= 4
    assert second_without - second > 0.75 * (first - second)  # the second copy does
    assert losses(smollm2, pieces, others)[1] - second < 0.1 * (first - second)  # and needs no neighbours of them


def test_induction_heads_need_a_previous_token_head_below(smollm2: Loaded, decoder: HeadAtlas) -> None:
    """The same paper: they find a token by the token before it, which another head wrote there."""
    rows = decoder.roles()
    heads, before = heads_of(rows, "induction"), heads_of(rows, "previous token")
    first = min(layer for layer, _ in heads)
    below = [head for head in before if head[0] < first]
    assert below == [(16, 0)]
    pieces = corpus.repeats(smollm2, count=1, period=50, seed=12)
    whole = induction(smollm2, pieces)
    without = induction(smollm2, pieces, ablate(*below[0]))
    links = [knock_out(query=i, key=i - 1, layers=[16], heads=[0]) for i in range(2, 51)]
    blind = induction(smollm2, pieces, *links)  # the head below writes, but not from the token before
    others = [induction(smollm2, pieces, ablate(16, head)) for head in (1, 7)]
    in_first = [head for head in heads if head[0] == first]
    assert len(in_first) >= 3
    for head in in_first:
        assert whole[head] > 0.4
        assert without[head] < 0.1
        assert blind[head] < 0.1
        assert all(other[head] > 0.8 * whole[head] for other in others)


def test_the_first_token_is_the_sink_of_most_heads_in_later_layers(decoder: HeadAtlas) -> None:
    """Gu et al. 2025, arXiv 2410.10781: sinks above 0.3 are all over a decoder, and hardly in its first layers."""
    first = decoder.value("first")
    assert float((first[12:] > 0.3).double().mean()) > 0.6
    assert float((first[:3] > 0.3).double().mean()) < 0.1


def test_a_sink_is_a_position_and_not_a_token(smollm2: Loaded) -> None:
    """Xiao et al. 2024, arXiv 2309.17453: whatever token comes first, it is the sink."""
    text = corpus.default_documents(6)[1]
    (piece,) = corpus.cut(smollm2, text, 0, length=128, most=1)
    measures = [m for m in standard() if any(c.name == "first" for c in m.columns)]

    def first_weight(ids: tuple[int, ...]) -> Tensor:
        return measure(smollm2, [replace(piece, ids=ids)], measures).sums.value("first")

    usual, another = first_weight(piece.ids), first_weight((5000, *piece.ids[1:]))
    strong = usual > 0.5
    assert int(strong.sum()) > 50
    assert float(another[strong].median()) > 0.3


def test_weight_on_a_sink_carries_little(decoder: HeadAtlas, encoder: HeadAtlas) -> None:
    """Kobayashi et al. 2020, arXiv 2004.10102: special tokens get weight, and their values are small."""
    for atlas, least, factor in ((decoder, 0.5, 0.75), (encoder, 0.2, 0.25)):
        weight, carried = atlas.value("sink"), atlas.value("norm_sink")
        strong = weight > least
        assert int(strong.sum()) >= 8
        assert bool((carried[strong] < weight[strong]).all())
        assert float(carried[strong].mean()) < factor * float(weight[strong].mean())


def test_heads_of_a_bert_are_nearly_uniform_in_its_first_layer(encoder: HeadAtlas) -> None:
    """Clark et al. 2019, arXiv 1906.04341: near-uniform heads in the lowest layers, and again in the last."""
    uniformity = encoder.value("entropy_share").mean(1)
    assert int(uniformity.argmin()) in (1, 2)
    assert float(uniformity[0]) > 0.7
    assert float(uniformity[-1]) > 0.7


def test_few_tokens_receive_most_attention(decoder: HeadAtlas) -> None:
    """Zhang et al. 2023, arXiv 2306.14048: heavy hitters, in nearly every head."""
    assert float((decoder.value("received_top") > 0.4).double().mean()) > 0.8


@pytest.mark.parametrize("name", ["smollm2", "minilm"])
def test_ablation_of_most_heads_costs_little(name: str) -> None:
    """Michel et al. 2019, arXiv 1905.10650: of most heads hardly anything is missed; a few cost much."""
    worth = shipped(name).value("ablation_zero").flatten()
    assert float(worth.median()) < {"smollm2": 0.05, "minilm": 0.2}[name] * float(worth.max())
    assert float((worth > 0.25 * worth.max()).double().mean()) < 0.25


def test_gradient_and_ablation_agree_on_importance() -> None:
    """The same paper: its estimate from one backward pass stands for removing each head."""
    assert shipped("smollm2").agreement() > 0.8
