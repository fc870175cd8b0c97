"""A recording: sites, runs, kept tensors, and modules that were not seen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from headscope import AttentionMatrix, KVCache, MultiHeadAttention, SlidingWindowCache, attention, masks, positions
from headscope.errors import NothingSeen, RecordingError
from headscope.ops.reductions import Entropy, Received
from headscope.ops.scores import make_scores
from headscope.watching.recording import Recording, record
from headscope.watching.recording.continuation import at_own_positions
from tests.tiny import bart, ids, llama
from tests.watching.zoo.catalog import ZOO
from tests.watching.zoo.reference import eager_maps

NAMES = ["model.layers.0.self_attn", "model.layers.1.self_attn"]


class Own(nn.Module):
    """An attention of one's own arithmetic, which cannot be seen."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.mT).softmax(-1) @ x


class OwnAttention(Own):
    """The same, by a name that says what it is."""


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


def recorded(model: nn.Module, *texts: Tensor, **options: Any) -> Recording:
    with torch.no_grad(), record(model, **options) as recording:
        for text in texts:
            model(text)
    return recording


def test_sites_are_in_the_order_of_their_calls() -> None:
    recording = recorded(llama(), ids(2, 7))
    assert len(recording) == len(recording.sites) == len(recording.calls) == 2
    assert [site.name for site in recording.sites] == NAMES
    assert {tuple(site.shape) for site in recording.sites} == {(2, 6, 7, 7)}
    assert {(site.way, site.occurrence, site.edited) for site in recording.sites} == {("huggingface", 0, False)}
    assert all(site.proof is not None and site.proof < 1e-5 for site in recording.sites)
    assert recording.proof == max(site.proof for site in recording.sites if site.proof is not None)
    assert [tuple(matrix.shape) for matrix in recording] == [(2, 6, 7, 7)] * 2


def test_recording_finds_a_site_by_number_and_by_name() -> None:
    recording = recorded(llama(), ids(2, 7))
    assert recording[NAMES[1]] is recording[1] is recording[-1]
    with pytest.raises(RecordingError) as unknown:
        recording["model.layers.7"]
    assert str(unknown.value) == (
        "no attention site is called 'model.layers.7'; there are 2: model.layers.0.self_attn, model.layers.1.self_attn"
    )


