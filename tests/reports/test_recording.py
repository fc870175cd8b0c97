"""Reports of what recordings and edits once got wrong, by kind: caches, drafts, virtual tokens, memory."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from headscope import record
from headscope.errors import EditError
from headscope.ops.reductions import Entropy
from headscope.watching.edits import edit, freeze, knock_out, patch
from headscope.watching.hooks import AttentionCall, watch
from headscope.watching.recording import Recording
from tests.tiny import bart, ids, llama, mistral
from tests.watching.zoo.reference import eager_maps

H, D, SLOTS = 3, 4, 32


class Preallocated(nn.Module):
    """Causal self-attention as in litgpt and gpt-fast: a cache of many slots, and a row of the mask per position."""

    def __init__(self, batch: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.maps = nn.ModuleList([nn.Linear(12, H * D) for _ in range(3)])
        self.cache = torch.zeros(2, batch, H, SLOTS, D)
        self.rule = torch.ones(SLOTS, SLOTS).tril().bool()

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (H, D)).transpose(1, 2) for layer in self.maps)
        if positions.dim() == 1:
            self.cache[0][:, :, positions], self.cache[1][:, :, positions] = k, v
            rule = self.rule[positions][None, None]
        else:  # each text of the batch is at another position
            for text, own in enumerate(positions):
                self.cache[0][text, :, own], self.cache[1][text, :, own] = k[text], v[text]
            rule = self.rule[positions][:, None]
        return F.scaled_dot_product_attention(q, *self.cache, attn_mask=rule)

    def run(self, x: Tensor, *parts: int, first: int = 0) -> None:
        """Run consecutive parts of a text, the first from this position on."""
        for part in x.split(parts, 1):
            self(part, torch.arange(first, first + part.shape[1]))
            first += part.shape[1]

    def weights(self, x: Tensor) -> Tensor:
        """Of one forward without a cache."""
        q, k = (layer(x).unflatten(-1, (H, D)).transpose(1, 2) for layer in self.maps[:2])
        visible = torch.ones(x.shape[1], x.shape[1]).tril().bool()
        return (q @ k.mT * D**-0.5).masked_fill(~visible, -torch.inf).softmax(-1)


def used(longer: int = 30) -> tuple[Preallocated, Tensor]:
    """A model whose cache holds an older, longer text, and the next text."""
    model = Preallocated()
    older, text = torch.randn(2, 2, SLOTS, 12)
    model.run(older[:, :longer], longer)
    return model, text


@torch.no_grad()
@pytest.mark.parametrize("parts", [(20,), (9, 1, 1, 1), (4, 4, 3), (1, 1, 1), (5, 27)], ids=str)
def test_cache_with_an_older_text_records_as_one_forward(parts: tuple[int, ...]) -> None:
    """litgpt and gpt-fast: the slots behind the current position still hold keys of a longer text."""
    model, text = used()
    length = sum(parts)
    with record(model) as recording:
        model.run(text[:, :length], *parts)
    wanted = model.weights(text[:, :length])
    assert recording[0].shape == wanted.shape
    torch.testing.assert_close(recording[0].dense(), wanted, atol=1e-5, rtol=0)
    previous = recording[0].offsets(1)[:, :, 1:, 0]
    torch.testing.assert_close(previous, wanted.diagonal(-1, 2, 3), atol=1e-5, rtol=0)


@torch.no_grad()
def test_rejected_drafts_in_a_cache_with_an_older_text() -> None:
    model, text = used()
    other = torch.randn(2, 4, 12)
    with record(model) as recording:
        model.run(text[:, :6], 6)
        model.run(other, 4, first=6)
        model.run(text[:, 7:10], 2, 1, first=7)
    whole = torch.cat([text[:, :6], other[:, :1], text[:, 7:10]], 1)
    torch.testing.assert_close(recording[0].dense(), model.weights(whole), atol=1e-5, rtol=0)


@torch.no_grad()
def test_knock_out_in_a_cache_with_an_older_text_hits_its_position() -> None:
    model, text = used()
    with edit(model, knock_out(9, 4)), record(model) as recording:
        model.run(text[:, :12], 8, 1, 3)
    hidden = (recording[0].dense() == 0) & torch.ones(12, 12).tril().bool()
    assert hidden.any(1).any(0).nonzero().tolist() == [[9, 4]]
    with pytest.raises(EditError, match="changed nothing"), edit(model, knock_out(25, 4)):
        model.run(text[:, :20], 20)


@torch.no_grad()
def test_edits_by_position_are_refused_where_no_position_is_known() -> None:
    model, text = used()
    with pytest.raises(EditError, match="nothing says which positions"), edit(model, knock_out(9, 4)):
        model(text[:, :1], torch.tensor([[9], [5]]))
    ring = Ring()
    ring.run(text, *[1] * 6)
    with pytest.raises(EditError, match="nothing says which positions"), edit(ring, knock_out(9, 4)):
        ring.run(text, *[1] * 6)
    bare = Bare()
    with pytest.raises(EditError, match="nothing says which positions"), edit(bare, knock_out(5, 4)):
        bare(torch.randn(2, H, 2, D), torch.randn(2, H, 7, D))


class Bare(nn.Module):
    """Attention that says nothing of its text: no mask, and more keys than queries."""

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, key)


class Ring(Preallocated):
    """The same with a cache of 8 slots, of which the oldest is written to again."""

    def run(self, x: Tensor, *parts: int, first: int = 0) -> None:
        self.cache = self.cache[:, :, :, :8]
        self.rule = torch.ones(8, 8).bool()
        for number in range(len(parts)):
            self(x[:, number : number + 1], torch.tensor([number % 8]))


def drafted(model: nn.Module, *edits: Any, dense: bool = False) -> tuple[Recording, Tensor]:
    """A generation with drafts that were looked up in the prompt, some of them rejected."""
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with edit(model, *edits), record(model, dense=dense) as recording:
        tokens = model.generate(ids(1, 4).repeat(1, 3), prompt_lookup_num_tokens=3, **options)
    return recording, tokens[:, :-1]


@pytest.mark.parametrize("window", [3, 6, 14])
def test_drafts_with_a_sliding_window_are_one_run(window: int) -> None:
    """Rejected drafts stayed in the recording once a sliding cache had dropped keys."""
    model = mistral(window)
    recording, tokens = drafted(model)
    assert len(recording.runs) == 1
    assert recording[0].shape == (1, 6, 31, 31)
    for matrix, wanted in zip(recording, eager_maps(model, {"input_ids": tokens}), strict=True):
        torch.testing.assert_close(matrix.dense(), wanted, atol=1e-5, rtol=0)


def test_knock_out_with_drafts_and_a_sliding_window_hits_its_positions() -> None:
    recording, _ = drafted(mistral(6), knock_out(25, (22, 23, 24), layers=0))
    weights = recording[0].dense()[0]
    assert recording[0].shape == (1, 6, 31, 31)
    assert not weights[:, 25, [22, 23, 24]].any()
    assert (weights[:, 24, [22, 23, 24]] > 0).all()
    assert (weights[:, 26, [22, 23, 24]] > 0).all()


class Tuned(nn.Module):
    """A decoder with five learnt tokens before the text, as in PEFT's prefix tuning or its prompt tuning."""

    def __init__(self, prefix: bool) -> None:
        super().__init__()
        self.base, self.prefix = llama(), prefix
        self.prompt = nn.Parameter(torch.randn(1, 5, 24))
        with torch.no_grad():
            self.keys = self.base.model(inputs_embeds=self.prompt.expand(2, -1, -1), use_cache=True).past_key_values

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return self.base(**self.inputs(input_ids, attention_mask))

    def inputs(self, input_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Any]:
        """What the decoder itself gets."""
        prompt = self.prompt.expand(len(input_ids), -1, -1)
        mask = None if attention_mask is None else F.pad(attention_mask, (5, 0), value=1)
        if self.prefix:
            return {"input_ids": input_ids, "attention_mask": mask, "past_key_values": copy.deepcopy(self.keys)}
        text = self.base.get_input_embeddings()(input_ids)
        return {"inputs_embeds": torch.cat([prompt, text], 1), "attention_mask": mask}


