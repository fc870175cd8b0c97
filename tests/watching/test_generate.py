"""generate(): the steps of a site join into one matrix, which is that of one forward over the whole text."""

import copy
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headscope.watching.edits import Edit, edit, knock_out
from headscope.watching.hooks import AttentionCall
from headscope.watching.recording import Position, Recording, record
from tests.tiny import bart, ids, llama, mistral
from tests.watching.zoo.reference import eager_maps

NEW = 6


def generated(model: nn.Module, *args: Any, **options: Any) -> tuple[Recording, Tensor]:
    """A recording of generate(), whose tokens are the same without it."""
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    torch.manual_seed(5)
    plain = model.generate(*args, **copy.deepcopy(options))
    torch.manual_seed(5)
    with record(model) as recording:
        watched = model.generate(*args, **options)
    assert torch.equal(plain, watched)
    return recording, watched


def assert_same_as_eager(
    recording: Recording, model: nn.Module, inputs: dict[str, Any], rows: Tensor | None = None, tolerance: float = 1e-5
) -> None:
    """Every joined matrix is the map of one eager forward, on the rows that are text."""
    wanted = eager_maps(model, inputs)
    assert len(recording) == len(wanted)
    for matrix, whole in zip(recording, wanted, strict=True):
        got = matrix.dense()
        assert got.shape == whole.shape
        difference = (got - whole).abs().amax((1, 3))
        assert (difference if rows is None else difference[rows]).max() < tolerance


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("sample", [False, True])
def test_decoder_steps_join_to_the_maps_of_one_forward(cache: str | None, sample: bool) -> None:
    model = llama()
    recording, tokens = generated(model, ids(2, 7), cache_implementation=cache, do_sample=sample)
    assert tokens.shape == (2, 7 + NEW)
    assert_same_as_eager(recording, model, {"input_ids": tokens[:, :-1]})
    assert len(recording.calls) == 2 * NEW


def test_joined_mask_of_causal_steps_is_causal() -> None:
    recording, _ = generated(llama(), ids(1, 7))
    mask = recording.sites[0].scores().mask
    assert mask is not None
    assert mask.is_causal


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("window", [4, 9])
def test_sliding_window_keeps_its_positions(cache: str | None, window: int) -> None:
    model = mistral(window)
    recording, tokens = generated(model, ids(2, 7), cache_implementation=cache, max_new_tokens=8)
    assert recording[0].shape == (2, 6, 14, 14)
    assert_same_as_eager(recording, model, {"input_ids": tokens[:, :-1]})
    far = torch.ones(14, 14).tril(-window).bool()
    assert recording[1].dense()[..., far].eq(0).all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_batch_joins_to_the_maps_of_one_forward(side: str, cache: str | None, attention: str) -> None:
    model, text = llama(), ids(2, 7)
    model.set_attn_implementation(attention)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, slice(None, 3) if side == "left" else slice(-3, None)] = 0
    positions: list[Tensor] = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(kwargs["position_ids"]), with_kwargs=True
    )
    recording, tokens = generated(model, text, attention_mask=mask, cache_implementation=cache)
    handle.remove()
    whole = torch.cat([mask, torch.ones(2, NEW - 1, dtype=torch.long)], 1)
    position_ids = torch.cat(positions[NEW:], 1)
    inputs = {"input_ids": tokens[:, :-1], "attention_mask": whole, "position_ids": position_ids}
    assert_same_as_eager(recording, model, inputs, rows=whole.bool())
    assert recording.valid is not None  # with a static cache, generate() gives the model its own 4-D mask
    assert torch.equal(recording.valid, whole.bool())
    assert recording[0].dense()[0, :, -1][:, ~whole[0].bool()].eq(0).all()


def test_chunks_of_a_text_join_to_the_maps_of_one_forward() -> None:
    model, text = llama(), ids(2, 11)
    with torch.no_grad(), record(model) as recording:
        cache = None
        for part in text.split([5, 3, 1, 2], 1):
            cache = model(part, past_key_values=cache, use_cache=True).past_key_values
    assert len(recording.runs) == 1
    assert len(recording.calls) == 8
    assert_same_as_eager(recording, model, {"input_ids": text})


def test_chunked_prefill_joins_to_the_maps_of_one_forward() -> None:
    model = llama()
    recording, tokens = generated(model, ids(2, 11), prefill_chunk_size=4)
    assert_same_as_eager(recording, model, {"input_ids": tokens[:, :-1]})


