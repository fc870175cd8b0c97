"""Watching: every way in gives the weights that were applied, and nothing of the model changes."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as imported_by_name
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import AttentionInterface

from headscope.errors import NothingSeen, ProofError, UnsupportedAttention
from headscope.watching.hooks import AttentionCall, watch, watches
from headscope.watching.recording import record
from tests.reference import FINFO_MIN, weights
from tests.watching.zoo.catalog import ZOO, first_tensors

B, H, L, S, D = 2, 3, 7, 11, 4
E = H * D


class Sdpa(nn.Module):
    """Hands its inputs to torch's function."""

    def __init__(self, function: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor, **options: Any) -> Tensor:
        return (self.function or F.scaled_dot_product_attention)(*tensors, **options)


class NanoGPT(nn.Module):
    """Causal self-attention as in nanoGPT."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.c_attn, self.c_proj, self.dropout = nn.Linear(E, 3 * E), nn.Linear(E, E), dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.view(*x.shape[:2], H, D).transpose(1, 2) for t in self.c_attn(x).split(E, 2))
        p = self.dropout if self.training else 0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=p, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(x.shape))


class Stack(nn.Module):
    """Two blocks, one after the other."""

    def __init__(self, make: Callable[[], nn.Module] = NanoGPT) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([make(), make()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def qkv(*, queries: int = L, keys: int = S, front: tuple[int, ...] = (B, H), width: int = D) -> list[Tensor]:
    return [torch.randn(*front, n, w) for n, w in ((queries, D), (keys, D), (keys, width))]


def sees(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The map of the only site, and the output, equal to the bit to that of an unwatched run."""
    torch.manual_seed(3)
    plain = first_tensors(model(*args, **kwargs))
    torch.manual_seed(3)
    with record(model) as recording:
        watched = first_tensors(model(*args, **kwargs))
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert len(recording) == 1
    return recording[0].dense(), watched[0]


def assert_close(got: Tensor, wanted: Tensor, tolerance: float = 1e-6) -> None:
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() < tolerance


# ---------------------------------------------------------------- scaled_dot_product_attention


def test_a_nanogpt_block_is_causal() -> None:
    model, x = NanoGPT(), torch.randn(B, L, E)
    got, _ = sees(model, x)
    q, k, _ = (t.view(B, L, H, D).transpose(1, 2) for t in model.c_attn(x).split(E, 2))
    assert_close(got, weights(q, k, seen=torch.ones(L, L).tril().bool()))


def test_the_mask_of_a_recorded_causal_call_is_the_rule_not_its_cells() -> None:
    with record(model := NanoGPT()) as recording:
        model(torch.randn(B, L, E))
    mask = recording.sites[0].calls[0].mask
    assert mask is not None
    assert mask.is_causal


def test_a_function_imported_by_name_is_seen() -> None:
    q, k, v = qkv()
    got, _ = sees(Sdpa(imported_by_name), q, k, v)
    assert_close(got, weights(q, k))