class TunedByPeft(Tuned):
    """The same with PEFT's attributes, and its generate(), in which the decoder is the outermost module that runs."""

    def __init__(self, prefix: bool) -> None:
        super().__init__(prefix)
        self.active_adapter = "default"
        self.peft_config = {"default": SimpleNamespace(is_prompt_learning=True, num_virtual_tokens=5)}

    def generate(self, input_ids: Tensor, steps: int) -> None:
        inputs = self.inputs(input_ids, torch.ones_like(input_ids))
        for _ in range(steps):
            output = self.base(**inputs, use_cache=True)
            mask = F.pad(inputs["attention_mask"], (0, 1), value=1)
            step = output.logits[:, -1:].argmax(-1)
            inputs = {"input_ids": step, "attention_mask": mask, "past_key_values": output.past_key_values}


def test_knock_out_with_beams_is_refused_once_a_sliding_cache_has_dropped_keys() -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    model = mistral(6)
    with pytest.raises(EditError, match="nothing says which positions"), edit(model, knock_out(9, 8, layers=0)):
        model.generate(ids(1, 5), pad_token_id=0, **options)
    with edit(model := llama(), knock_out(9, 8, layers=0)), record(model) as recording:
        model.generate(ids(1, 5), pad_token_id=0, **options)
    steps = [call.matrix().dense() for call in recording.calls if call.name.endswith("0.self_attn")]
    assert [not step[..., -1, 8].any() for step in steps if step.shape[3] > 8] == [False, True, False, False]


