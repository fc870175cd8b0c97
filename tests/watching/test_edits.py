"""Edits do what they say, where they say, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch

from headscope import KVCache, MultiHeadAttention, ablate, edit, knock_out, masks, patch, positions, record
from headscope.errors import EditError
from headscope.watching.edits import freeze
from tests.tiny import bart, ids, llama, mistral

TEXT = ids(2, 7)


def logits(model: torch.nn.Module, *edits: object, text: torch.Tensor = TEXT) -> torch.Tensor:
    with torch.no_grad():
        if not edits:
            return model(text).logits
        with edit(model, *edits):
            return model(text).logits


def test_ablate_equals_zero_columns_of_the_output_projection() -> None:
    model = llama()
    expected = copy.deepcopy(model)
    with torch.no_grad():
        expected.model.layers[1].self_attn.o_proj.weight[:, 3 * 4 : 4 * 4] = 0
    got = logits(model, ablate(1, 3))
    assert torch.equal(got, logits(expected))
    assert (got - logits(model)).abs().max() > 0.1


def test_ablate_by_module_name_and_several_heads() -> None:
    model = llama()
    by_number = logits(model, ablate(0, 1), ablate(0, 4))
    by_name = logits(model, ablate("model.layers.0.self_attn", [1, 4]))
    assert torch.equal(by_number, by_name)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_knock_out_hides_the_link_and_renormalises(implementation: str) -> None:
    model = llama()
    model.set_attn_implementation(implementation)
    plain = logits(model)
    with torch.no_grad(), record(model) as before:
        model(TEXT)
    with torch.no_grad(), edit(model, knock_out(query=5, key=2, layers=0, heads=[1, 4])), record(model) as after:
        edited = model(TEXT, output_attentions=implementation == "eager")
    old, new = before[0].dense(), after[0].dense()
    expected = old.clone()
    row = expected[:, [1, 4], 5]
    row[..., 2] = 0
    expected[:, [1, 4], 5] = row / row.sum(-1, keepdim=True)
    torch.testing.assert_close(new, expected, atol=1e-6, rtol=0)
    assert new[:, [1, 4], 5, 2].abs().max() == 0
    assert torch.equal(edited.logits[:, :5], plain[:, :5])
    assert (edited.logits[:, 5:] - plain[:, 5:]).abs().max() > 1e-3
    if implementation == "eager":
        torch.testing.assert_close(edited.attentions[0], new, atol=1e-6, rtol=0)


def test_knock_out_of_all_keys_writes_zeros() -> None:
    model = llama()
    same = logits(model, knock_out(query=0, key=0, layers=1))
    expected = logits(model, ablate(1, range(6)))
    torch.testing.assert_close(same[:, 0], expected[:, 0])


def test_patch_applies_the_weights_of_another_text_to_the_values_of_this_one() -> None:
    model = llama()
    with torch.no_grad():
        with record(model) as other:
            model(ids(2, 7, seed=1))
        with record(model, keep=("query", "key", "value", "output")) as own:
            model(TEXT)
        with edit(model, patch(1, [2, 4], from_=other)), record(model, keep=("query", "key", "output")) as edited:
            model(TEXT)
    new = edited[1].dense()
    torch.testing.assert_close(new[:, [2, 4]], other[1].dense()[:, [2, 4]], atol=1e-6, rtol=0)
    torch.testing.assert_close(new[:, [0, 1, 3, 5]], own[1].dense()[:, [0, 1, 3, 5]], atol=1e-6, rtol=0)
    value = own.sites[1].value().repeat_interleave(3, 1)
    output = edited.sites[1].output()
    torch.testing.assert_close(output, new @ value, atol=1e-5, rtol=0)


def test_patch_with_its_own_recording_changes_nothing() -> None:
    model = llama()
    with torch.no_grad(), record(model) as own:
        model(TEXT)
    torch.testing.assert_close(logits(model, patch(1, range(6), from_=own)), logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_knock_out_counts_positions_in_the_whole_generated_text(options: dict[str, str]) -> None:
    model = llama()
    with torch.no_grad(), edit(model, knock_out(range(8, 11), 2, layers=0)), record(model) as recording:
        model.generate(TEXT, max_new_tokens=6, pad_token_id=0, do_sample=False, **options)
    weights = recording[0].dense()
    assert weights.shape[2:] == (12, 12)
    assert weights[:, :, 8:11, 2].abs().max() == 0
    assert (weights[:, :, [7, 11], 2] > 0).all()


def test_knock_out_counts_positions_with_a_sliding_cache() -> None:
    model = mistral(window=4)
    with torch.no_grad(), edit(model, knock_out(10, 9, layers=0)), record(model) as recording:
        model.generate(TEXT, max_new_tokens=6, pad_token_id=0, do_sample=False)
    weights = recording[0].dense()
    assert weights[:, :, 10, 9].abs().max() == 0
    assert (weights[:, :, 11, 9] > 0).all()
    assert (weights[:, :, 10, 8] > 0).all()


def test_knock_out_in_cross_attention_counts_queries_from_0() -> None:
    model = bart()
    with torch.no_grad(), record(model) as before:
        model(input_ids=ids(2, 9), decoder_input_ids=ids(2, 5))
    cross = next(i for i, site in enumerate(before.sites) if "encoder_attn" in site.name)
    with torch.no_grad(), edit(model, knock_out(1, 8, layers=cross)), record(model) as after:
        model(input_ids=ids(2, 9), decoder_input_ids=ids(2, 5))
    assert after[cross].shape[2:] == (5, 9)
    hidden = (after[cross].dense() == 0).nonzero()[:, 2:].unique(dim=0)
    assert hidden.tolist() == [[1, 8]]


@pytest.mark.parametrize("fast", [True, False], ids=["fast path", "slow path"])
def test_edits_apply_in_torch_nn(fast: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(24, 6, 32, batch_first=True, dropout=0.0).train(not fast)
    x = torch.randn(2, 7, 24)
    expected = copy.deepcopy(layer)
    with torch.no_grad():
        expected.self_attn.out_proj.weight[:, 8:12] = 0
        with edit(layer, ablate(0, 2)):
            got = layer(x)
        torch.testing.assert_close(got, expected(x), atol=1e-5, rtol=0)
        assert (got - layer(x)).abs().max() > 1e-2


def test_edit_passes_gradients() -> None:
    model = llama()
    with edit(model, ablate(1, 3), knock_out(5, 2, layers=0)):
        model(TEXT).logits.sum().backward()
    projection = model.model.layers[1].self_attn.o_proj.weight.grad
    assert projection[:, 12:16].abs().max() == 0
    assert projection[:, :12].abs().max() > 0
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


def test_model_is_unchanged_after_the_block() -> None:
    model = llama()
    before = logits(model)
    with pytest.raises(RuntimeError, match="on purpose"), edit(model, ablate(0, range(6))):
        raise RuntimeError("on purpose")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (ablate(17, 0), r"layers=\(17,\).*changed nothing"),
        (ablate([0, 99], 0), r"names the layer 99, and no attention call had it"),
        (ablate(0, 41), "has 6 heads, counted from 0; there is no head 41"),
        (knock_out(500, 2), "changed nothing"),
    ],
)
def test_edits_that_apply_nowhere_are_refused(change: object, text: str) -> None:
    model = llama()
    with pytest.raises(EditError, match=text), torch.no_grad(), edit(model, change):
        model(TEXT)


def test_patch_from_a_shorter_text_is_refused() -> None:
    model = llama()
    with torch.no_grad(), record(model) as shorter:
        model(ids(2, 6))
    refused = pytest.raises(EditError, match=r"\(2, 6, 7, 7\).*\(2, 6, 6, 6\)")
    with refused, torch.no_grad(), edit(model, patch(0, 1, from_=shorter)):
        model(TEXT)


def test_edits_refuse_dropout_and_gradient_checkpointing() -> None:
    model = llama(attention_dropout=0.37).train()
    with pytest.raises(EditError, match="drops 37 % of its weights"), edit(model, knock_out(5, 2)):
        model(TEXT)
    model = llama().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(EditError, match="gradient_checkpointing_disable"), edit(model, ablate(0, 0)):
        model(TEXT)


def test_positions_are_checked() -> None:
    with pytest.raises(EditError, match="head is -3"):
        ablate(0, -3)
    with pytest.raises(EditError, match="query is"):
        knock_out([], 3)
    with pytest.raises(EditError, match="head is True"):
        ablate(0, True)
    with pytest.raises(ValueError, match="a layer is True"):
        ablate(True, 0)


def test_mean_ablation_writes_the_mean_at_every_position() -> None:
    model = llama()
    means = torch.randn(2, 6, 4)
    with torch.no_grad(), edit(model, ablate(None, [1, 4], to=means)), record(model, keep=_KEPT) as edited:
        several = model(TEXT).logits
    for layer in range(2):
        output = edited.sites[layer].output()
        expected = means[layer, [1, 4], None].expand(2, 2, 7, 4)
        assert torch.equal(output[:, [1, 4]], expected)
        assert output[:, [0, 2, 3, 5]].std(2).min() > 0
    one_by_one = logits(model, ablate(0, [1, 4], to=means[0]), ablate(1, [1, 4], to=means[1]))
    assert torch.equal(several, one_by_one)


_KEPT = ("query", "key", "output")


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((6, 9), r"`to` is \(6, 9\) at model.layers.1.self_attn, whose heads write \(6, 4\)"),
        ((2, 5, 4), r"`to` is \(5, 4\) at .* write \(6, 4\)"),
        ((1, 6, 4), r"`to` is \(1, 6, 4\), \[layers, H, Dv\], and has no site 1"),
    ],
)
def test_ablate_refuses_means_of_another_shape(shape: tuple[int, ...], text: str) -> None:
    model = llama()
    with pytest.raises(EditError, match=text), torch.no_grad(), edit(model, ablate(1, 3, to=torch.zeros(shape))):
        model(TEXT)


def test_ablate_refuses_means_that_are_no_table() -> None:
    with pytest.raises(EditError, match=r"`to` is \(17,\); wanted means"):
        ablate(1, 3, to=torch.zeros(17))


def test_freeze_alone_changes_nothing() -> None:
    model = llama()
    with torch.no_grad(), record(model) as clean:
        model(TEXT)
    torch.testing.assert_close(logits(model, freeze(from_=clean)), logits(model), atol=1e-5, rtol=0)


def test_freeze_keeps_weights_while_an_early_head_is_ablated() -> None:
    model = llama()
    with torch.no_grad():
        with record(model, keep=("query", "key", "value")) as clean:
            model(TEXT)
        with edit(model, ablate(0, 3)), record(model) as free:
            model(TEXT)
        with (
            edit(model, ablate(0, 3), freeze(from_=clean)),
            record(model, keep=("query", "key", "value", "output")) as recording,
        ):
            output = model(TEXT).logits
    torch.testing.assert_close(recording[1].dense(), clean[1].dense(), atol=1e-6, rtol=0)
    assert (free[1].dense() - clean[1].dense()).abs().max() > 1e-2
    sites = recording.sites
    assert sites[0].output()[:, 3].abs().max() == 0, "freeze does not undo the ablation, wherever it stands"
    assert sites[0].output()[:, 2].abs().max() > 0
    assert (sites[1].value() - clean.sites[1].value()).abs().max() > 1e-2, "values are of now"
    value = sites[1].value().repeat_interleave(3, 1)
    torch.testing.assert_close(sites[1].output(), clean[1].dense() @ value, atol=1e-5, rtol=0)
    assert torch.equal(output, logits(model, freeze(from_=clean), ablate(0, 3)))
    assert (output - logits(model, ablate(0, 3))).abs().max() > 1e-2


def test_freeze_takes_layers() -> None:
    model = llama()
    with torch.no_grad(), record(model) as other:
        model(ids(2, 7, seed=1))
    with torch.no_grad(), edit(model, freeze(from_=other, layers=1)), record(model) as frozen:
        model(TEXT)
    torch.testing.assert_close(frozen[1].dense(), other[1].dense(), atol=1e-6, rtol=0)
    assert (frozen[0].dense() - other[0].dense()).abs().max() > 1e-2


def test_freeze_refuses_a_recording_that_does_not_fit() -> None:
    model = llama()
    with torch.no_grad():
        with record(model) as shorter:
            model(ids(2, 6))
        with record(model, layers=[1]) as part:
            model(TEXT)
        with (
            pytest.raises(EditError, match=r"freeze: .*\(2, 6, 7, 7\).*\(2, 6, 6, 6\)"),
            edit(model, freeze(from_=shorter)),
        ):
            model(TEXT)
        with (
            pytest.raises(EditError, match=r"freeze: the recording has no site 'model\.layers\.0\.self_attn'"),
            edit(model, freeze(from_=part)),
        ):
            model(TEXT)


def test_patch_keeps_alibi_as_its_slopes() -> None:
    """One head attends as it did in another text, also where the calls are parts of a longer one."""
    torch.manual_seed(0)
    layer = MultiHeadAttention(12, 3, position=positions.alibi([0.5, 0.25, 0.125]))
    x, other = torch.randn(1, 7, 12), torch.randn(1, 9, 12)
    of_other, of_text = (layer.matrix(text, mask=masks.causal()).dense() for text in (other, x))
    for sizes in ([7], [4, 1, 2]):
        cache = KVCache(7)
        with torch.no_grad(), record(layer) as long:
            layer(other[:, : 7 if sizes == [7] else 9], mask=masks.causal())
        with torch.no_grad(), edit(layer, patch(0, 1, from_=long)), record(layer) as edited:
            for part in x.split(sizes, 1):
                layer(part, mask=masks.causal(), cache=cache)
        assert isinstance(edited[0].operands.bias, positions.Alibi)
        for call, stop in zip(edited.calls, torch.tensor(sizes).cumsum(0).tolist(), strict=True):
            rows = slice(stop - call.shape[2], stop)
            got = call.matrix().dense()
            torch.testing.assert_close(got[:, 1], of_other[:, 1, rows, :stop])
            torch.testing.assert_close(got[:, [0, 2]], of_text[:, [0, 2], rows, :stop])


def test_same_text_again_is_edited_as_the_first_time() -> None:
    model, text = llama(), ids(1, 10)
    with torch.no_grad(), record(model) as other:
        model(ids(1, 14, seed=1))
    for change in (knock_out(8, 1), knock_out(8, 1, layers=0), patch(0, 2, from_=other), freeze(from_=other)):
        with torch.no_grad(), edit(model, change), record(model) as recording:
            first, second, third = (model(text).logits for _ in range(3))
        assert not torch.equal(first, model(text).logits)
        assert torch.equal(first, second)
        assert torch.equal(first, third)
        assert len(recording.runs) == 3


def test_other_queries_of_the_same_memory_are_another_text() -> None:
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(16, 4, batch_first=True).eval()
    memory = torch.randn(2, 6, 16)
    with torch.no_grad(), edit(attention, knock_out(0, 1)), record(attention) as recording:
        for _ in range(2):
            attention(torch.randn(2, 3, 16), memory, memory)
    for run in recording.runs:
        dense = run[0].dense()
        assert (dense[:, :, 0, 1] == 0).all()
        assert (dense[:, :, 1:, 1] > 0).all()


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("training", [True, False])  # torch's slow path and its fast one
def test_multihead_attention_returns_the_edited_weights(average: bool, batched: bool, training: bool) -> None:
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(16, 4, batch_first=True).train(training)
    x = torch.randn(2, 6, 16) if batched else torch.randn(6, 16)
    options = {"need_weights": True, "average_attn_weights": average}
    with torch.no_grad():
        plain = attention(x, x, x, **options)[1]
        with edit(attention, knock_out(2, 1, heads=3)), record(attention) as recording:
            weights = attention(x, x, x, **options)[1]
        with edit(attention, knock_out(2, 1)):
            assert attention(x, x, x, need_weights=False)[1] is None
    assert weights.shape == plain.shape
    wanted = recording[0].dense()
    wanted = wanted.mean(1) if average else wanted
    torch.testing.assert_close(weights, wanted if batched else wanted[0])
    assert (weights - plain).abs().amax() > 1e-3


def test_ablation_is_not_undone_by_other_edits() -> None:
    model = llama()
    with torch.no_grad(), record(model) as recording:
        model(ids(2, 7, seed=5))
    for other in (knock_out(5, 2), patch(1, 3, from_=recording), freeze(from_=recording)):
        first, last = logits(model, ablate(1, 3), other), logits(model, other, ablate(1, 3))
        assert torch.equal(first, last)
        assert (first - logits(model, other)).abs().max() > 0.01


def test_edits_of_heads_that_share_keys_can_be_in_any_order() -> None:
    """A patched head has keys of its own, so that values are no longer shared as the model shares them."""
    model = llama()
    with torch.no_grad(), record(model) as recording:
        model(ids(2, 7, seed=5))
    with torch.no_grad(), edit(model, patch(0, 1, from_=recording)), record(model) as patched:
        alone = model(TEXT).logits
    torch.testing.assert_close(logits(model, freeze(from_=patched)), alone)
    for head in (1, 2):  # the patched head's own link, and another's
        edits = patch(0, 1, from_=recording), knock_out(5, 2, layers=[0], heads=[head])
        with torch.no_grad(), edit(model, *edits), record(model) as seen:
            model(TEXT)
        whole = seen[0].dense()
        torch.testing.assert_close(whole.sum(-1), torch.ones_like(whole[..., 0]))
        assert bool((whole[:, head, 5, 2] == 0).all())
        others = [h for h in range(whole.shape[1]) if h != head]
        torch.testing.assert_close(whole[:, others], patched[0].dense()[:, others])
