"""Effects of heads and links against edits of one head at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from headscope import ablate, edit, knock_out, record
from headscope.errors import EditError
from headscope.heads.effects import (
    HeadEffects,
    agreement,
    head_effects,
    head_means,
    head_sums,
    link_effect,
    link_effects,
    next_token_loss,
)
from headscope.watching.edits import Edit
from headscope.watching.hooks import with_output
from tests.tiny import VOCABULARY, bart, ids, llama

TEXT = ids(2, 7)
PADDED = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])


def gpt2(**options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=4, n_positions=32, initializer_range=0.5, **options
    )
    return GPT2LMHeadModel(config).eval()


def bert(kind: str = "BertModel") -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(**_encoder(), num_hidden_layers=2)
    return getattr(transformers, kind)(config).eval()


def albert() -> torch.nn.Module:
    from transformers import AlbertConfig, AlbertModel

    torch.manual_seed(0)
    return AlbertModel(AlbertConfig(**_encoder(), num_hidden_layers=2, embedding_size=12)).eval()


def _encoder() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
        "initializer_range": 0.5,
    }


def loss(logits: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """The same as the default metric, row by row through torch's own loss."""
    rows = []
    for row, tokens, is_text in zip(logits, text, mask.bool(), strict=True):
        pairs = is_text[1:] & is_text[:-1]
        rows.append(torch.nn.functional.cross_entropy(row[:-1][pairs], tokens[1:][pairs]))
    return torch.stack(rows)


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def one_at_a_time(model: torch.nn.Module, mask: Tensor, layers: int, heads: int, to: Tensor | None = None) -> Tensor:
    """[B, layers, H] by an edit for each head."""
    table = torch.zeros(2, layers, heads)
    with torch.no_grad():
        clean = model(TEXT, attention_mask=mask)
        for layer in range(layers):
            for head in range(heads):
                with edit(model, ablate(layer, head, to=to)):
                    changed = model(TEXT, attention_mask=mask)
                if hasattr(clean, "logits"):
                    gap = loss(changed.logits, TEXT, mask) - loss(clean.logits, TEXT, mask)
                else:
                    both = [pooled(output.last_hidden_state, mask) for output in (clean, changed)]
                    gap = 1 - torch.nn.functional.cosine_similarity(*both)
                table[:, layer, head] = gap
    return table