@torch.no_grad()
def test_edits_hit_the_same_position_when_a_text_is_run_again_after_one_prefix() -> None:
    model, text = llama(), ids(2, 9)
    cache = model(text[:, :5], use_cache=True).past_key_values
    with edit(model, knock_out(7, 2, layers=0)), record(model) as recording:
        for _ in range(2):
            model(text[:, 5:], past_key_values=copy.deepcopy(cache))
    for run in recording.runs:
        assert not run[0].dense()[:, :, 2, 2].any()


@torch.no_grad()
@pytest.mark.parametrize("make", [Tuned, TunedByPeft])
@pytest.mark.parametrize("prefix", [True, False], ids=["prefix", "prompt"])
@pytest.mark.parametrize("masked", [True, False])
def test_virtual_tokens_are_no_text_and_shift_no_position(make: type[Tuned], prefix: bool, masked: bool) -> None:
    """transformers PR 47447, peft#3201: a mask of 12 tokens where there are 17 keys."""
    model, text = make(prefix), ids(2, 12)
    mask = torch.ones_like(text) if masked else None
    if mask is not None:
        mask[1, :3] = 0
    name = "base.model.layers.0.self_attn"
    with record(model) as plain:
        model(text, mask)
    with edit(model, knock_out(8, 6, layers=name)), record(model) as recording:
        model(text, mask)
    assert recording.valid is not None
    wanted = F.pad(torch.ones_like(text) if mask is None else mask, (5, 0)).bool()
    assert torch.equal(recording.valid, wanted)
    changed = ((recording[name].dense() - plain[name].dense()).abs() > 1e-4).any(1).any(0)
    first_row = 0 if prefix else 5
    assert changed.any(1).nonzero().flatten().tolist() == [8 + first_row]
    assert not recording[name].dense()[:, :, 8 + first_row, 6 + 5].any()


@torch.no_grad()
@pytest.mark.parametrize("prefix", [True, False], ids=["prefix", "prompt"])
def test_virtual_tokens_in_generate_shift_no_position(prefix: bool) -> None:
    model, text = TunedByPeft(prefix), ids(2, 12)
    name = "base.model.layers.0.self_attn"
    with edit(model, knock_out((8, 13), 6, layers=name)), record(model) as recording:
        model.generate(text, 4)
    assert recording.valid is not None
    assert recording.valid.tolist() == [[False] * 5 + [True] * 15] * 2
    weights = recording[name].dense()[..., 5 + 6]
    first_row = 0 if prefix else 5
    hidden = (weights == 0).all(1).all(0)[first_row + 6 :]
    assert (hidden.nonzero().flatten() + 6).tolist() == [8, 13]