def test_static_cache_leaves_recorded_calls_as_they_were() -> None:
    model = llama()
    recording, tokens = generated(model, ids(2, 7), cache_implementation="static")
    with torch.no_grad(), record(model) as prompt:
        model(tokens[:, :7])
    first = recording.calls[0].matrix()
    assert recording.calls[0].shape == first.shape == (2, 6, 7, 7)
    assert (first.dense() - prompt[0].dense()).abs().max() < 1e-6
    steps = [call for call in recording.calls if call.name == recording.sites[0].name]
    assert [call.shape[2:] for call in steps] == [(7, 7)] + [(1, n) for n in range(8, 7 + NEW)]


def test_beams_are_recorded_as_calls() -> None:
    model = llama()
    recording, tokens = generated(model, ids(2, 7), num_beams=3)
    assert tokens.shape == (2, 7 + NEW)
    rows = [call.shape[2] for call in recording.calls if call.name == recording.runs[0].sites[0].name]
    assert rows == [7] + [1] * (NEW - 1)
    for call in recording.calls:
        assert call.shape[0] == 6
        assert (call.matrix().dense().sum(-1) - 1).abs().max() < 1e-5


def test_rejected_drafts_are_dropped() -> None:
    model, assistant = llama(), llama(tie_word_embeddings=True)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    rows: list[int] = []
    handle = model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )
    recording, tokens = generated(model, ids(1, 7), assistant_model=assistant, max_new_tokens=9)
    handle.remove()
    assert sum(rows) // 2 > tokens.shape[1]  # more was computed than stayed
    assert len(recording.runs) == 1
    seen = recording[0].shape[2]
    assert seen >= tokens.shape[1] - 1
    keep = tokens.shape[1] - 1
    wanted = eager_maps(model, {"input_ids": tokens[:, :-1]})
    for matrix, whole in zip(recording, wanted, strict=True):
        assert (matrix.dense()[:, :, :keep, :keep] - whole).abs().max() < 1e-5


def test_prompt_lookup_joins_to_the_maps_of_one_forward() -> None:
    model = llama()
    recording, tokens = generated(model, ids(1, 4).repeat(1, 3), prompt_lookup_num_tokens=3, max_new_tokens=8)
    keep = tokens.shape[1] - 1
    for matrix, whole in zip(recording, eager_maps(model, {"input_ids": tokens[:, :-1]}), strict=True):
        assert (matrix.dense()[:, :, :keep, :keep] - whole).abs().max() < 1e-5


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(  # type: ignore[call-arg]  # its annotations lack them
        vocab_size=99,
        d_model=24,
        d_kv=4,
        d_ff=32,
        num_layers=2,
        num_heads=6,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.5 if parameter.dim() > 1 else 1.0))
    return model


@pytest.mark.parametrize("make", [bart, t5])
@pytest.mark.parametrize("cache", [None, "static"])
def test_encoder_decoder_steps_join_to_the_maps_of_one_forward(make: Any, cache: str | None) -> None:
    model, text = make(), ids(2, 7)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 4:] = 0
    recording, tokens = generated(model, text, attention_mask=mask, cache_implementation=cache)
    assert len(recording.runs) == 1
    inputs = {"input_ids": text, "attention_mask": mask, "decoder_input_ids": tokens[:, :-1]}
    wanted = eager_maps(model, inputs)
    assert len(recording) == len(wanted) == 6
    assert [tuple(m.shape[2:]) for m in recording] == [tuple(w.shape[2:]) for w in wanted]
    for matrix, whole in zip(recording, wanted, strict=True):
        difference = (matrix.dense() - whole).abs().amax((1, 3))
        rows = mask.bool() if whole.shape[2] == 7 else torch.ones(difference.shape, dtype=torch.bool)
        assert difference[rows].max() < 1e-5


@dataclass(frozen=True)
class Marked(Edit):
    """Changes nothing, and lists the names of the sites that it applies to."""

    names: set[str] = field(default_factory=set)

    def apply(self, call: AttentionCall, position: Position) -> AttentionCall:
        self.names.add(call.name)
        return replace(call)


def test_layers_of_record_and_edit_count_encoder_and_decoder_as_a_recording_does() -> None:
    model, text = t5(), ids(1, 7)  # generate() runs the encoder alone, before the decoder
    options = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    marks = [Marked((number,)) for number in range(6)]
    with ExitStack() as stack:
        stack.enter_context(edit(model, *marks))
        whole = stack.enter_context(record(model))
        parts = [stack.enter_context(record(model, layers=number)) for number in range(6)]
        model.generate(text, **options)
    names = [site.name for site in whole.sites]
    assert len(names) == 6
    assert [[site.name for site in part.sites] for part in parts] == [[name] for name in names]
    assert [mark.names for mark in marks] == [{name} for name in names]