def test_to_attentions_are_the_maps_of_eager() -> None:
    model = llama()
    text = ids(2, 7)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = model(text, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    got = recorded(model, text).to_attentions()
    assert len(got) == len(wanted) == 2
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() < 1e-5


def test_valid_is_the_attention_mask() -> None:
    model, text = llama(), ids(2, 7)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    with torch.no_grad(), record(model) as recording:
        model(text, attention_mask=mask)
    assert recording.valid is not None
    assert recording.valid.dtype == torch.bool
    assert torch.equal(recording.valid, mask.bool())
    with torch.no_grad(), record(model) as recording:
        model(text, mask)  # by position
    assert recording.valid is not None
    assert torch.equal(recording.valid, mask.bool())
    assert recorded(model, text).valid is None


@pytest.mark.parametrize("layers", [[1], [NAMES[1]], [1, NAMES[1]]], ids=str)
def test_layers_restrict_the_sites(layers: list[int | str]) -> None:
    model, text = llama(), ids(2, 7)
    recording = recorded(model, text, layers=layers)
    assert [site.name for site in recording.sites] == [NAMES[1]]
    assert torch.equal(recording[0].dense(), recorded(model, text)[1].dense())
    assert recording.unseen == ()


def test_keep_adds_values_and_outputs() -> None:
    model, text = llama(), ids(2, 7)
    site = recorded(model, text).sites[0]
    assert site.value() is None
    assert site.output() is None
    site = recorded(model, text, keep=("query", "key", "value", "output")).sites[0]
    value, output = site.value(), site.output()
    assert value is not None
    assert output is not None
    assert value.shape == (2, 2, 7, 4)
    assert (site.matrix() @ value - output).abs().max() < 1e-6
    with pytest.raises(ValueError, match="keep got \\('query', 'weights'\\): wanted 'query' and 'key'"):
        recorded(model, text, keep=("query", "weights"))


def test_reduce_gives_the_answers_of_the_matrices_and_keeps_nothing_else() -> None:
    model, text = llama(), ids(2, 7)
    wanted = recorded(model, text)
    recording = recorded(model, text, reduce=(Entropy(), Received()))
    assert recording.runs == []
    assert [(a.name, a.occurrence, tuple(a.shape)) for a in recording.answers] == [
        (name, 0, (2, 6, 7, 7)) for name in NAMES
    ]
    for answer, matrix in zip(recording.answers, wanted, strict=True):
        entropy, received = matrix.reduce(Entropy(), Received())
        assert torch.equal(answer.values[0], entropy)
        assert torch.equal(answer.values[1], received)
    with pytest.raises(RecordingError, match=r"holds no attention matrices\. Its answers are in recording.answers"):
        recording[0]


def test_reduce_takes_one_reduction_or_a_function() -> None:
    model, text = llama(), ids(2, 7)
    one = recorded(model, text, reduce=Entropy()).answers[0].values
    whole = recorded(model, text)[0].entropy()
    assert torch.equal(one[0] if isinstance(one, tuple | list) else one, whole)
    own = recorded(model, text, reduce=lambda call: call.matrix().entropy().mean().item())
    assert [answer.values for answer in own.answers] == [m.entropy().mean().item() for m in recorded(model, text)]


def test_independent_forwards_are_runs() -> None:
    model = llama()
    recording = recorded(model, ids(2, 7), ids(2, 5, seed=1))
    assert [run[0].shape[2] for run in recording.runs] == [7, 5]
    with pytest.raises(RecordingError) as several:
        recording[0]
    assert str(several.value) == (
        "this recording holds 2 independent forwards: say which, recording.runs[0] … recording.runs[1]."
    )
    alone = recorded(model, ids(2, 5, seed=1))
    assert torch.equal(recording.runs[1][1].dense(), alone[1].dense())
    assert repr(recording) == "Recording(2 runs, 0 answers)"


def test_runs_of_the_same_text_are_two() -> None:
    assert len(recorded(llama(), ids(2, 7), ids(2, 7)).runs) == 2


def test_run_of_an_encoder_alone_is_its_own() -> None:
    model, text = bart(), ids(2, 7)
    with torch.no_grad(), record(model) as recording:
        model.get_encoder()(text)
        model(text, decoder_input_ids=ids(2, 5))
    assert [len(run) for run in recording.runs] == [2, 6]
    assert recording.runs[1][0].shape == (2, 6, 7, 7)


def test_recording_is_empty_if_nothing_ran() -> None:
    recording = recorded(llama())
    assert len(recording) == 0
    with pytest.raises(RecordingError, match=r"holds no attention matrices\. Run the model inside the block"):
        recording[0]


def test_shared_layer_is_a_site_per_call() -> None:
    model = ZOO["albert"].build()
    inputs = ZOO["albert"].inputs(model)
    with torch.no_grad(), record(model) as recording:
        model(**inputs)
    names = {site.name for site in recording.sites}
    assert len(names) == 1
    assert [site.occurrence for site in recording.sites] == [0, 1]
    assert recording.valid is not None
    for got, wanted in zip(recording, eager_maps(model, inputs), strict=True):
        assert (got.dense() - wanted).abs().amax((1, 3))[recording.valid].max() < 1e-5
    with pytest.raises(RecordingError, match=r"was called 2 times in a forward: use one of the numbers \[0, 1\]"):
        recording[names.pop()]


def test_encoder_decoder_has_three_kinds_of_sites() -> None:
    model, text, target = bart(), ids(2, 7), ids(2, 5)
    with torch.no_grad(), record(model) as recording:
        model(text, decoder_input_ids=target)
    shapes = [(site.name.split(".", 1)[1], tuple(site.shape[2:])) for site in recording.sites]
    assert shapes == [
        ("encoder.layers.0.self_attn", (7, 7)),
        ("encoder.layers.1.self_attn", (7, 7)),
        ("decoder.layers.0.self_attn", (5, 5)),
        ("decoder.layers.0.encoder_attn", (5, 7)),
        ("decoder.layers.1.self_attn", (5, 5)),
        ("decoder.layers.1.encoder_attn", (5, 7)),
    ]
    for got, wanted in zip(recording, eager_maps(model, {"input_ids": text, "decoder_input_ids": target}), strict=True):
        assert (got.dense() - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["swin", "t5", "gpt_oss", "gemma2", "granite_swa"])
def test_recorded_weights_include_biases_sinks_and_caps(name: str) -> None:
    from tests.watching.zoo.sweep import examine

    row = examine(name)
    assert row.compared >= 2
    assert row.maps is not None
    assert row.eager is not None
    assert max(row.maps, row.eager) < 1e-5
    assert row.clean


def test_detach_drops_the_graph() -> None:
    model, text = llama(), ids(2, 7)
    with record(model) as recording:
        model(text)
    assert not recording.sites[1].calls[0].query.requires_grad
    with record(model, detach=False) as recording:
        model(text)
    assert recording.sites[1].calls[0].query.requires_grad
    recording[1].entropy().sum().backward()
    assert model.model.embed_tokens.weight.grad.abs().max() > 0


def test_recorded_tensors_are_copies_where_the_model_reuses_them() -> None:
    class Reusing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.storage = torch.zeros(1, 2, 6, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.storage.copy_(x)
            return F.scaled_dot_product_attention(x, self.storage, x)

    model, texts = Reusing(), [torch.randn(1, 2, 6, 4) for _ in range(2)]
    recording = recorded(model, *texts)
    for run, text in zip(recording.runs, texts, strict=True):
        assert torch.equal(run.sites[0].last_key, text)


def test_unseen_lists_attention_modules_without_calls() -> None:
    model = nn.Sequential(Plain(), OwnAttention(), Own())
    recording = recorded(model, torch.randn(2, 5, 4))
    assert recording.unseen == ("1",)
    assert repr(recording).endswith("; PART of the model: 1 attention modules were not seen)")
    assert "PART" not in repr(recorded(nn.Sequential(Plain()), torch.randn(2, 5, 4)))


def test_nothing_seen_lists_what_looks_like_attention() -> None:
    with pytest.raises(NothingSeen) as nothing:
        recorded(nn.Sequential(OwnAttention(), Own()), torch.randn(2, 5, 4))
    assert "Sequential ran 1 times and no attention call passed where it can be seen" in str(nothing.value)
    assert str(nothing.value).endswith("These modules look like attention: 0 (OwnAttention).")
    with pytest.raises(NothingSeen, match=r"No module looks like attention\.$"):
        recorded(nn.Sequential(Own()), torch.randn(2, 5, 4))


def test_repr_gives_the_proof() -> None:
    text = repr(recorded(llama(), ids(2, 7)))
    assert text.startswith("Recording(2 attention sites, each (2, 6, 7, 7); rebuilt to ")


def test_on_call_gets_each_call() -> None:
    names: list[str] = []
    recording = recorded(llama(), ids(2, 7), on_call=lambda call: names.append(call.name))
    assert names == NAMES
    assert len(recording) == 2


def test_proof_is_none_without_a_row_to_compare() -> None:
    class Blind(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, attn_mask=torch.full((5, 5), -torch.inf)).nan_to_num()

    recording = recorded(Blind(), torch.randn(1, 2, 5, 4))
    assert recording.proof is None
    assert recording[0].dense().eq(0).all()


def test_entropy_gives_a_position_bias_the_gradient_of_the_eager_maps() -> None:
    config = transformers.T5Config(
        vocab_size=50, d_model=24, d_kv=4, num_heads=6, num_layers=2, d_ff=32, dropout_rate=0.0
    )
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(config)
    model.set_attn_implementation("eager")
    text = torch.randint(1, 50, (2, 7))
    table = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    with record(model, detach=False) as recording:
        maps = model(text, output_attentions=True).attentions
    wanted = torch.autograd.grad(sum(-torch.xlogy(a, a).sum() for a in maps), table, retain_graph=True)[0]
    got = torch.autograd.grad(sum(matrix.entropy().sum() for matrix in recording), table)[0]
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    assert wanted.abs().max() > 1e-3
    with record(model) as recording:
        model(text)
    assert not recording[0].entropy().requires_grad


@pytest.mark.parametrize("padded", [0, 1])
def test_rejected_draft_leaves_each_row_and_head_its_own_mask(padded: int) -> None:
    layer, x = MultiHeadAttention(12, 3), torch.randn(2, 7, 12)
    hidden = masks.keys([0, 1]) & masks.dense(torch.arange(2).view(2, 1, 1, 1) == padded)
    mask = masks.causal() & ~hidden & ~(masks.heads([2]) & masks.keys([2]))
    cache = KVCache(20)
    with torch.no_grad(), record(layer) as recording:
        layer(x, mask=mask, cache=cache)
        cache.truncate(4)
        layer(x[:, 4:6] + 1, mask=mask, cache=cache)
    changed = torch.cat([x[:, :4], x[:, 4:6] + 1], 1)
    assert len(recording.runs) == 1
    torch.testing.assert_close(recording[0].dense(), layer.matrix(changed, mask=mask).dense())


def test_matrix_read_while_recording_is_read_again_after_as_many_rows_were_replaced() -> None:
    layer, x, cache = MultiHeadAttention(12, 3), torch.randn(2, 7, 12), KVCache(20)
    with torch.no_grad(), record(layer) as recording:
        layer(x, mask=masks.causal(), cache=cache)
        before = recording[0].dense()
        cache.truncate(4)
        layer(x[:, 4:] + 1, mask=masks.causal(), cache=cache)
        after = recording[0].dense()
    changed = torch.cat([x[:, :4], x[:, 4:] + 1], 1)
    torch.testing.assert_close(before, layer.matrix(x, mask=masks.causal()).dense())
    torch.testing.assert_close(after, layer.matrix(changed, mask=masks.causal()).dense())


def test_rows_cut_from_a_larger_matrix_keep_their_weights() -> None:
    query, key = torch.randn(2, 6, 7, 4), torch.randn(2, 3, 7, 4)
    bias = positions.alibi([0.5, 0.25, 0.125, 0.1, 0.2, 0.3])
    whole = make_scores(query, key, masks.causal(), bias, None)
    part = at_own_positions(whole.narrow(slice(0, 2), slice(0, 6), slice(2, 4)))
    assert part.origin == (0, 0, 5)
    got, wanted = (AttentionMatrix._from_scores(scores).dense() for scores in (part, whole))
    torch.testing.assert_close(got, wanted[:, :, 2:4])


def alibi_layer() -> MultiHeadAttention:
    torch.manual_seed(0)
    return MultiHeadAttention(12, 3, position=positions.alibi([0.5, 0.25, 0.125]))


@pytest.mark.parametrize("make", [lambda: None, lambda: KVCache(20), lambda: SlidingWindowCache(3)])
def test_alibi_is_recorded_as_its_slopes(make: Callable[[], KVCache | None], tmp_path: Path) -> None:
    layer, x, cache = alibi_layer(), torch.randn(2, 7, 12), make()
    with torch.no_grad(), record(layer) as recording:
        for part in [x] if cache is None else x.split([3, 1, 3], 1):
            layer(part, mask=masks.causal(), cache=cache)
    assert isinstance(recording[0].operands.bias, positions.Alibi)
    mask = masks.causal() if cache is None or cache.window is None else masks.sliding_window(2)
    torch.testing.assert_close(recording[0].dense(), layer.matrix(x, mask=mask).dense())
    recording.save(tmp_path / "alibi.recording")
    again = Recording.load(tmp_path / "alibi.recording")
    assert isinstance(again[0].operands.bias, positions.Alibi)
    assert torch.equal(again[0].dense(), recording[0].dense())


def test_alibi_across_two_texts_is_a_tensor_where_calls_are_joined() -> None:
    bias = positions.alibi([0.5, 0.1, 0.2])

    class Across(nn.Module):
        """A text that grows, and attends to another one."""

        def forward(self, query: Tensor, text: Tensor, other: Tensor) -> Tensor:
            own = attention(query, text, text, mask=masks.causal())
            return own + attention(query, other, other, bias=bias)

    model, text, other = Across(), torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5, 8)
    calls = [AttentionMatrix(query, other, bias=bias).dense() for query in text.split(2, 2)]
    with record(model) as recording:
        model(text[:, :, :2], text[:, :, :2], other)
        model(text[:, :, 2:], text, other)
    torch.testing.assert_close(recording[1].dense(), torch.cat(calls, 2))


class Ring(nn.Module):
    """Its keys are the first text's own tensor, into which the next tokens are written."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
        self.cache: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in self.maps)
        if self.cache:
            self.cache[0][:, :, :1], self.cache[1][:, :, :1] = k, v
        else:
            self.cache = [k, v]
        return F.scaled_dot_product_attention(q, *self.cache)


def test_matrix_is_refused_if_recorded_tensors_were_written_into() -> None:
    model = Ring().eval()
    with torch.no_grad(), record(model) as recording:
        model(torch.randn(1, 6, 16))
        assert recording[0].dense().sum() == pytest.approx(12)
        model(torch.randn(1, 1, 16))
    with pytest.raises(RecordingError, match="wrote in place into recorded queries, keys or values"):
        recording.calls[0].matrix()
    assert recording.calls[1].matrix().dense().sum() == pytest.approx(2)


def test_layers_that_do_not_exist_are_refused_with_those_that_do() -> None:
    model = llama()
    for wrong in (7, "nope", ["model.layers.0.self_attn", 2]):
        with (
            pytest.raises(RecordingError, match=r"no attention site has the number or name .*model.layers.0.self_attn"),
            torch.no_grad(),
            record(model, layers=wrong),
        ):
            model(ids(1, 5))
    for right in (1, "model.layers.1.self_attn", [1]):
        with torch.no_grad(), record(model, layers=right) as recording:
            model(ids(1, 5))
        assert [site.name for site in recording.sites] == ["model.layers.1.self_attn"]


def test_save_refuses_a_recording_of_answers_alone(tmp_path: Path) -> None:
    with torch.no_grad(), record(llama(), reduce=Entropy()) as recording:
        pass
    recording.save(tmp_path / "nothing ran")
    model = llama()
    with torch.no_grad(), record(model, reduce=Entropy()) as recording:
        model(ids(1, 5))
    with pytest.raises(RecordingError, match="holds answers of reduce= and no queries or keys"):
        recording.save(tmp_path / "answers")


def test_call_matrix_does_not_join_the_other_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a file asks each call: with a join each, 400 tokens took half a minute."""
    from headscope.watching.recording.site import Site

    model = llama()
    with torch.no_grad(), record(model) as recording:
        model.generate(ids(1, 4), max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    whole = recording[0].dense()

    def never(site: Site) -> None:
        raise AssertionError("all steps were joined")

    monkeypatch.setattr(Site, "_joined_mask", never)
    calls = [call.matrix().dense() for call in recording.calls if call.name == recording.calls[0].name]
    assert [tuple(call.shape[2:]) for call in calls] == [(4, 4), (1, 5), (1, 6), (1, 7), (1, 8)]
    for row, call in enumerate(calls[1:], 4):
        torch.testing.assert_close(call[:, :, 0], whole[:, :, row, : row + 1])