@torch.no_grad()
def test_patch_with_virtual_tokens_takes_the_rows_of_its_text() -> None:
    for prefix in (True, False):
        model, text = Tuned(prefix), ids(2, 12)
        with record(model) as longer:
            model(torch.cat([text, ids(2, 4, seed=1)], 1))
        wanted = model(text).logits
        with edit(model, patch(1, range(6), from_=longer)):
            torch.testing.assert_close(model(text).logits, wanted, atol=1e-4, rtol=0)


@torch.no_grad()
def test_text_that_was_begun_before_and_a_decoder_text_are_no_virtual_tokens() -> None:
    model, text = llama(), ids(2, 12)
    cache = model(text[:, :5], use_cache=True).past_key_values
    with edit(model, knock_out(8, 2, layers=0)), record(model) as recording:
        model(text[:, 5:], past_key_values=cache)
    assert recording.run.valid is None
    assert not recording[0].dense()[:, :, 3, 2].any()
    model, name = bart(), "model.decoder.layers.0.self_attn"
    with edit(model, knock_out(8, 2, layers=name)), record(model) as recording:
        model(input_ids=ids(2, 5), attention_mask=torch.ones(2, 5), decoder_input_ids=ids(2, 12))
    assert recording.valid is not None
    assert recording.valid.shape == (2, 5)
    assert not recording[name].dense()[:, :, 8, 2].any()


@torch.no_grad()
def test_edits_by_position_are_refused_for_a_tuned_encoder_decoder() -> None:
    model = TunedByPeft(prefix=True)
    model.base = bart()
    with pytest.raises(EditError, match="nothing says which positions"), edit(model, knock_out(8, 2)):
        model.base(input_ids=ids(2, 5), decoder_input_ids=ids(2, 12))


@torch.no_grad()
def test_limit_of_dense_maps_counts_all_sites() -> None:
    model, text = llama(), ids(2, 10)
    with record(model) as recording:
        model(text)
    one = 2 * 6 * 10 * 10 * 4
    with pytest.raises(ValueError, match=r"dense maps of 2 sites would take 9\.375 KiB together, the limit is 9599"):
        recording.to_attentions(limit=2 * one - 1)
    wanted = eager_maps(model, {"input_ids": text})
    torch.testing.assert_close(recording.to_attentions(limit=2 * one), tuple(wanted), atol=1e-5, rtol=0)


@torch.no_grad()
def test_dense_maps_are_filled_while_the_model_runs() -> None:
    model, text = llama(), ids(2, 10)
    size = 2 * 2 * 6 * 10 * 10 * 4
    with record(model, dense=True, limit=size) as recording:
        model(text)
    maps = recording.to_attentions(limit=0)
    assert [site.calls[0].weights is maps[i] for i, site in enumerate(recording.sites)] == [True, True]
    torch.testing.assert_close(maps, tuple(eager_maps(model, {"input_ids": text})), atol=1e-5, rtol=0)
    ran = []
    with pytest.raises(ValueError, match=r"all dense maps take 9\.375 KiB, the limit is 9599"):  # noqa: SIM117
        with record(model, dense=True, limit=size - 1):
            ran.append(model(text).logits)
    torch.testing.assert_close(ran[0], model(text).logits)
    with pytest.raises(ValueError, match="leave one out"), record(model, dense=True, reduce=Entropy()):
        pass


def test_dense_maps_of_a_generation_with_drafts_and_a_window_are_joined() -> None:
    model = mistral(6)
    recording, tokens = drafted(model, dense=True)
    maps = recording.to_attentions()
    wanted = eager_maps(model, {"input_ids": tokens})
    torch.testing.assert_close(maps, tuple(wanted), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="dense maps of 2 sites"):
        recording.to_attentions(limit=100)