def test_runs_of_one_prefix_are_separate() -> None:
    model, prefix = llama(), ids(1, 8)
    with torch.no_grad():
        cache = model(prefix).past_key_values
        with record(model) as recording:
            for number in range(3):
                model(ids(1, 3) + number, past_key_values=copy.deepcopy(cache))
    assert [[tuple(matrix.shape) for matrix in run] for run in recording.runs] == [[(1, 6, 3, 11)] * 2] * 3
    for number, run in enumerate(recording.runs):
        whole = eager_maps(model, {"input_ids": torch.cat([prefix, ids(1, 3) + number], 1)})
        assert (run[1].dense() - whole[1][:, :, 8:]).abs().max() < 1e-5


def drafting(noise: float = 0.05) -> tuple[nn.Module, nn.Module]:
    """An encoder–decoder, and one like it whose drafts it often rejects."""
    model, helper = bart(), bart()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in helper.parameters():
            parameter.add_(noise * torch.randn(parameter.shape))
    return model, helper


def test_rejected_drafts_leave_no_rows_of_cross_attention() -> None:
    model, helper = drafting()
    text, rows, mask = ids(1, 9), [], torch.ones(1, 9, dtype=torch.long)
    mask[0, 6:] = 0
    attention = model.model.decoder.layers[1].encoder_attn
    handle = attention.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    recording, tokens = generated(model, text, attention_mask=mask, assistant_model=helper, max_new_tokens=12)
    handle.remove()
    keep = tokens.shape[1] - 1
    assert sum(rows) // 2 > keep  # more was computed than stayed
    assert len({tuple(site.shape[2:3]) for site in recording.sites if "decoder" in site.name}) == 1
    wanted = eager_maps(model, {"input_ids": text, "attention_mask": mask, "decoder_input_ids": tokens[:, :-1]})
    assert len(recording) == len(wanted)
    for name, matrix, whole in zip((site.name for site in recording.sites), recording, wanted, strict=True):
        text_rows = slice(0, 6) if "encoder.layers" in name else slice(0, whole.shape[2])
        weights = matrix.dense()[:, :, : whole.shape[2], : whole.shape[3]]
        assert (weights - whole)[:, :, text_rows].abs().max() < 1e-4


def test_knock_out_in_cross_attention_counts_rows_without_rejected_drafts() -> None:
    model, helper = drafting(0.3)
    name = "model.decoder.layers.1.encoder_attn"
    with edit(model, knock_out(10, 2, layers=name)), record(model) as recording:
        tokens = model.generate(
            ids(1, 9), assistant_model=helper, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    weights = recording[name].dense()[0, :, : tokens.shape[1] - 1, 2]
    hidden = (weights == 0).all(0).nonzero().flatten().tolist()
    assert hidden == [10]


@pytest.mark.parametrize("drafts", [False, True])
def test_run_of_cross_attention_alone_has_all_steps(drafts: bool) -> None:
    model, helper = drafting()
    text = ids(1, 9)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with record(model, layers=["model.decoder.layers.1.encoder_attn"]) as recording:
        tokens = model.generate(text, **options, **({"assistant_model": helper} if drafts else {}))
    (matrix,) = recording
    *_, whole = eager_maps(model, {"input_ids": text, "decoder_input_ids": tokens[:, :-1]})
    assert (matrix.dense()[:, :, : whole.shape[2]] - whole).abs().max() < 1e-5
    with record(model, layers=["model.decoder.layers.1.encoder_attn"]) as recording:
        for _ in range(2):
            model(input_ids=text, decoder_input_ids=tokens[:, :4])
    assert [run[0].shape[2] for run in recording.runs] == [4, 4]  # not one text


def test_speech_model_steps_join_to_the_maps_of_one_forward() -> None:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=99,
        num_mel_bins=8,
        d_model=24,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=20,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        init_std=0.5,
    )
    model = WhisperForConditionalGeneration(config).eval()
    model.generation_config.suppress_tokens = model.generation_config.begin_suppress_tokens = None
    sound = torch.randn(2, 8, 40)
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    start = torch.ones(2, 1, dtype=torch.long)
    plain = model.generate(sound, decoder_input_ids=start, **options)
    with record(model) as recording:
        tokens = model.generate(sound, decoder_input_ids=start, **options)
    assert torch.equal(plain, tokens)
    rows = recording[1].shape[2]
    decoder = torch.cat([start, tokens], 1) if tokens.shape[1] < rows + 1 else tokens
    assert_same_as_eager(recording, model, {"input_features": sound, "decoder_input_ids": decoder[:, :rows]})


def test_runs_of_two_texts_are_two() -> None:
    model = llama()
    with record(model) as recording:
        for seed in (1, 2):
            model.generate(ids(1, 5, seed=seed), max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert [run[0].shape[2] for run in recording.runs] == [7, 7]
