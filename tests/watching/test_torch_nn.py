"""The hook for torch.nn: recorded weights are those of its attention modules, on all their paths."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from headscope.watching.recording import record
from tests.reference import weights
from tests.watching.small_models import B, E, H, L, S, assert_close, assert_untouched, layer_of, recorded_weights


def heads_of(layer: nn.MultiheadAttention, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """q and k [B, H, L, D] of [B, L, E] inputs."""
    if layer.in_proj_weight is None:
        w = (layer.q_proj_weight, layer.k_proj_weight)
    else:
        w = layer.in_proj_weight.chunk(3)[:2]
    b = (None, None) if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)[:2]
    q, k = (
        F.linear(x, *wb).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
        for x, *wb in zip((query, key), w, b, strict=True)
    )
    return q, k


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention_between_two_texts_gives_its_weights(
    need_weights: bool, batch_first: bool, training: bool
) -> None:
    layer = layer_of(batch_first=batch_first).train(training)
    query, key = torch.randn(B, L, E), torch.randn(B, S, E)
    inputs = [x if batch_first else x.transpose(0, 1) for x in (query, key, key)]
    got, _ = recorded_weights(layer, *inputs, need_weights=need_weights)
    assert_close(got, weights(*heads_of(layer, query, key)))


@pytest.mark.parametrize("average", [True, False])
def test_recorded_weights_are_those_that_torch_returns(average: bool) -> None:
    layer, x = layer_of(batch_first=True), torch.randn(B, L, E)
    got, _ = recorded_weights(layer, x, x, x, average_attn_weights=average)
    returned = layer(x, x, x, average_attn_weights=average)[1]
    assert_close(got.mean(1) if average else got, returned)


def test_multihead_attention_without_a_batch_gives_its_weights() -> None:
    layer, x = layer_of(), torch.randn(L, E)
    got, _ = recorded_weights(layer, x, x, x)
    assert_close(got, weights(*heads_of(layer, x[None], x[None])))


def test_multihead_attention_with_kdim_and_vdim_gives_its_weights() -> None:
    layer = layer_of(kdim=6, vdim=5, bias=False, batch_first=True)
    query, key, value = torch.randn(B, L, E), torch.randn(B, S, 6), torch.randn(B, S, 5)
    got, _ = recorded_weights(layer, query, key, value)
    assert_close(got, weights(*heads_of(layer, query, key)))


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_multihead_attention_with_extra_keys_gives_its_weights(options: dict[str, bool]) -> None:
    layer, x = layer_of(batch_first=True, **options), torch.randn(B, L, E)
    hidden = torch.zeros(B, L, dtype=torch.bool)
    hidden[1, 4:] = True
    got, _ = recorded_weights(layer, x, x, x, key_padding_mask=hidden, attn_mask=torch.ones(L, L).triu(1).bool())
    returned = layer(
        x, x, x, key_padding_mask=hidden, attn_mask=torch.ones(L, L).triu(1).bool(), average_attn_weights=False
    )[1]
    assert got.shape[-1] == L + 1
    assert_close(got, returned)


def test_additive_mask_and_bool_padding_mask_are_combined() -> None:
    layer, x = layer_of(batch_first=True), torch.randn(B, L, E)
    added, hidden = torch.randn(L, L), torch.zeros(B, L, dtype=torch.bool)
    hidden[0, 5:] = True
    got, _ = recorded_weights(layer, x, x, x, attn_mask=added, key_padding_mask=hidden)
    assert_close(got, weights(*heads_of(layer, x, x), bias=added, visible=~hidden[:, None, None].expand(B, H, L, L)))
    assert got[0, :, :, 5:].eq(0).all()


def test_torch_mask_hides_where_it_is_true() -> None:
    layer, x = layer_of(batch_first=True), torch.randn(B, L, E)
    later = torch.ones(L, L).triu(1).bool()
    got, _ = recorded_weights(layer, x, x, x, attn_mask=later)
    assert got[..., later].eq(0).all()
    assert_close(got, weights(*heads_of(layer, x, x), visible=~later))


def test_torch_mask_per_head_is_read() -> None:
    layer, x = layer_of(batch_first=True), torch.randn(B, L, E)
    added = torch.randn(B * H, L, L)
    got, _ = recorded_weights(layer, x, x, x, attn_mask=added)
    assert_close(got, weights(*heads_of(layer, x, x), bias=added.view(B, H, L, L)))


def test_is_causal_with_its_mask_gives_causal_weights() -> None:
    layer, x = layer_of(batch_first=True), torch.randn(B, L, E)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    got, _ = recorded_weights(layer, x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
    assert_close(got, weights(*heads_of(layer, x, x), visible=torch.ones(L, L).tril().bool()))


def test_proof_under_dropout_is_none_in_training_only() -> None:
    layer, x = layer_of(batch_first=True, dropout=0.5), torch.randn(B, L, E)
    got, _ = recorded_weights(layer, x, x, x)
    assert_close(got, weights(*heads_of(layer, x, x)))
    with record(layer) as recording:
        layer(x, x, x)
    assert recording.proof is None
    with record(layer.eval()) as recording:
        layer(x, x, x)
    assert recording.proof is not None


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[list[str]]:
    """Counts calls of one of torch's private fast functions."""
    original, calls = getattr(torch, name), []

    def function(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return original(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(torch, name, function)
        yield calls


@pytest.mark.parametrize("padded", [False, True])
def test_fast_path_of_multihead_attention_is_taken_and_recorded(monkeypatch: pytest.MonkeyPatch, padded: bool) -> None:
    layer, x = layer_of(2, batch_first=True).eval(), torch.randn(B, L, E)
    hidden = torch.zeros(B, L, dtype=torch.bool)
    hidden[1, 4:] = padded
    with torch.no_grad(), counted(monkeypatch, "_native_multi_head_attention") as calls:
        got, _ = recorded_weights(layer, x, x, x, key_padding_mask=hidden if padded else None)
    assert len(calls) == 2  # once without and once with record
    assert_close(got, weights(*heads_of(layer, x, x), visible=~hidden[:, None, None].expand(B, 2, L, L)))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_fast_path_of_an_encoder_is_taken_and_recorded(
    monkeypatch: pytest.MonkeyPatch, norm_first: bool, nested: bool
) -> None:
    layer = nn.TransformerEncoderLayer(E, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    x, hidden = torch.randn(B, L, E), torch.zeros(B, L, dtype=torch.bool)
    hidden[1, 4:] = True
    with torch.no_grad(), counted(monkeypatch, "_transformer_encoder_layer_fwd") as calls:
        plain = model(x, src_key_padding_mask=hidden)
        with record(model) as recording:
            watched = model(x, src_key_padding_mask=hidden)
    assert torch.equal(plain, watched)
    assert len(calls) == 4
    assert [site.name for site in recording.sites] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert recording.proof is not None
    assert recording.proof < 1e-5
    slow = [layer_maps(model, x, hidden, index) for index in range(2)]
    for matrix, wanted in zip(recording, slow, strict=True):
        got = matrix.dense()
        assert_close(got[0], wanted[0])
        assert_close(got[1, :, :4, :4], wanted[1, :, :4, :4])
        assert got[1, :, :4, 4:].eq(0).all()


def layer_maps(model: nn.TransformerEncoder, x: Tensor, hidden: Tensor, index: int) -> Tensor:
    """The maps of a layer as torch returns them off the fast path; there is no dropout in the model."""
    for layer in model.layers[:index]:
        x = layer.train()(x, src_key_padding_mask=hidden)
    layer = model.layers[index]
    into = layer.norm1(x) if layer.norm_first else x
    return layer.self_attn.train()(into, into, into, key_padding_mask=hidden, average_attn_weights=False)[1]


def test_slow_path_of_an_encoder_in_training_is_recorded() -> None:
    layer = nn.TransformerEncoderLayer(E, 2, 16, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2), torch.randn(B, L, E)
    plain = model(x)
    with record(model) as recording:
        assert torch.equal(model(x), plain)
    assert [site.name for site in recording.sites] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert recording.proof is not None
    assert_close(recording[0].dense(), layer_maps(model, x, torch.zeros(B, L, dtype=torch.bool), 0))


def test_decoder_has_sites_of_self_and_cross_attention() -> None:
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 16, batch_first=True), 2).eval()
    x, memory = torch.randn(B, L, E), torch.randn(B, S, E)
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    plain = model(x, memory, tgt_mask=causal, tgt_is_causal=True)
    with record(model) as recording:
        assert torch.equal(model(x, memory, tgt_mask=causal, tgt_is_causal=True), plain)
    names = [f"layers.{n}.{part}" for n in range(2) for part in ("self_attn", "multihead_attn")]
    assert [site.name for site in recording.sites] == names
    assert [site.shape[3] for site in recording.sites] == [L, S, L, S]
    assert recording[0].dense().triu(1).eq(0).all()


@pytest.mark.parametrize("training", [True, False])
def test_transformer_has_a_site_per_attention_module(training: bool) -> None:
    model = nn.Transformer(E, H, 1, 1, 16, dropout=0.0, batch_first=True).train(training)
    source, target = torch.randn(B, S, E), torch.randn(B, L, E)
    plain = model(source, target)
    with record(model) as recording:
        assert torch.equal(model(source, target), plain)
    assert [site.name for site in recording.sites] == [
        "encoder.layers.0.self_attn",
        "decoder.layers.0.self_attn",
        "decoder.layers.0.multihead_attn",
    ]


def test_fast_path_of_a_subclassed_encoder_layer_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class Layer(nn.TransformerEncoderLayer):
        def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(src, *args, **kwargs)

    model, x = Layer(E, 2, 16, batch_first=True).eval(), torch.randn(B, L, E)
    with torch.no_grad(), counted(monkeypatch, "_transformer_encoder_layer_fwd") as calls:
        plain = model(x)
        with record(model) as recording:
            assert torch.equal(model(x), plain)
    assert len(calls) == 2
    assert [site.name for site in recording.sites] == ["self_attn"]


def attend(x: Tensor) -> Tensor:
    """Attention of one's own, with what x holds as queries, keys and values."""
    heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)