def test_a_fused_attention_as_in_timm() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.norm = nn.Linear(E, 3 * E), nn.LayerNorm(D)

        def forward(self, x: Tensor) -> Tensor:
            batch, n, _ = x.shape
            q, k, v = self.qkv(x).reshape(batch, n, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(self.norm(q), self.norm(k), v, dropout_p=0.0)
            return y.transpose(1, 2).reshape(batch, n, E)

    model, x = Attention(), torch.randn(B, L, E)
    got, _ = sees(model, x)
    q, k, _ = model.qkv(x).reshape(B, L, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    assert_close(got, weights(model.norm(q), model.norm(k)))


@pytest.mark.parametrize(("front", "shape"), [((), (1, 1)), ((5,), (1, 5)), ((2, 3, 2), (6, 2))], ids=str)
def test_inputs_of_2_3_and_5_axes(front: tuple[int, ...], shape: tuple[int, int]) -> None:
    q, k, v = qkv(front=front)
    got, _ = sees(Sdpa(), q, k, v)
    assert_close(got, weights(q.view(*shape, L, D), k.view(*shape, S, D)))


@pytest.mark.parametrize(
    "fronts",
    [((3, 2), (1, 2), (1, 2)), ((1, 2), (3, 2), (3, 2)), ((2, 1), (2, 3), (2, 3)), ((2, 3), (2, 1), (2, 3))],
    ids=str,
)
def test_operands_that_torch_stretches(fronts: tuple[tuple[int, int], ...]) -> None:
    q, k, v = (torch.randn(*front, n, D) for front, n in zip(fronts, (L, S, S), strict=True))
    got, _ = sees(Sdpa(), q, k, v)
    front = torch.broadcast_shapes(*fronts)
    assert_close(got, weights(q.expand(*front, -1, -1), k.expand(*front, -1, -1)))


def test_scale_values_of_another_width_and_grouped_heads() -> None:
    q, k, v = torch.randn(B, 6, L, D), torch.randn(B, 3, S, D), torch.randn(B, 3, S, 9)
    got, _ = sees(Sdpa(), q, k, v, scale=0.9, enable_gqa=True)
    assert_close(got, weights(q, k, scale=0.9))


@pytest.mark.parametrize(("queries", "keys"), [(L, S), (S, L)])
def test_is_causal_counts_from_the_first_key(queries: int, keys: int) -> None:
    q, k, v = qkv(queries=queries, keys=keys)
    got, _ = sees(Sdpa(), q, k, v, is_causal=True)
    assert_close(got, weights(q, k, seen=torch.ones(queries, keys).tril().bool()))


@pytest.mark.parametrize("shape", [(L, S), (B, 1, L, S), (B, H, L, S), (B, 1, 1, S)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "additive", "-inf"])
def test_masks_of_each_kind_and_shape(shape: tuple[int, ...], kind: str) -> None:
    q, k, v = qkv()
    seen = torch.rand(shape) < 0.6
    seen[..., 0] = True
    bias = torch.randn(shape) if kind == "additive" else None
    given = seen if kind == "bool" else bias if bias is not None else torch.where(seen, 0.0, -torch.inf)
    got, _ = sees(Sdpa(), q, k, v, attn_mask=given)
    assert_close(got, weights(q, k, bias=bias, seen=None if bias is not None else seen))


def test_a_row_of_finfo_min_is_uniform_as_softmax_makes_it() -> None:
    q, k, v = qkv()
    mask = torch.where(torch.rand(L, S) < 0.6, 0.0, FINFO_MIN)
    mask[:, 0], mask[4] = 0.0, FINFO_MIN
    got, _ = sees(Sdpa(), q, k, v, attn_mask=mask)
    assert_close(got[:, :, 4], torch.full((B, H, S), 1 / S))
    assert_close(got, (q @ k.mT * D**-0.5 + mask).softmax(-1))


def test_a_row_of_minus_infinity_has_no_weights() -> None:
    q, k, v = qkv()
    mask = torch.zeros(L, S)
    mask[4] = -torch.inf
    got, _ = sees(Sdpa(), q, k, v, attn_mask=mask)
    assert got[:, :, 4].eq(0).all()
    assert_close(got.sum(-1)[:, :, :4], torch.ones(B, H, 4))


def test_a_mask_changed_in_place_between_calls_is_read_again() -> None:
    class Narrowing(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mask = torch.ones(L, S, dtype=torch.bool)
            first = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            mask[:, 5:] = False
            return first + F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    q, k, v = qkv()
    with record(model := Narrowing()) as recording:
        model(q, k, v)
    assert recording[0].dense()[..., 5:].sum() > 1
    assert recording[1].dense()[..., 5:].sum() == 0


def test_dropout_leaves_a_call_unproved_never_refused() -> None:
    model = NanoGPT(dropout=0.5)
    x = torch.randn(B, L, E)
    got, _ = sees(model, x)
    with record(model) as recording:
        model(x)
    assert_close(recording[0].dense(), got)
    assert recording.sites[0].proof is None
    assert "unproved" in repr(recording)
    with record(model.eval()) as recording:
        model(x)
    assert recording.sites[0].proof is not None
    assert recording.sites[0].proof < 1e-5


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_nested_tensors(layout: torch.layout) -> None:
    lengths = (5, 3)
    parts = [[torch.randn(H, n, D) for n in lengths] for _ in range(3)]
    ragged = [[x.transpose(0, 1) for x in p] for p in parts]
    tensors = [torch.nested.nested_tensor(p, layout=layout).transpose(1, 2) for p in ragged]
    if layout is torch.strided:
        tensors = [t.contiguous() for t in tensors]
    plain = F.scaled_dot_product_attention(*tensors).unbind()
    with record(model := Sdpa()) as recording:
        watched = model(*tensors).unbind()
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    for b, n in enumerate(lengths):
        wanted = weights(parts[0][b][None], parts[1][b][None])
        assert_close(recording[0].dense()[b : b + 1, :, :n, :n], wanted)
    assert recording[0].dense()[1, :, :, 3:].eq(0).all()


def test_autocast_queries_and_keys_are_as_the_kernel_received_them() -> None:
    q, k, v = qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, output = sees(Sdpa(), q, k, v)
    assert output.dtype == torch.bfloat16
    assert_close(got, weights(q.bfloat16(), k.bfloat16()))
    assert (got - weights(q, k)).abs().max() > 1e-5


# ---------------------------------------------------------------- torch.nn


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


def layer_of(heads: int = H, **options: Any) -> nn.MultiheadAttention:
    layer = nn.MultiheadAttention(E, heads, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_torch_attention_between_two_texts(need_weights: bool, batch_first: bool, training: bool) -> None:
    layer = layer_of(batch_first=batch_first).train(training)
    query, key = torch.randn(B, L, E), torch.randn(B, S, E)
    given = [x if batch_first else x.transpose(0, 1) for x in (query, key, key)]
    got, _ = sees(layer, *given, need_weights=need_weights)
    assert_close(got, weights(*heads_of(layer, query, key)))


@pytest.mark.parametrize("average", [True, False])
def test_the_weights_that_torch_returns_are_those_recorded(average: bool) -> None:
    layer, x = layer_of(batch_first=True), torch.randn(B, L, E)
    got, _ = sees(layer, x, x, x, average_attn_weights=average)
    returned = layer(x, x, x, average_attn_weights=average)[1]
    assert_close(got.mean(1) if average else got, returned)


def test_torch_attention_without_a_batch() -> None:
    layer, x = layer_of(), torch.randn(L, E)
    got, _ = sees(layer, x, x, x)
    assert_close(got, weights(*heads_of(layer, x[None], x[None])))


def test_torch_attention_with_other_widths_and_no_biases() -> None:
    layer = layer_of(kdim=6, vdim=5, bias=False, batch_first=True)
    query, key, value = torch.randn(B, L, E), torch.randn(B, S, 6), torch.randn(B, S, 5)
    got, _ = sees(layer, query, key, value)
    assert_close(got, weights(*heads_of(layer, query, key)))


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_torch_attention_with_extra_keys(options: dict[str, bool]) -> None:
    layer, x = layer_of(batch_first=True, **options), torch.randn(B, L, E)
    hidden = torch.zeros(B, L, dtype=torch.bool)
    hidden[1, 4:] = True
    got, _ = sees(layer, x, x, x, key_padding_mask=hidden, attn_mask=torch.ones(L, L).triu(1).bool())
    returned = layer(
        x, x, x, key_padding_mask=hidden, attn_mask=torch.ones(L, L).triu(1).bool(), average_attn_weights=False
    )[1]
    assert got.shape[-1] == L + 1
    assert_close(got, returned)


def test_an_additive_mask_and_a_bool_padding_mask_together() -> None:
    layer, x = layer_of(batch_first=True), torch.randn(B, L, E)
    added, hidden = torch.randn(L, L), torch.zeros(B, L, dtype=torch.bool)
    hidden[0, 5:] = True
    got, _ = sees(layer, x, x, x, attn_mask=added, key_padding_mask=hidden)
    assert_close(got, weights(*heads_of(layer, x, x), bias=added, seen=~hidden[:, None, None].expand(B, H, L, L)))
    assert got[0, :, :, 5:].eq(0).all()


def test_true_is_hidden_in_a_torch_mask() -> None:
    layer, x = layer_of(batch_first=True), torch.randn(B, L, E)
    later = torch.ones(L, L).triu(1).bool()
    got, _ = sees(layer, x, x, x, attn_mask=later)
    assert got[..., later].eq(0).all()
    assert_close(got, weights(*heads_of(layer, x, x), seen=~later))


def test_a_torch_mask_for_each_head() -> None:
    layer, x = layer_of(batch_first=True), torch.randn(B, L, E)
    added = torch.randn(B * H, L, L)
    got, _ = sees(layer, x, x, x, attn_mask=added)
    assert_close(got, weights(*heads_of(layer, x, x), bias=added.view(B, H, L, L)))


def test_is_causal_with_its_mask() -> None:
    layer, x = layer_of(batch_first=True), torch.randn(B, L, E)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    got, _ = sees(layer, x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
    assert_close(got, weights(*heads_of(layer, x, x), seen=torch.ones(L, L).tril().bool()))


def test_dropout_of_torch_attention_is_unproved_in_training_only() -> None:
    layer, x = layer_of(batch_first=True, dropout=0.5), torch.randn(B, L, E)
    got, _ = sees(layer, x, x, x)
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
def test_the_fast_path_of_torch_attention_is_taken_and_seen(monkeypatch: pytest.MonkeyPatch, padded: bool) -> None:
    layer, x = layer_of(2, batch_first=True).eval(), torch.randn(B, L, E)
    hidden = torch.zeros(B, L, dtype=torch.bool)
    hidden[1, 4:] = padded
    with torch.no_grad(), counted(monkeypatch, "_native_multi_head_attention") as calls:
        got, _ = sees(layer, x, x, x, key_padding_mask=hidden if padded else None)
    assert len(calls) == 2  # once without and once with record
    assert_close(got, weights(*heads_of(layer, x, x), seen=~hidden[:, None, None].expand(B, 2, L, L)))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_the_fast_path_of_a_torch_encoder_is_taken_and_seen(
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


def test_an_encoder_in_training_goes_the_slow_way_and_is_seen() -> None:
    layer = nn.TransformerEncoderLayer(E, 2, 16, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2), torch.randn(B, L, E)
    plain = model(x)
    with record(model) as recording:
        assert torch.equal(model(x), plain)
    assert [site.name for site in recording.sites] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert recording.proof is not None
    assert_close(recording[0].dense(), layer_maps(model, x, torch.zeros(B, L, dtype=torch.bool), 0))


def test_a_decoder_attends_to_itself_and_to_the_memory() -> None:
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
def test_a_whole_torch_transformer(training: bool) -> None:
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


def test_an_encoder_layer_of_ones_own_keeps_its_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_attention_of_ones_own_inside_torchs_layer(
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


def test_autocast_in_torch_attention() -> None:
    layer, x = layer_of(batch_first=True), torch.randn(B, L, E)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = sees(layer, x, x, x, need_weights=False)
        with Kernel() as kernel:
            layer(x, x, x, need_weights=False)
    assert kernel.query.dtype == torch.bfloat16
    assert_close(got, weights(kernel.query, kernel.key))


# ---------------------------------------------------------------- transformers


def llama() -> tuple[nn.Module, dict[str, Any]]:
    model = ZOO["llama"].build()
    return model, ZOO["llama"].inputs(model)


@contextmanager
def registered(name: str, function: Callable[..., Any]) -> Iterator[None]:
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    try:
        yield
    finally:
        AttentionInterface._global_mapping.pop(name)
        AttentionMaskInterface._global_mapping.pop(name)


def test_an_attention_function_of_ones_own_is_seen() -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    calls = []

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return sdpa_attention_forward(*args, **kwargs)

    model, inputs = llama()
    with record(model) as wanted:
        model(**inputs)
    with registered("own", own):
        model.set_attn_implementation("own")
        with record(model) as recording:
            model(**inputs)
    assert len(calls) == len(recording) == 2
    assert {site.way for site in recording.sites} == {"huggingface"}
    assert_close(recording[1].dense(), wanted[1].dense())


@pytest.mark.parametrize("lie", ["scale", "softcap"])
def test_an_attention_that_does_not_do_as_it_says_is_refused(lie: str) -> None:
    def lying(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        s = q @ k.mT * kwargs["scaling"]
        s = s * 1.3 if lie == "scale" else 0.5 * torch.tanh(s / 0.5)
        s = s.masked_fill(~mask, FINFO_MIN) if mask is not None else s + torch.full_like(s, -torch.inf).triu(1)
        return (s.softmax(-1) @ v).transpose(1, 2).contiguous(), None

    model, inputs = llama()
    with registered("lying", lying):
        model.set_attn_implementation("lying")
        with pytest.raises(ProofError) as refused, record(model) as recording:
            model(**inputs)
    assert "layers.0.self_attn" in str(refused.value)
    assert "tolerance 1e-04" in str(refused.value)
    assert recording.runs == []
    assert recording.calls == []
    assert_untouched(model)


@pytest.mark.slow
def test_flex_attention() -> None:
    model, inputs = llama()
    with record(model) as wanted, torch.no_grad():
        model(**inputs)
    try:
        model.set_attn_implementation("flex_attention")
        with torch.no_grad():
            model(**inputs)
    except Exception as error:
        pytest.skip(f"flex_attention does not run here: {type(error).__name__}")
    with record(model) as recording, torch.no_grad():
        model(**inputs)
    valid = inputs["attention_mask"].bool()
    for got, of_sdpa in zip(recording, wanted, strict=True):
        difference = (got.dense() - of_sdpa.dense()).abs().amax((1, 3))
        assert difference[valid].max() < 1e-5


# ---------------------------------------------------------------- nothing changes, nothing is left behind


def state() -> list[Any]:
    """Everything that watching puts something in the place of."""
    return [
        AttentionInterface.get_interface,
        F.multi_head_attention_forward,
        F.scaled_dot_product_attention,
        torch._native_multi_head_attention,
        torch._transformer_encoder_layer_fwd,
        nn.MultiheadAttention.forward,
        nn.TransformerEncoderLayer.forward,
        nn.TransformerEncoder.forward,
    ]


ORIGINALS = state()


def assert_untouched(model: nn.Module) -> None:
    assert all(now is before for now, before in zip(state(), ORIGINALS, strict=True))
    assert _get_current_function_mode_stack() == []
    hooks = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    always = [h for m in model.modules() for h in m._forward_hooks_always_called]
    assert hooks == always == []


class Failing(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.first, self.error = NanoGPT(), error

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.error is not None:
            raise self.error
        return x


@pytest.mark.parametrize("error", [RuntimeError("it broke"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_after_an_error_in_the_model_nothing_is_left_behind(error: BaseException) -> None:
    model = Failing(error)
    with pytest.raises(type(error)), record(model) as recording:
        model(torch.randn(B, L, E))
    assert_untouched(model)
    assert recording.runs == []
    model.error = None
    with record(model) as recording:
        model(torch.randn(B, L, E))
    assert len(recording) == 1


def test_a_forward_that_failed_and_was_caught_is_no_run() -> None:
    model = Failing(RuntimeError("it broke"))
    with record(model) as recording:
        with pytest.raises(RuntimeError, match="it broke"):
            model(torch.randn(B, L, E))
        model.error = None
        try:
            raise KeyError("elsewhere")
        except KeyError:  # a forward inside a handler has not failed
            model(torch.randn(B, L, E))
    assert len(recording.runs) == 1


def test_after_an_error_in_the_block_nothing_is_left_behind() -> None:
    model, inputs = llama()
    with pytest.raises(ZeroDivisionError), record(model):
        print(first_tensors(model(**inputs))[0].shape[0] / 0)
    assert_untouched(model)


def test_a_watch_that_could_not_begin_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ImportError("no AttentionInterface")

    model, inputs = llama()
    with monkeypatch.context() as patched:
        patched.setattr("headscope.watching.hooks.huggingface.install", fail)
        with pytest.raises(ImportError, match="no AttentionInterface"), record(model):
            model(**inputs)
    assert_untouched(model)
    assert watches._WATCHES == []


def test_inside_the_block_the_functions_are_back_after_the_last_watch_ends() -> None:
    model, _ = llama()
    with watch(model):
        with watch(model):
            pass
        assert AttentionInterface.get_interface is not ORIGINALS[0]
    assert_untouched(model)


class Names(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


class Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def self_attending() -> nn.Module:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = layer_of(batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    return Both()


@pytest.mark.parametrize("mode", [Names, Ops])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["sdpa", "torch.nn", "encoder", "huggingface"])
def test_a_mode_of_the_users_own_sees_what_it_sees_without_us(mode: type[Any], training: bool, kind: str) -> None:
    x = torch.randn(B, L, E)
    model, inputs = {
        "sdpa": lambda: (Stack(), {"x": x}),
        "torch.nn": lambda: (self_attending(), {"x": x}),
        "encoder": lambda: (nn.TransformerEncoderLayer(E, 2, 16, dropout=0.0, batch_first=True), {"src": x}),
        "huggingface": llama,
    }[kind]()
    model.train(training)
    with torch.no_grad(), mode() as alone:
        plain = first_tensors(model(**inputs))
    with torch.no_grad(), record(model), mode() as inner:
        watched = first_tensors(model(**inputs))
    with torch.no_grad(), mode() as outer, record(model) as recording:
        again = first_tensors(model(**inputs))
    assert inner.seen == alone.seen
    assert [n for n in outer.seen if n != "__get__"] == [n for n in alone.seen if n != "__get__"]
    assert len(recording) >= 1
    for a, b, c in zip(plain, watched, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_a_compiled_model_is_refused_with_what_to_do() -> None:
    model = Stack()
    with pytest.raises(UnsupportedAttention) as refused, record(torch.compile(model, backend="eager")):
        raise AssertionError("not reached")
    assert str(refused.value).startswith("the model is compiled (torch.compile)")
    assert "._orig_mod" in str(refused.value)
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    with pytest.raises(UnsupportedAttention, match=r"module 'blocks\.1' of the model is compiled"), record(model):
        raise AssertionError("not reached")
    in_place = NanoGPT()
    in_place.compile(backend="eager")
    with pytest.raises(UnsupportedAttention, match="the model is compiled"), record(in_place):
        raise AssertionError("not reached")
    assert_untouched(model)


def test_two_threads_run_the_same_model_under_one_recording() -> None:
    model = llama()[0]
    texts = [torch.randint(3, 90, (1, n)) for n in (5, 8)]
    wanted = []
    for text in texts:
        with record(model) as alone:
            model(text)
        wanted.append(alone[1].dense())
    ready = threading.Barrier(2)

    def run(text: Tensor) -> None:
        ready.wait()
        for _ in range(3):
            model(text)

    with record(model) as recording:
        threads = [threading.Thread(target=run, args=(text,)) for text in texts]
        [t.start() for t in threads]
        [t.join() for t in threads]
    assert len(recording.runs) == 6
    for found in recording.runs:
        assert_close(found[1].dense(), wanted[0] if found[1].shape[2] == 5 else wanted[1])
    assert sorted(found[0].shape[2] for found in recording.runs) == [5, 5, 5, 8, 8, 8]
    assert_untouched(model)


def test_two_recordings_of_two_models_at_once() -> None:
    models = [Stack(), NanoGPT()]
    counts: dict[int, list[int]] = {0: [], 1: []}
    ready = threading.Barrier(2)

    def run(index: int) -> None:
        ready.wait()
        for _ in range(5):
            with record(models[index]) as recording:
                models[index](torch.randn(B, L + index, E))
            counts[index].append(len(recording))
            assert recording[0].shape[2] == L + index

    threads = [threading.Thread(target=run, args=(index,)) for index in (0, 1)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert counts == {0: [2] * 5, 1: [1] * 5}
    assert_untouched(models[0])
    assert_untouched(models[1])


def test_a_recording_of_the_model_and_one_of_its_module_both_see_everything() -> None:
    model, x = Stack(), torch.randn(B, L, E)
    with record(model) as whole, record(model.blocks[1]) as part:
        model(x)
    with record(model.blocks[1]) as part_first, record(model) as whole_second:
        model(x)
    for found in (whole, whole_second):
        assert [site.name for site in found.sites] == ["blocks.0", "blocks.1"]
    for found in (part, part_first):
        assert [site.name for site in found.sites] == [""]
        assert_close(found[0].dense(), whole[1].dense())


def test_a_call_of_another_model_is_not_ours() -> None:
    model, other = NanoGPT(), NanoGPT()
    with record(model) as recording:
        other(torch.randn(B, L, E))
        model(torch.randn(B, L, E))
        other(torch.randn(B, L, E))
    assert len(recording.calls) == 1


def test_a_module_that_occurs_twice_has_one_name_and_two_occurrences() -> None:
    model = Stack()
    model.blocks[1] = model.blocks[0]
    with record(model) as recording:
        model(torch.randn(B, L, E))
    assert [(site.name, site.occurrence) for site in recording.sites] == [("blocks.0", 0), ("blocks.0", 1)]


def test_inference_mode() -> None:
    model, x = NanoGPT(), torch.randn(B, L, E)
    with torch.inference_mode():
        got, _ = sees(model, x)
    assert_close(got, sees(model, x)[0].detach())


def gradients(model: nn.Module, x: Tensor, *, how: str) -> list[Tensor]:
    model.zero_grad()
    if how == "alone":
        model(x).square().sum().backward()
    else:
        with record(model) as recording:
            loss = model(x).square().sum()
            if how == "inside":
                loss.backward()
        if how == "outside":
            loss.backward()
        assert len(recording.calls) == 2
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("make", [NanoGPT, self_attending])
@pytest.mark.parametrize("how", ["inside", "outside"])
def test_training_gives_the_same_gradients(make: Callable[[], nn.Module], how: str) -> None:
    model, x = Stack(make), torch.randn(B, L, E)
    alone = gradients(model, x, how="alone")
    watched = gradients(model, x, how=how)
    assert len(alone) == len(watched) == 8
    assert all(torch.equal(a, b) for a, b in zip(alone, watched, strict=True))


@pytest.mark.parametrize("make", [NanoGPT, self_attending])
def test_without_detach_an_answer_reaches_the_parameters(make: Callable[[], nn.Module]) -> None:
    model, x = Stack(make), torch.randn(B, L, E)
    with record(model, detach=False) as recording:
        model(x)
    recording[1].entropy().sum().backward()
    first = next(model.blocks[0].parameters()).grad
    assert first is not None
    assert first.abs().max() > 0
    with record(model) as recording:
        model(x)
    assert not recording[1].entropy().requires_grad


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_a_checkpoint_computes_again_is_not_a_second_call(reentrant: bool) -> None:
    class Checkpointed(Stack):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + checkpoint(block, x, use_reentrant=reentrant)
            return x

    model = Checkpointed()
    x = torch.randn(B, L, E, requires_grad=True)
    with record(model) as recording:
        model(x).sum().backward()
    assert [site.name for site in recording.sites] == ["blocks.0", "blocks.1"]
    assert len(recording.calls) == 2
    assert x.grad is not None
    assert_untouched(model)


def test_gradient_checkpointing_of_transformers() -> None:
    model, inputs = llama()
    model.train()
    model.gradient_checkpointing_enable()
    with record(model) as recording:
        first_tensors(model(**inputs))[0].sum().backward()
    assert len(recording.calls) == 2


def test_a_watch_is_told_of_calls_with_their_operands_and_outputs() -> None:
    model, x, seen = NanoGPT(), torch.randn(B, L, E), []
    with watch(model, lambda call, forward: seen.append((call, forward.root))):
        model(x)
    call: AttentionCall = seen[0][0]
    assert seen[0][1] == call.name == ""
    assert call.value.shape == (B, H, L, D)
    assert_close(call.matrix() @ call.value, call.head_outputs())


def test_nothing_seen_names_the_modules() -> None:
    class OwnAttention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.mT).softmax(-1) @ x

    model = Stack(OwnAttention)
    with pytest.raises(NothingSeen) as nothing, record(model):
        model(torch.randn(B, L, E))
    assert "Stack ran 1 times" in str(nothing.value)
    assert "blocks.0 (OwnAttention), blocks.1 (OwnAttention)" in str(nothing.value)
    assert_untouched(model)


def test_a_block_in_which_nothing_runs_is_not_an_error() -> None:
    with record(NanoGPT()) as recording:
        pass
    assert len(recording) == 0


class Asked(nn.Module):
    def forward(self, *operands: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(*operands, attn_mask=mask)


@pytest.mark.parametrize("shape", [(6, 1), (2, 1, 6, 1), (1, 1), (2, 4, 1, 1)])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_masks_that_are_stretched_over_the_keys(shape: tuple[int, ...], kind: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)
    hidden = torch.zeros(shape, dtype=torch.bool)
    hidden.view(-1)[0] = True
    mask = ~hidden if kind == torch.bool else torch.zeros(shape).masked_fill(hidden, -torch.inf)
    model = Asked()
    with torch.no_grad(), record(model) as recording:
        output = model(q, k, v, mask=mask)
    assert torch.equal(output, model(q, k, v, mask=mask))
    sums = recording[0].dense().sum(-1)
    torch.testing.assert_close(sums, (~hidden).expand(2, 4, 6, 9)[..., 0].float())


def test_a_call_in_which_nobody_looks_is_let_through() -> None:
    model = Asked()
    k = torch.randn(2, 4, 9, 8)
    with torch.no_grad(), record(model) as recording:
        assert model(k[:, :, :0], k, k).shape == (2, 4, 0, 8)
        model(k, k, k)
    assert [tuple(call.shape) for call in recording.calls] == [(2, 4, 9, 9)]
