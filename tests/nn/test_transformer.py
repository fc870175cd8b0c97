"""The Transformer: what it may see, decoding with and without its cache, parity with other models, and watching it."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from headscope import (
    MultiHeadAttention,
    Transformer,
    TransformerConfig,
    ablate,
    edit,
    knock_out,
    masks,
    monitor,
    positions,
    record,
)
from headscope.ops.reductions import Entropy, Max
from tests.options import unchecked

SMALL = {"vocab_size": 31, "embed_dim": 24, "num_heads": 6, "num_layers": 2, "ff_dim": 40}
KINDS = ("encoder-decoder", "decoder", "encoder")
B, L, S = 2, 7, 5


def model_of(**options: object) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**(SMALL | options)))
    for name, part in model.named_parameters():
        if part.dim() > 1 and "embedding" not in name:
            nn.init.normal_(part, std=0.3)
    return model.double().eval()


def tokens(length: int, seed: int = 0, batch: int = B) -> Tensor:
    return torch.randint(31, (batch, length), generator=torch.Generator().manual_seed(seed))


def inputs(kind: str) -> tuple[Tensor, ...]:
    return (tokens(L), tokens(S, 1)) if kind == "encoder-decoder" else (tokens(L),)


def test_config_defaults_are_those_of_the_paper() -> None:
    config = TransformerConfig(vocab_size=37_000)
    assert (config.embed_dim, config.num_heads, config.num_layers, config.ff_dim) == (512, 8, 6, 2048)
    assert (config.kind, config.position, config.dropout_p) == ("encoder-decoder", "sinusoidal", 0.1)
    with torch.device("meta"):
        layer = MultiHeadAttention(config.embed_dim, config.num_heads)
    assert layer.head_dim == 64


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_gives_logits_for_each_position(kind: str, norm: str) -> None:
    assert model_of(kind=kind, norm=norm)(*inputs(kind)).shape == (B, L, 31)


@pytest.mark.parametrize("position", ["sinusoidal", "rotary", "alibi", "none"])
@pytest.mark.parametrize("kind", ["encoder-decoder", "decoder"])
def test_decoder_is_causal(kind: str, position: str) -> None:
    model, texts = model_of(kind=kind, position=position), inputs(kind)
    changed = texts[0].clone()
    changed[:, 4] = (changed[:, 4] + 1) % 31
    same = (model(*texts) == model(changed, *texts[1:])).all(-1)
    assert same.tolist() == [[True] * 4 + [False] * 3] * B


@pytest.mark.parametrize("position", ["sinusoidal", "rotary", "alibi"])
def test_encoder_depends_on_positions_and_attends_both_ways(position: str) -> None:
    model, text = model_of(kind="encoder", position=position), tokens(L)
    turned = model(text.flip(1)).flip(1)
    assert (model(text) - turned).abs().max() > 1e-3 or position == "alibi"  # alibi sees distances, not directions
    changed = text.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 31
    assert (model(text) != model(changed)).any(-1).all()


def test_encoder_without_positions_ignores_order() -> None:
    model, text = model_of(kind="encoder", position="none"), tokens(L)
    torch.testing.assert_close(model(text), model(text.flip(1)).flip(1))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_change_the_logits(kind: str) -> None:
    model, texts = model_of(kind=kind), inputs(kind)
    padded = [torch.cat([x, tokens(3, 9)], 1) for x in texts]
    names = ("mask", "source_mask")
    hidden = {name: masks.padding([x.shape[1]] * B) for name, x in zip(names, texts, strict=False)}
    torch.testing.assert_close(model(*padded, **hidden)[:, :L], model(*texts))


@pytest.mark.parametrize("chunks", [[1] * L, [3, 4], [1, 5, 1]], ids=str)
@pytest.mark.parametrize("position", ["sinusoidal", "rotary", "alibi"])
@pytest.mark.parametrize("kind", ["encoder-decoder", "decoder"])
def test_cache_in_chunks_gives_one_forward_pass(kind: str, position: str, chunks: list[int]) -> None:
    model, (text, *source) = model_of(kind=kind, position=position, num_kv_heads=3), inputs(kind)
    cache = model.new_cache(L)
    with torch.no_grad():
        parts = [model(part, *source, cache=cache) for part in text.split(chunks, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(text, *source))


@pytest.mark.parametrize("kind", ["encoder-decoder", "decoder"])
def test_generate_takes_the_likeliest_token_at_temperature_0(kind: str) -> None:
    model, (text, *source) = model_of(kind=kind), inputs(kind)
    wanted = text
    for _ in range(6):
        wanted = torch.cat((wanted, model(wanted, *source)[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(model.generate(text, *source, max_new_tokens=6), wanted)


def test_generate_refuses_a_text_that_gets_too_long_before_the_first_token() -> None:
    model = model_of(kind="decoder", max_length=9)
    with record(model, reduce=Max()) as recording, pytest.raises(ValueError, match="the text has 10 tokens"):
        model.generate(tokens(L), max_new_tokens=3)
    assert not recording.answers
    assert model.generate(tokens(L), max_new_tokens=2).shape[1] == 9


def test_qk_norm_bounds_the_logits() -> None:
    plain, normed = (model_of(kind="decoder", qk_norm=norm) for norm in (False, True))
    largest = []
    for model in (plain, normed):
        attention = model.decoder.layers[0].self_attention
        with torch.no_grad():
            attention.in_proj.weight.mul_(1e3)
        watch = monitor(model, logit_limit=math.inf)
        with watch:
            model(tokens(L))
        largest.append(float(watch.history[0].largest_logit[0].max()))
    assert largest[0] > 1e4
    assert largest[1] <= math.sqrt(attention.head_dim) + 1e-3  # two vectors of length √D, and D^(-1/2) of their product


def test_stop_token_ends_a_row() -> None:
    model, text = model_of(kind="decoder"), tokens(4)
    free = model.generate(text, max_new_tokens=8)
    stop = int(free[0, 5])
    stopped = model.generate(text, max_new_tokens=8, stop_token=stop)
    first = [row.index(stop) if stop in row else len(row) for row in stopped[:, 4:].tolist()]
    assert first[0] <= 1
    for row, end, whole in zip(stopped[:, 4:].tolist(), first, free[:, 4:].tolist(), strict=True):
        assert row[: end + 1] == whole[: len(row)][: end + 1]
        assert set(row[end:]) <= {stop}


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
@pytest.mark.parametrize("position", ["sinusoidal", "rotary", "alibi"])
def test_generate_continues_prompts_of_unequal_length_as_each_alone(kind: str, position: str) -> None:
    model = model_of(kind=kind, position=position)
    text, source = tokens(L, batch=3), tokens(S, batch=3) if kind == "encoder-decoder" else None
    lengths = torch.tensor([4, L, 1])
    padded = text.masked_fill(torch.arange(L) >= lengths[:, None], -100)  # what stands behind is not looked at
    stop = int(text[0, 2])  # a prompt may hold it
    written = model.generate(padded, source, max_new_tokens=3, lengths=lengths, stop_token=stop)
    assert written.shape[1] == L + 3
    for row, length in enumerate(lengths.tolist()):
        own = None if source is None else source[row : row + 1]
        alone = model.generate(text[row : row + 1, :length], own, max_new_tokens=L + 3 - length, stop_token=stop)
        assert torch.equal(written[row, : alone.shape[1]], alone[0])
        assert (written[row, alone.shape[1] :] == stop).all()


def test_sampling_follows_the_probabilities() -> None:
    model = model_of(kind="decoder")
    text = tokens(4, batch=1).expand(4000, -1)
    probabilities = model(text[:1])[0, -1].div(2.0).softmax(-1)
    drawn = model.generate(text, max_new_tokens=1, temperature=2.0, generator=torch.Generator().manual_seed(0))[:, -1]
    counts = torch.bincount(drawn, minlength=31) / 4000
    torch.testing.assert_close(counts.double(), probabilities, atol=0.03, rtol=0)
    few = model.generate(text, max_new_tokens=1, temperature=2.0, top_p=0.5)[:, -1].unique()
    order = probabilities.argsort(descending=True)
    count = int((probabilities[order].cumsum(0) < 0.5).sum()) + 1
    assert set(few.tolist()) <= set(order[:count].tolist())
    assert model.generate(text, max_new_tokens=1, temperature=1.0, top_p=1e-9)[:, -1].unique().tolist() == [order[0]]


def test_encoder_layer_equals_that_of_torch() -> None:
    for norm in ("pre", "post"):
        model = model_of(kind="encoder", norm=norm, num_layers=1, position="none")
        layer = model.encoder.layers[0]
        theirs = nn.TransformerEncoderLayer(24, 6, 40, batch_first=True, norm_first=norm == "pre").double().eval()
        theirs.self_attn = layer.self_attention.to_torch()
        theirs.linear1, theirs.linear2 = layer.feed_forward[0], layer.feed_forward[2]
        theirs.norm1, theirs.norm2 = layer.norms
        x = torch.randn(B, L, 24, dtype=torch.float64)
        torch.testing.assert_close(layer(x, None), theirs(x))


def test_decoder_layer_equals_that_of_torch() -> None:
    model = model_of(num_layers=1)
    layer = model.decoder.layers[0]
    theirs = nn.TransformerDecoderLayer(24, 6, 40, batch_first=True, norm_first=True).double().eval()
    theirs.self_attn, theirs.multihead_attn = layer.self_attention.to_torch(), layer.cross_attention.to_torch()
    theirs.linear1, theirs.linear2 = layer.feed_forward[0], layer.feed_forward[2]
    theirs.norm1, theirs.norm3, theirs.norm2 = layer.norms
    x, memory = torch.randn(B, L, 24, dtype=torch.float64), torch.randn(B, S, 24, dtype=torch.float64)
    ahead = torch.ones(L, L, dtype=torch.bool).triu(1)
    torch.testing.assert_close(layer(x, masks.causal(), memory), theirs(x, memory, tgt_mask=ahead))


# --- watched


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_recording_gives_every_head_and_the_same_logits(kind: str, padded: bool) -> None:
    model, texts = model_of(kind=kind), inputs(kind)
    names = ("mask", "source_mask") if padded else ()
    hidden = {n: masks.padding([x.shape[1], x.shape[1] - 2]) for n, x in zip(names, texts, strict=False)}
    alone = model(*texts, **hidden)
    with record(model) as recording:
        assert torch.equal(model(*texts, **hidden), alone)
    shapes = {"encoder": [(L, L)] * 2, "decoder": [(L, L)] * 2}
    shapes["encoder-decoder"] = [(S, S)] * 2 + [(L, L), (L, S)] * 2
    assert [tuple(matrix.shape[2:]) for matrix in recording] == shapes[kind]
    assert {site.way for site in recording.sites} == {"headscope"}
    assert recording.proof is not None
    assert recording.proof < 1e-6
    part = "decoder" if kind != "encoder" else "encoder"
    layer = getattr(model, part).layers[0]
    attention_inputs: list[Tensor] = []
    handle = layer.self_attention.register_forward_pre_hook(lambda m, args: attention_inputs.append(args[0]))
    model(*texts, **hidden)
    handle.remove()
    mask = hidden.get("mask")
    whole = masks.causal() if part == "decoder" else None
    whole = mask if whole is None else whole if mask is None else whole & mask
    wanted = layer.self_attention.matrix(attention_inputs[0], mask=whole)
    got = recording[f"{part}.layers.0.self_attention"]
    torch.testing.assert_close(got.dense(), wanted.dense())


def test_recorded_generation_is_one_matrix_per_site() -> None:
    model, (text, source) = model_of(), inputs("encoder-decoder")
    with record(model) as recording:
        whole = model.generate(text, source, max_new_tokens=4)
    assert [tuple(matrix.shape[2:]) for matrix in recording] == [(S, S)] * 2 + [(L + 3, L + 3), (L + 3, S)] * 2
    with record(model) as again:
        model(whole[:, :-1], source)
    for matrix, wanted in zip(recording, again, strict=True):
        torch.testing.assert_close(matrix.dense(), wanted.dense())


def test_recording_of_dropout_in_training_has_answers() -> None:
    model = model_of(kind="decoder").train()
    with record(model, reduce=Entropy()) as recording:
        model(tokens(L)).sum().backward()
    assert recording.answers


def test_edits_change_the_output() -> None:
    model, text = model_of(kind="decoder"), tokens(L)
    alone = model(text)
    with edit(model, ablate(0, 3)):
        edited = model(text)
    weights = model.decoder.layers[0].self_attention.out_proj.weight
    with torch.no_grad():
        weights[:, 12:16] = 0
    torch.testing.assert_close(edited, model(text))
    assert (edited - alone).abs().max() > 1e-3
    with edit(model, knock_out(query=5, key=2)), record(model) as recording:
        model(text)
    assert recording[0].dense()[:, :, 5, 2].abs().max() == 0


# --- errors


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda: TransformerConfig(9, kind="both"), "kind is 'both': it is one of encoder-decoder, decoder, encoder"),
        (lambda: TransformerConfig(9, num_layers=0), "num_layers is 0: at least 1"),
        (lambda: TransformerConfig(9, embed_dim=12, num_heads=5), "embed_dim 12 cannot be cut into 5 heads"),
        (lambda: TransformerConfig(9, num_heads=0), "num_heads is 0: at least 1"),
        (lambda: TransformerConfig(9, dropout_p=1.0), "dropout_p is 1.0: the share of dropped values"),
        (lambda: model_of()(tokens(L)), "kind 'encoder-decoder' needs a source"),
        (lambda: model_of().generate(tokens(L), max_new_tokens=2), "kind 'encoder-decoder' needs a source"),
        (lambda: model_of().decode(tokens(L)), "kind 'encoder-decoder' needs a source"),
        (lambda: model_of(kind="decoder")(tokens(L), tokens(S)), "kind 'decoder' has no place for a source"),
        (lambda: model_of(kind="encoder").generate(tokens(L), max_new_tokens=2), "it cannot write"),
        (lambda: model_of(kind="decoder").encode(tokens(L)), "kind 'decoder' has no encoder"),
        (lambda: model_of(kind="decoder")(tokens(L) + 25), "the vocabulary is 0 to 30"),
        (lambda: model_of(kind="decoder", max_length=6)(tokens(L)), "the text has 7 tokens, the model takes 6"),
        (lambda: model_of(kind="decoder")(tokens(L)[0]), r"tokens have shape \(7,\)"),
        (lambda: model_of(kind="decoder").generate(tokens(L), max_new_tokens=2, top_p=0), "top_p 0, max_new_tokens 2"),
        (
            lambda: model_of(kind="decoder").generate(tokens(L), max_new_tokens=2, temperature=math.nan),
            "temperature nan",
        ),
        (lambda: model_of(kind="decoder").generate(tokens(L)[0], max_new_tokens=2), r"tokens have shape \(7,\)"),
        (lambda: model_of(kind="decoder", max_length=9).generate(tokens(L), max_new_tokens=3), "text has 10 tokens"),
        (
            lambda: model_of(kind="decoder").generate(tokens(L), max_new_tokens=2, lengths=torch.tensor([3, 8])),
            r"lengths are \[3, 8\], tokens have shape \(2, 7\): give each of the 2 rows a whole number from 1 to 7",
        ),
        (lambda: model_of(kind="decoder").new_cache(0), "room for 0 positions"),
        (lambda: model_of(kind="decoder")(tokens(L), cache=model_of(kind="decoder").new_cache()[:1]), "of 1 layers"),
    ],
)
def test_errors_say_what_came_and_what_was_wanted(wrong: Callable[[], object], text: str) -> None:
    with unchecked(), pytest.raises(ValueError, match=text):
        wrong()


def test_sinusoidal_positions_are_those_of_the_paper() -> None:
    table = positions.sinusoidal(50, 6)
    for position in (0, 1, 49):
        for i in range(3):
            angle = torch.tensor(position / 10_000 ** (2 * i / 6), dtype=torch.float64)
            assert abs(float(table[position, 2 * i]) - float(angle.sin())) < 1e-6
            assert abs(float(table[position, 2 * i + 1]) - float(angle.cos())) < 1e-6
    torch.testing.assert_close(positions.sinusoidal(3, 6, first=40), table[40:43])


def test_generate_takes_lengths_as_a_list() -> None:
    model = Transformer(TransformerConfig(12, "decoder", 8, 2, num_layers=1, ff_dim=8)).eval()
    tokens = torch.randint(12, (2, 4))
    texts = [model.generate(tokens, max_new_tokens=3, lengths=n) for n in ([2, 4], (2, 4), torch.tensor([2, 4]))]
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])
    for wrong in ([2.5, 4.0], [2], 3, [0, 4]):
        with unchecked(), pytest.raises(ValueError, match="give each of the 2 rows a whole number from 1 to 4"):
            model.generate(tokens, max_new_tokens=3, lengths=wrong)


def test_batch_of_zero_gives_empty_texts_and_logits() -> None:
    model = Transformer(TransformerConfig(12, "decoder", 8, 2, num_layers=1, ff_dim=8)).eval()
    tokens = torch.zeros(0, 4, dtype=torch.long)
    assert model(tokens).shape == (0, 4, 12)
    assert model.generate(tokens, max_new_tokens=3, temperature=1.0, stop_token=2).shape == (0, 7)
