"""The hook for scaled_dot_product_attention: recorded weights are those that it applies."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as imported_by_name

from headscope.watching.recording import record
from tests.reference import FINFO_MIN, weights
from tests.watching.small_models import B, D, E, H, L, NanoGPT, S, Sdpa, assert_close, qkv, recorded_weights


def test_sdpa_of_a_nanogpt_block_gives_causal_weights() -> None:
    model, x = NanoGPT(), torch.randn(B, L, E)
    got, _ = recorded_weights(model, x)
    q, k, _ = (t.view(B, L, H, D).transpose(1, 2) for t in model.c_attn(x).split(E, 2))
    assert_close(got, weights(q, k, visible=torch.ones(L, L).tril().bool()))


def test_recorded_mask_of_a_causal_call_is_the_rule() -> None:
    with record(model := NanoGPT()) as recording:
        model(torch.randn(B, L, E))
    mask = recording.sites[0].calls[0].mask
    assert mask is not None
    assert mask.is_causal


def test_sdpa_imported_by_name_is_recorded() -> None:
    q, k, v = qkv()
    got, _ = recorded_weights(Sdpa(imported_by_name), q, k, v)
    assert_close(got, weights(q, k))


def test_timm_attention_gives_its_weights() -> None:
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
    got, _ = recorded_weights(model, x)
    q, k, _ = model.qkv(x).reshape(B, L, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    assert_close(got, weights(model.norm(q), model.norm(k)))


@pytest.mark.parametrize(("front", "shape"), [((), (1, 1)), ((5,), (1, 5)), ((2, 3, 2), (6, 2))], ids=str)
def test_sdpa_reads_inputs_of_2_3_and_5_axes(front: tuple[int, ...], shape: tuple[int, int]) -> None:
    q, k, v = qkv(front=front)
    got, _ = recorded_weights(Sdpa(), q, k, v)
    assert_close(got, weights(q.view(*shape, L, D), k.view(*shape, S, D)))


@pytest.mark.parametrize(
    "fronts",
    [((3, 2), (1, 2), (1, 2)), ((1, 2), (3, 2), (3, 2)), ((2, 1), (2, 3), (2, 3)), ((2, 3), (2, 1), (2, 3))],
    ids=str,
)
def test_sdpa_reads_operands_that_torch_broadcasts(fronts: tuple[tuple[int, int], ...]) -> None:
    q, k, v = (torch.randn(*front, n, D) for front, n in zip(fronts, (L, S, S), strict=True))
    got, _ = recorded_weights(Sdpa(), q, k, v)
    front = torch.broadcast_shapes(*fronts)
    assert_close(got, weights(q.expand(*front, -1, -1), k.expand(*front, -1, -1)))


def test_sdpa_reads_scale_value_width_and_grouped_heads() -> None:
    q, k, v = torch.randn(B, 6, L, D), torch.randn(B, 3, S, D), torch.randn(B, 3, S, 9)
    got, _ = recorded_weights(Sdpa(), q, k, v, scale=0.9, enable_gqa=True)
    assert_close(got, weights(q, k, scale=0.9))


@pytest.mark.parametrize(("queries", "keys"), [(L, S), (S, L)])
def test_is_causal_counts_from_the_first_key(queries: int, keys: int) -> None:
    q, k, v = qkv(queries=queries, keys=keys)
    got, _ = recorded_weights(Sdpa(), q, k, v, is_causal=True)
    wanted = weights(q, k, visible=torch.ones(queries, keys).tril().bool())
    used = min(queries, keys)  # the keys after the last query are the unused slots of a cache
    assert_close(got, wanted[..., :used])
    assert not wanted[..., used:].any()


@pytest.mark.parametrize("shape", [(L, S), (B, 1, L, S), (B, H, L, S), (B, 1, 1, S)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "additive", "-inf"])
def test_sdpa_reads_masks_of_each_kind_and_shape(shape: tuple[int, ...], kind: str) -> None:
    q, k, v = qkv()
    seen = torch.rand(shape) < 0.6
    seen[..., 0] = True
    bias = torch.randn(shape) if kind == "additive" else None
    mask = seen if kind == "bool" else bias if bias is not None else torch.where(seen, 0.0, -torch.inf)
    got, _ = recorded_weights(Sdpa(), q, k, v, attn_mask=mask)
    assert_close(got, weights(q, k, bias=bias, visible=None if bias is not None else seen))


def test_mask_row_of_finfo_min_gives_uniform_weights() -> None:
    q, k, v = qkv()
    mask = torch.where(torch.rand(L, S) < 0.6, 0.0, FINFO_MIN)
    mask[:, 0], mask[4] = 0.0, FINFO_MIN
    got, _ = recorded_weights(Sdpa(), q, k, v, attn_mask=mask)
    assert_close(got[:, :, 4], torch.full((B, H, S), 1 / S))
    assert_close(got, (q @ k.mT * D**-0.5 + mask).softmax(-1))


def test_mask_row_of_minus_infinity_gives_no_weights() -> None:
    q, k, v = qkv()
    mask = torch.zeros(L, S)
    mask[4] = -torch.inf
    got, _ = recorded_weights(Sdpa(), q, k, v, attn_mask=mask)
    assert got[:, :, 4].eq(0).all()
    assert_close(got.sum(-1)[:, :, :4], torch.ones(B, H, 4))


def test_mask_changed_in_place_between_calls_is_read_again() -> None:
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


def test_proof_is_none_under_dropout() -> None:
    model = NanoGPT(dropout=0.5)
    x = torch.randn(B, L, E)
    got, _ = recorded_weights(model, x)
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
def test_sdpa_reads_nested_tensors(layout: torch.layout) -> None:
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


def test_autocast_weights_come_from_the_converted_operands() -> None:
    q, k, v = qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, output = recorded_weights(Sdpa(), q, k, v)
    assert output.dtype == torch.bfloat16
    assert_close(got, weights(q.bfloat16(), k.bfloat16()))
    assert (got - weights(q, k)).abs().max() > 1e-5


@pytest.mark.parametrize("shape", [(6, 1), (2, 1, 6, 1), (1, 1), (2, 4, 1, 1)])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_sdpa_reads_masks_broadcast_over_the_keys(shape: tuple[int, ...], kind: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)
    hidden = torch.zeros(shape, dtype=torch.bool)
    hidden.view(-1)[0] = True
    mask = ~hidden if kind == torch.bool else torch.zeros(shape).masked_fill(hidden, -torch.inf)
    model = Sdpa()
    with torch.no_grad(), record(model) as recording:
        output = model(q, k, v, attn_mask=mask)
    assert torch.equal(output, model(q, k, v, attn_mask=mask))
    sums = recording[0].dense().sum(-1)
    torch.testing.assert_close(sums, (~hidden).expand(2, 4, 6, 9)[..., 0].float())


def test_sdpa_without_queries_is_not_recorded() -> None:
    model = Sdpa()
    k = torch.randn(2, 4, 9, 8)
    with torch.no_grad(), record(model) as recording:
        assert model(k[:, :, :0], k, k).shape == (2, 4, 0, 8)
        model(k, k, k)
    assert [tuple(call.shape) for call in recording.calls] == [(2, 4, 9, 9)]