@pytest.mark.parametrize(
    ("make", "heads", "unit", "note", "mask"),
    [
        (llama, 6, "nats per token", None, torch.ones_like(PADDED)),
        (llama, 6, "nats per token", None, PADDED),
        (gpt2, 4, "nats per token", None, PADDED),
        (bert, 4, "1 - cosine", None, torch.ones_like(PADDED)),
        (bert, 4, "1 - cosine", None, PADDED),
        (albert, 4, "1 - cosine", "called more than once", PADDED),
    ],
    ids=["llama", "llama padded", "gpt2 padded", "bert", "bert padded", "albert padded"],
)
def test_head_effects_of_all_heads_are_edits_of_one_at_a_time(
    make: Any, heads: int, unit: str, note: str | None, mask: Tensor
) -> None:
    model = make()
    effects = head_effects(model, TEXT, attention_mask=mask)
    expected = one_at_a_time(model, mask, 2, heads)
    torch.testing.assert_close(effects.per_example.float(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(effects.values.float(), expected.mean(0), atol=1e-4, rtol=1e-4)
    assert expected.abs().max() > 1e-2
    assert effects.unit == unit
    assert effects.notes == () if note is None else note in effects.notes[0]


def test_head_effects_of_an_encoder_decoder_replicate_rows() -> None:
    model = bart(encoder_layers=1, decoder_layers=1)
    mask = torch.ones_like(TEXT)
    with pytest.raises(EditError, match=r"BartForConditionalGeneration does not predict the next token"):
        head_effects(model, TEXT)
    effects = head_effects(model, TEXT, metric=loss)
    assert "not one in each layer of one ModuleList" in effects.notes[0]
    torch.testing.assert_close(effects.per_example.float(), one_at_a_time(model, mask, 3, 6), atol=1e-4, rtol=1e-4)
    assert effects.unit == "the metric's"


def test_head_effects_with_means_are_edits_with_means() -> None:
    model = llama()
    means = head_means(model, [ids(3, 9, seed=1)])
    effects = head_effects(model, TEXT, to=means)
    expected = one_at_a_time(model, torch.ones_like(TEXT), 2, 6, to=means)
    torch.testing.assert_close(effects.per_example.float(), expected, atol=1e-4, rtol=1e-4)
    assert (effects.values - head_effects(model, TEXT).values).abs().max() > 1e-2


def test_clean_is_the_loss_of_the_unchanged_model() -> None:
    model = llama()
    with torch.no_grad():
        expected = loss(model(TEXT).logits, TEXT, torch.ones_like(TEXT))
    for method in ("ablate", "gradient"):
        clean = head_effects(model, TEXT, method=method, heads=[(0, 1)]).clean
        torch.testing.assert_close(clean.float(), expected, atol=1e-5, rtol=0)


def test_head_effects_are_nan_for_heads_that_are_not_chosen() -> None:
    model = llama()
    whole = head_effects(model, TEXT)
    progress: list[tuple[int, int]] = []
    some = head_effects(model, TEXT, heads=[(1, 4), (0, 2)], on_progress=lambda done, of: progress.append((done, of)))
    assert torch.isfinite(some.values).nonzero().tolist() == [[0, 2], [1, 4]]
    torch.testing.assert_close(some.values[1, 4], whole.values[1, 4], atol=1e-5, rtol=0)
    assert progress == [(2, 4), (4, 4)]


def count_rows(model: torch.nn.Module, limit: int | None = None) -> tuple[list[list[int]], Any]:
    """How many rows each decoder layer ran on; refuses more than ``limit`` for want of memory."""
    row_counts: list[list[int]] = [[], []]

    def note(index: int) -> Any:
        def after(module: Any, args: Any, output: Any) -> None:
            if limit is not None and output.shape[0] > limit:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            row_counts[index].append(output.shape[0])

        return after

    return row_counts, [layer.register_forward_hook(note(i)) for i, layer in enumerate(model.model.layers)]


def test_ablation_batch_grows_from_layer_to_layer() -> None:
    model = llama()
    row_counts, _ = count_rows(model)
    head_effects(model, TEXT[:1])
    assert row_counts == [[1, 7], [1, 13]]


def test_ablation_groups_fit_batch_bytes() -> None:
    model = llama()
    expected = head_effects(model, TEXT)
    row_counts, _ = count_rows(model)
    few = head_effects(model, TEXT, batch_bytes=30_000)
    assert len(row_counts[1]) > 4
    torch.testing.assert_close(few.per_example, expected.per_example, atol=1e-5, rtol=0)
    assert few.notes == ()


def test_ablation_halves_the_group_when_out_of_memory() -> None:
    model = llama()
    expected = head_effects(model, TEXT)
    _, handles = count_rows(model, limit=4)
    halved = head_effects(model, TEXT)
    torch.testing.assert_close(halved.per_example, expected.per_example, atol=1e-5, rtol=0)
    assert halved.notes == (
        "out of memory with 12 heads at a time: went on with 6",
        "out of memory with 6 heads at a time: went on with 3",
    )
    for handle in handles:
        handle.remove()
    count_rows(model, limit=1)
    with pytest.raises(RuntimeError, match="can't allocate"):
        head_effects(model, TEXT)


def test_ablation_replicates_rows_where_a_layer_mixes_them() -> None:
    model = llama()

    def mix(module: Any, args: Any, output: Tensor) -> Tensor:
        return output + (output[-1:] - output[:1])

    expected = head_effects(model, TEXT, heads=[(0, 1)])
    handle = model.model.layers[1].register_forward_hook(mix)
    effects = head_effects(model, TEXT, heads=[(0, 1)])
    handle.remove()
    assert "the unchanged row came out differently" in effects.notes[0]
    assert expected.notes == ()


def test_ablation_replicates_rows_where_a_layer_refuses_the_grown_batch() -> None:
    model = llama()
    expected = head_effects(model, TEXT)

    def refuse(module: Any, args: Any, output: Tensor) -> None:
        if output.shape[0] == 7:
            raise ValueError("seven rows of 23")

    model.model.layers[0].register_forward_hook(refuse)
    effects = head_effects(model, TEXT)
    assert effects.notes == (
        "each changed row ran from the first layer on, not from its own (ValueError: seven rows of 23)",
    )
    torch.testing.assert_close(effects.per_example, expected.per_example, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["ablate", "gradient"])
def test_head_effects_leave_no_hooks_after_a_failure(method: str) -> None:
    model = llama()
    with torch.no_grad():
        before = model(TEXT).logits

    def hooks() -> int:
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())

    def broken(logits: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        raise RuntimeError("on purpose")

    count = hooks()
    with pytest.raises(RuntimeError, match="on purpose"):
        head_effects(model, TEXT, metric=broken, method=method)
    handle = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        head_effects(model, TEXT, method=method)
    handle.remove()
    assert hooks() == count
    with torch.no_grad():
        assert torch.equal(model(TEXT).logits, before)


class Gates(Edit):
    """The outputs of a layer's heads times numbers, [B, H]."""

    factors: Tensor

    def __init__(self, layer: int, factors: Tensor) -> None:
        super().__init__((layer,))
        object.__setattr__(self, "factors", factors)

    def apply(self, call: Any, place: Any) -> Any:
        return with_output(call, call.head_outputs() * self.factors[:, :, None, None])


@pytest.mark.parametrize(("make", "step", "close"), [(llama, 3e-3, 1e-3), (gpt2, 1e-5, 1e-6)])
def test_gradient_is_the_finite_difference_of_the_gate(make: Any, step: float, close: float) -> None:
    # Llama's norm computes in float32 also in a float64 model, so its differences are coarser.
    model = make().double()
    effects = head_effects(model, TEXT, attention_mask=PADDED, method="gradient")
    assert effects.method == "gradient"
    batch, layers, heads = effects.per_example.shape
    rows = (2, layers, heads, batch)  # every row of one forward: the sign, the layer and the head of a gate, a text
    factors = torch.ones(*rows, layers, heads, dtype=torch.float64)
    for layer in range(layers):
        for head in range(heads):
            factors[0, layer, head, :, layer, head] += step
            factors[1, layer, head, :, layer, head] -= step
    texts, mask = (x.repeat(2 * layers * heads, 1) for x in (TEXT, PADDED))
    gates = [Gates(layer, factors.flatten(0, 3)[:, layer]) for layer in range(layers)]
    with torch.no_grad(), edit(model, *gates):
        up, down = loss(model(texts, attention_mask=mask).logits, texts, mask).view(rows)
    slopes = ((up - down) / (2 * step)).movedim(-1, 0)
    torch.testing.assert_close(effects.per_example, slopes.abs(), atol=close, rtol=close)
    assert (effects.values - slopes.mean(0).abs()).abs().max() > 1e-2, "absolute values are taken per example"


def test_gradient_in_parts_is_the_same_and_sets_no_parameter_gradients() -> None:
    model = llama()
    whole = head_effects(model, TEXT, method="gradient")
    parts = head_effects(model, TEXT, method="gradient", batch_bytes=1, heads=[(1, 3)])
    torch.testing.assert_close(parts.per_example[:, 1, 3], whole.per_example[:, 1, 3], atol=1e-6, rtol=1e-5)
    assert int(parts.values.isfinite().sum()) == 1
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradient_halves_the_texts_when_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from headscope.heads.effects import ablation as module

    inner = vars(module)["gate_gradients"]

    def small(model: Any, ids: torch.Tensor, *args: Any) -> Any:
        return torch.empty(1 << 60) if len(ids) > 1 else inner(model, ids, *args)  # as it fails on a CPU

    model = llama()
    whole = head_effects(model, TEXT, method="gradient")
    monkeypatch.setattr(module, "gate_gradients", small)
    halved = head_effects(model, TEXT, method="gradient")
    torch.testing.assert_close(halved.per_example, whole.per_example, atol=1e-6, rtol=1e-5)
    assert halved.notes == (f"out of memory with {len(TEXT)} texts at a time: went on with {len(TEXT) // 2}",)
    monkeypatch.setattr(module, "gate_gradients", lambda *args: torch.empty(1 << 60))
    with pytest.raises(RuntimeError, match="memory"):
        head_effects(model, TEXT, method="gradient")


def test_gradient_works_with_frozen_parameters_under_no_grad() -> None:
    model = llama().requires_grad_(False)
    with torch.no_grad():
        assert head_effects(model, TEXT, method="gradient").values.min() > 0


def table(values: list[list[float]], examples: Tensor | None = None) -> HeadEffects:
    mean = torch.tensor(values, dtype=torch.float64)
    return HeadEffects(mean, mean[None] if examples is None else examples, torch.zeros(1), "nats per token", "ablate")


def test_normalized_divides_by_the_norm_of_the_layer() -> None:
    got = table([[3, 4, math.nan], [0, 0, 0]]).normalized()
    expected = torch.tensor([[0.6, 0.8, math.nan], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(got.values, expected, equal_nan=True)
    torch.testing.assert_close(got.per_example[0], expected, equal_nan=True)
    assert got.unit == "nats per token, ÷ the layer's norm"


def test_agreement_is_the_correlation_of_ranks() -> None:
    assert agreement(table([[1, 2, 9]]), table([[3, 4, 5]])) == pytest.approx(1)
    assert agreement(table([[1, 2, 9]]), table([[5, 4, 3]])) == pytest.approx(-1)
    # ranks 1.5 1.5 3 4 and 1 2 3 4: 4.5 / sqrt(4.5 * 5)
    assert agreement(table([[1, 1], [7, 8]]), table([[1, 2], [3, 4]])) == pytest.approx(4.5 / math.sqrt(22.5))
    assert agreement(table([[1, math.nan, 9]]), table([[3, 4, 5]])) == pytest.approx(1)
    assert math.isnan(agreement(table([[2, 2, 2]]), table([[3, 4, 5]])))
    with pytest.raises(ValueError, match=r"\(1, 3\) and \(2, 1\), \[layers, H\]"):
        agreement(table([[1, 2, 3]]), table([[1], [2]]))
    with pytest.raises(ValueError, match="1 heads are in both"):
        agreement(table([[1, math.nan]]), table([[3, 4]]))


def test_interval_is_a_bootstrap_over_examples() -> None:
    examples = torch.randn(40, 2, 3, dtype=torch.float64)
    effects = table(examples.mean(0).tolist(), examples)
    low, high = effects.interval(replicates=4000)
    half = 1.96 * examples.std(0, correction=0) / math.sqrt(40)
    torch.testing.assert_close(low, effects.values - half, atol=0.04, rtol=0)
    torch.testing.assert_close(high, effects.values + half, atol=0.04, rtol=0)
    assert torch.equal(low, effects.interval(replicates=4000)[0])
    assert bool((effects.interval(0.5)[0] > low).all())
    with pytest.raises(ValueError, match="over 1 example"):
        table([[1, 2]]).interval()
    with pytest.raises(ValueError, match=r"level=1\.7"):
        effects.interval(1.7)


def test_head_means_are_over_text_only_and_parts_add_up() -> None:
    model = llama()
    other = ids(1, 5, seed=3)
    with torch.no_grad(), record(model, keep=("query", "key", "output")) as recording:
        model(TEXT, attention_mask=PADDED)
        model(other)
    expected = []
    for layer in range(2):
        first, second = (run.sites[layer].output() for run in recording.runs)
        expected.append(torch.cat([first[0].mT, first[1, :, :5].mT, second[0].mT], 2).mean(2))
    batches: list[Any] = [{"input_ids": TEXT, "attention_mask": PADDED}, other]
    means = head_means(model, iter(batches))
    torch.testing.assert_close(means, torch.stack(expected), atol=1e-5, rtol=0)
    sums, counts = (a + b for a, b in zip(head_sums(model, batches[:1]), head_sums(model, batches[1:]), strict=True))
    assert counts.tolist() == [17, 17]
    torch.testing.assert_close((sums / counts[:, None, None]).float(), means)
    with pytest.raises(EditError, match="heads of 0 shapes"):
        head_means(model, [])


def test_next_token_loss_counts_text_only() -> None:
    logits = torch.randn(2, 7, VOCABULARY)
    torch.testing.assert_close(next_token_loss(logits, TEXT, PADDED), loss(logits, TEXT, PADDED))


def test_link_effect_is_the_change_of_the_next_token() -> None:
    model = llama()
    text = TEXT[:1]
    effect = link_effect(model, text, query=6, key=[2, 3], layers=1, heads=[0, 5], top=3)
    with torch.no_grad():
        clean = model(text).logits[0, -1].softmax(-1)
        with edit(model, knock_out(6, [2, 3], layers=1, heads=[0, 5])):
            edited = model(text).logits[0, -1].softmax(-1)
    assert effect.kl == pytest.approx(float((clean * (clean / edited).log()).sum()), abs=1e-5)
    assert effect.kl > 1e-3
    assert [token for token, _ in effect.clean] == clean.topk(3).indices.tolist()
    assert [token for token, _ in effect.edited] == edited.topk(3).indices.tolist()
    assert {c.token_id for c in effect.changes} == {token for token, _ in (*effect.clean, *effect.edited)}
    for change in effect.changes:
        expected = float(edited[change.token_id] - clean[change.token_id])
        assert change.change == pytest.approx(expected, abs=1e-5)
    sizes = [abs(change.change) for change in effect.changes]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(("make", "heads"), [(llama, 6), (gpt2, 4)])
def test_link_effects_of_every_head_are_those_of_one_at_a_time(make: Any, heads: int) -> None:
    model, text = make(), TEXT[:1]
    effect = link_effects(model, text, query=[5, 6], key=2)
    assert effect.notes == ()
    for layer in range(2):
        whole = link_effect(model, text, [5, 6], 2, layers=layer).kl
        assert float(effect.layers[layer]) == pytest.approx(whole, rel=1e-3, abs=1e-5)
        for head in range(heads):
            single = link_effect(model, text, [5, 6], 2, layers=layer, heads=head).kl
            assert float(effect.heads[layer, head]) == pytest.approx(single, rel=1e-3, abs=1e-5)
    assert effect.everywhere == link_effect(model, text, [5, 6], 2)
    assert float(effect.heads.max()) > 1e-3


def test_link_effects_of_a_later_key_are_zero_in_a_decoder() -> None:
    assert link_effects(llama(), TEXT[:1], 2, 5).heads.abs().max() < 1e-9


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"method": "shapley"}, ValueError, "'shapley': wanted 'ablate' or 'gradient'"),
        ({"method": "gradient", "to": torch.zeros(2, 6, 4)}, ValueError, "leave one of them out"),
        ({"attention_mask": torch.ones(2, 5)}, ValueError, r"\(2, 5\) and input_ids \(2, 7\)"),
        ({"heads": []}, ValueError, "heads is empty"),
        ({"heads": [(1, 17)]}, EditError, r"no head 1.17: the model has 2 attention sites with up to 6 heads"),
        ({"heads": [(-1, 0)]}, EditError, r"no head -1.0"),
        ({"to": torch.zeros(2, 6, 9)}, EditError, r"to is \(2, 6, 9\), and this model's heads are \(2, 6, 4\)"),
        ({"metric": lambda logits, text, mask: logits.mean()}, ValueError, r"gave \(\) for 1 rows"),
        ({"metric": lambda logits, text, mask: 0.5}, ValueError, "gave float for 1 rows"),
        ({"attention_mask": torch.tensor([[1] * 7, [1] + [0] * 6])}, ValueError, "row 1 of input_ids has no two"),
    ],
)
def test_head_effects_refuse_wrong_arguments(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        head_effects(llama(), TEXT, **options)


def test_head_effects_refuse_models_without_a_next_token() -> None:
    with pytest.raises(ValueError, match=r"input_ids is \(7,\): wanted \[B, T\]"):
        head_effects(llama(), TEXT[0])
    with pytest.raises(EditError, match=r"LlamaForCausalLM is in training mode.*model.eval\(\)"):
        head_effects(llama().train(), TEXT)
    with pytest.raises(EditError, match=r"BertModel has no output head.*every gradient is zero"):
        head_effects(bert(), TEXT, method="gradient")
    with pytest.raises(EditError, match=r"BertForMaskedLM does not predict.*first position sees its last"):
        head_effects(bert("BertForMaskedLM"), TEXT, attention_mask=PADDED)
    with pytest.raises(EditError, match=r"it gives \(1, 2\) for one row"):
        head_effects(bert("BertForSequenceClassification"), TEXT)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=12, n_layer=1, n_head=3, n_positions=6)).eval()
    with pytest.raises(ValueError, match="input_ids has 7 tokens, and GPT2LMHeadModel has 6 positions"):
        head_effects(gpt2, torch.ones(1, 7, dtype=torch.long))
    sizes = {"vocab_size": 20, "d_model": 12, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 3}
    with pytest.raises(EditError, match=r"T5ForConditionalGeneration does not predict .* give model.get_encoder\(\)"):
        head_effects(T5ForConditionalGeneration(T5Config(**sizes)).eval(), torch.ones(1, 5, dtype=torch.long))
    with pytest.raises(EditError, match="no attention call was seen"):
        head_effects(torch.nn.Embedding(VOCABULARY, 5).eval(), TEXT)


def test_gradient_of_an_encoder_with_a_metric_of_ones_own() -> None:
    effects = head_effects(bert(), TEXT, method="gradient", metric=lambda hidden, text, mask: hidden[:, 0, 3])
    assert effects.values.min() > 0


def test_link_effects_refuse_wrong_arguments() -> None:
    model = llama()
    with pytest.raises(ValueError, match=r"input_ids is \(2, 7\): wanted one text"):
        link_effect(model, TEXT, 6, 2)
    with pytest.raises(EditError, match=r"key is \(41,\): wanted positions from 0 to 6"):
        link_effects(model, TEXT[:1], 6, 41)
    with pytest.raises(ValueError, match="top is 0"):
        link_effect(model, TEXT[:1], 6, 2, top=0)
    with pytest.raises(EditError, match=r"BertModel gives \(1, 7, 24\), no logits"):
        link_effect(bert(), TEXT[:1], 6, 2)
