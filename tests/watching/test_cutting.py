"""Any cut of a text into prefill, chunks, steps and rejected drafts is one run with the rows of one forward."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from headscope import MultiHeadAttention, masks
from headscope.nn.cache import KVCache
from headscope.watching.edits import edit, knock_out
from headscope.watching.recording import Recording, record
from tests.reports.test_recording import SLOTS, Preallocated, Rounding
from tests.tiny import bart, llama, mistral
from tests.watching.zoo.reference import eager_maps

Plan = list[tuple[int, int]]
"""Parts of a text: how many tokens each has, and how many more (drafts) are run with it and rejected."""

PLANS = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=6)


class Decoder:
    """A transformers model; drafts are cropped off its cache."""

    def __init__(self, model: nn.Module, cache: Any, drafts: bool = True, window: bool = False) -> None:
        self.model, self.cache, self.drafts = model, cache, drafts
        self.crops = window
        if window:
            for layer in cache.layers:
                layer.activate_past_recording()

    def run(self, text: Tensor, rejected: int) -> None:
        self.model(text, past_key_values=self.cache, use_cache=True)
        if rejected or self.crops:
            self.cache.crop(-rejected)

    def maps(self, text: Tensor) -> list[Tensor]:
        return eager_maps(self.model, {"input_ids": text})


class EncoderDecoder(Decoder):
    """Whose decoder also attends to another text, whose keys come from the cache after the first time."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, None)
        self.source = torch.arange(5, 12).repeat(2, 1)
        self.states = model.get_encoder()(self.source)

    def run(self, text: Tensor, rejected: int) -> None:
        output = self.model(encoder_outputs=self.states, decoder_input_ids=text, past_key_values=self.cache)
        self.cache = output.past_key_values
        if rejected:
            self.cache.self_attention_cache.crop(-rejected)

    def maps(self, text: Tensor) -> list[Tensor]:
        return eager_maps(self.model, {"input_ids": self.source, "decoder_input_ids": text})[2:]


class Layer:
    """One layer of ours or of somebody's, on vectors in place of tokens; drafts are written over."""

    drafts = True

    def __init__(self, ours: bool) -> None:
        torch.manual_seed(0)
        self.table, self.length = torch.randn(99, 12), 0
        self.model = MultiHeadAttention(12, 3) if ours else Preallocated()
        self.cache = KVCache(SLOTS)
        if not ours:
            self.model.run(torch.randn(2, SLOTS, 12), SLOTS)

    def run(self, text: Tensor, rejected: int) -> None:
        x = self.table[text]
        if isinstance(self.model, Preallocated):
            self.model(x, torch.arange(self.length, self.length + x.shape[1]))
        else:
            self.model(x, mask=masks.causal(), cache=self.cache)
            self.cache.truncate(self.cache.length - rejected)
        self.length += x.shape[1] - rejected

    def maps(self, text: Tensor) -> list[Tensor]:
        x = self.table[text]
        own = isinstance(self.model, Preallocated)
        return [self.model.weights(x) if own else self.model.matrix(x, mask=masks.causal()).dense()]


MODELS = {"llama": llama(), "mistral": mistral(4), "bart": bart()}
KINDS: dict[str, Any] = {
    "growing cache": lambda: Decoder(MODELS["llama"], DynamicCache()),
    "preallocated cache": lambda: Decoder(MODELS["llama"], StaticCache(MODELS["llama"].config, SLOTS), drafts=False),
    "sliding window": lambda: Decoder(MODELS["mistral"], DynamicCache(config=MODELS["mistral"].config), window=True),
    "sliding window, preallocated": lambda: Decoder(
        MODELS["mistral"], StaticCache(MODELS["mistral"].config, SLOTS), drafts=False
    ),
    "encoder and decoder": lambda: EncoderDecoder(MODELS["bart"]),
    "cache that holds an older text": lambda: Layer(ours=False),
    "our own cache": lambda: Layer(ours=True),
}


def cut(kind: Any, plan: Plan, *edits: Any) -> tuple[Recording, Tensor]:
    """A recording of the plan, and the text that stays."""
    generator = torch.Generator().manual_seed(len(plan))
    parts = []
    with edit(kind.model, *edits), record(kind.model) as recording:
        for number, (tokens, drafts) in enumerate(plan):
            rejected = drafts if kind.drafts and number + 1 < len(plan) else 0
            text = torch.randint(3, 50, (2, tokens), generator=generator)
            kind.run(torch.cat([text, torch.randint(50, 99, (2, rejected), generator=generator)], 1), rejected)
            parts.append(text)
    return recording, torch.cat(parts, 1)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=10, deadline=None)
@given(plan=PLANS)
@torch.no_grad()
def test_any_cut_of_a_text_is_one_run_with_the_rows_of_one_forward(name: str, plan: Plan) -> None:
    kind = KINDS[name]()
    recording, text = cut(kind, plan)
    assert len(recording.runs) == 1
    for matrix, wanted in zip(recording, kind.maps(text), strict=True):
        torch.testing.assert_close(matrix.dense(), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=10, deadline=None)
@given(plan=PLANS, row=st.integers(1, 20))
@torch.no_grad()
def test_knock_out_hits_its_position_in_any_cut_of_a_text(name: str, plan: Plan, row: int) -> None:
    kind = KINDS[name]()
    row = min(row, sum(tokens for tokens, _ in plan) - 1)
    assume(row > 0)
    recording, text = cut(kind, plan, knock_out(row, row - 1, layers=0))
    wanted = kind.maps(text)[0]
    wanted[:, :, row, row - 1] = 0
    wanted[:, :, row] /= wanted[:, :, row].sum(-1, keepdim=True)
    torch.testing.assert_close(recording[0].dense(), wanted, atol=1e-4, rtol=0)


@settings(max_examples=10, deadline=None)
@given(plan=PLANS, levels=st.sampled_from([1.0, 4.0, 64.0]), often=st.integers(1, 5))
@torch.no_grad()
def test_any_cut_of_a_text_with_a_quantized_cache_is_one_run_with_the_rows_of_its_calls(
    plan: Plan, levels: float, often: int
) -> None:
    kind = Decoder(MODELS["llama"], Rounding(levels, often), drafts=False)
    recording, text = cut(kind, plan)
    assert len(recording.runs) == 1
    weights = recording[1].dense()
    assert weights.shape[2:] == (text.shape[1], text.shape[1])
    for call in (call for call in recording.calls if call.name == recording.sites[1].name):
        first, stop = call.rows.first_row, call.rows.first_row + call.rows.num_rows
        torch.testing.assert_close(weights[:, :, first:stop, :stop], call.matrix().dense(), atol=1e-4, rtol=0)