class OwnBlock(nn.TransformerEncoderLayer):
    def _sa_block(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return attend(x)


class OwnFeedForward(nn.TransformerEncoderLayer):
    def _ff_block(self, x: Tensor) -> Tensor:
        return attend(x)


class OwnForward(nn.TransformerEncoderLayer):
    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(attend(src), *args, **kwargs)


class OwnAttention(nn.MultiheadAttention):
    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return attend(query), None


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("stacked", [False, True], ids=["layer", "encoder"])
@pytest.mark.parametrize(
    ("kind", "fast", "slow"),
    [
        # torch's fast path does not ask what a subclass would do, and watching changes nothing about that
        (OwnBlock, ["self_attn"], [""]),
        (OwnFeedForward, ["self_attn"], ["self_attn", ""]),
        (OwnForward, ["", "self_attn"], ["", "self_attn"]),
        (OwnAttention, ["self_attn"], ["self_attn"]),
    ],
)
def test_own_attention_inside_torchs_layer_is_recorded(
    kind: Any, fast: list[str], slow: list[str], stacked: bool, training: bool
) -> None:
    if kind is OwnAttention:
        model = nn.TransformerEncoderLayer(E, 2, 16, dropout=0.0, batch_first=True)
        model.self_attn = OwnAttention(E, 2, batch_first=True)
    else:
        model = kind(E, 2, 16, dropout=0.0, batch_first=True)
    methods = [getattr(kind, name) for name in ("forward", "_sa_block", "_ff_block") if hasattr(kind, name)]
    inner = slow if training else fast
    if stacked:
        model = nn.TransformerEncoder(model, 2, enable_nested_tensor=False)
        inner = [f"layers.{i}.{name}".rstrip(".") for i in range(2) for name in inner]
    model.train(training)
    x = torch.randn(B, L, E)
    with torch.no_grad():
        plain = model(x)
        with record(model) as outer, record(model) as recording:
            assert torch.equal(model(x), plain)
    assert [site.name for site in recording.sites] == [site.name for site in outer.sites] == inner
    assert recording.proof < 1e-5
    assert methods == [getattr(kind, name) for name in ("forward", "_sa_block", "_ff_block") if hasattr(kind, name)]
    assert_untouched(model)


class Kernel(TorchDispatchMode):
    """Keeps the query and key that the kernel receives."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product" in str(func):
            self.query, self.key = args[:2]
        return func(*args, **(kwargs or {}))


def test_autocast_weights_come_from_the_kernels_operands() -> None:
    layer, x = layer_of(batch_first=True), torch.randn(B, L, E)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = recorded_weights(layer, x, x, x, need_weights=False)
        with Kernel() as kernel:
            layer(x, x, x, need_weights=False)
    assert kernel.query.dtype == torch.bfloat16
    assert_close(got, weights(kernel.query, kernel.key))