class Rounding(DynamicCache):
    """Gives the exact keys of new tokens, and rounds those before them, again whenever ``often`` more have come."""

    def __init__(self, levels: float, often: int) -> None:
        super().__init__()
        self.levels, self.often = levels, often

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer, count = self.layers[layer_idx], getattr(self.layers[layer_idx], "exact", 0) + key_states.shape[2]
        layer.exact = count
        if count >= self.often:
            layer.keys, layer.exact = (keys * self.levels).round() / self.levels, 0
        return keys, values


@pytest.mark.parametrize("often", [1, 4])
@pytest.mark.parametrize("levels", [1.0, 8.0])
def test_steps_with_a_quantized_cache_are_one_run(levels: float, often: int) -> None:
    """transformers cache_implementation="quantized": the first text is attended to exactly, later from rounded keys."""
    model = llama()
    with edit(model, knock_out(12, 3, layers=0)), record(model, layers=0) as recording, eager_steps(model) as steps:
        tokens = model.generate(
            ids(2, 9), past_key_values=Rounding(levels, often), max_new_tokens=8, do_sample=False, eos_token_id=None
        )
    assert len(recording.runs) == 1
    assert recording[0].shape == (2, 6, 16, 16)
    assert tokens.shape == (2, 17)
    weights = recording[0].dense()
    for call, wanted in zip(recording.calls, steps, strict=True):
        rows = weights[:, :, call.rows.first_row : call.rows.first_row + call.rows.num_rows, : wanted.shape[3]]
        if call.rows.first_row != 12:
            torch.testing.assert_close(rows, wanted, atol=1e-5, rtol=0)
            torch.testing.assert_close(call.matrix().dense(), wanted, atol=1e-5, rtol=0)
    assert not weights[:, :, 12, 3].any()


@torch.no_grad()
def test_saved_recording_of_a_quantized_cache_is_the_same(tmp_path: Path) -> None:
    model, cache = llama(), Rounding(2.0, 3)
    with record(model) as recording:
        for part in ids(2, 9).split([4, 1, 1, 3], 1):
            model(part, past_key_values=cache)
    recording.save(tmp_path / "rounded")
    torch.testing.assert_close(Recording.load(tmp_path / "rounded")[1].dense(), recording[1].dense())


@torch.no_grad()
def test_patch_and_freeze_take_the_weights_of_a_quantized_cache() -> None:
    model, cache, text = llama(), Rounding(2.0, 3), ids(2, 9)
    with record(model) as recording:
        for part in text.split([4, 1, 1, 3], 1):
            model(part, past_key_values=cache)
    for change in (patch(1, (2, 5), from_=recording), freeze(from_=recording)):
        with edit(model, change), record(model) as edited:
            model(text)
        torch.testing.assert_close(edited[1].dense()[:, [2, 5]], recording[1].dense()[:, [2, 5]])


@torch.no_grad()
def test_another_text_after_as_many_tokens_is_no_rounded_one() -> None:
    model = llama()
    caches = [model(ids(2, 8, seed=seed), use_cache=True).past_key_values for seed in range(2)]
    with record(model) as recording:
        for number, cache in enumerate(caches):
            model(ids(2, 1 + number), past_key_values=cache)
    assert len(recording.runs) == 2


@contextmanager
def eager_steps(model: nn.Module) -> Iterator[list[Tensor]]:
    """The weights of each call of the first layer, from the queries and keys that it got."""
    steps: list[Tensor] = []
    attention = model.model.layers[0].self_attn

    def see(call: AttentionCall, _: Any) -> None:
        query, key = call.query.double(), call.key.double().repeat_interleave(3, 1)
        visible = torch.ones(query.shape[2], key.shape[2]).tril(key.shape[2] - query.shape[2]).bool()
        scores = (query @ key.mT * attention.scaling).masked_fill(~visible, -torch.inf)
        steps.append(scores.softmax(-1).float())

    with watch(attention, see):
        yield steps
