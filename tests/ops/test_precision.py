"""Half precision on a CPU that can only emulate it: products in float32, results in the precision given."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from headscope import MultiHeadAttention, Transformer, TransformerConfig, attention, masks, positions, record
from headscope.ops.kernels import cpu as processor

HALVES = (torch.bfloat16, torch.float16)
ERROR = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # half a unit of the last bit, of numbers around 1


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without instructions for half precision, whatever this one has."""
    monkeypatch.setattr(processor, "_EMULATED", frozenset(HALVES))


def test_multiplies_reads_the_flags_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for flags, bfloat16, float16 in (
        ({"avx2", "fma"}, False, False),
        ({"avx512f", "avx512_bf16"}, True, False),
        ({"amx_bf16", "avx512_fp16"}, True, True),
        ({"fp", "asimd", "asimdhp", "bf16"}, True, True),
        (set(), None, None),
    ):
        monkeypatch.setattr(processor, "_WORDS", frozenset(flags))
        assert processor.multiplies(torch.bfloat16, cpu) is bfloat16
        assert processor.multiplies(torch.float16, cpu) is float16
        assert processor.multiplies(torch.float32, cpu) is True
    assert processor.multiplies(torch.float16, torch.device("cuda")) is True
    assert processor.multiplies(torch.bfloat16, torch.device("mps")) is None


def error(out: Tensor, wide: Tensor) -> float:
    out, wide = out.detach().double(), wide.detach().double()
    return float((out - wide).norm() / wide.norm())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["self", "cross", "grouped, rotary", "dropped in training", "alibi"])
def test_module_and_gradients_are_as_exact_as_in_emulated_half_precision(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        "grouped, rotary": {"num_kv_heads": 2, "position": positions.rotary()},
        "alibi": {"position": positions.alibi(positions.alibi_slopes(4))},
        "dropped in training": {"dropout_p": 0.25},
    }.get(kind, {})
    torch.manual_seed(0)
    layer = MultiHeadAttention(32, 4, **options)
    x = torch.randn(2, 40, 32)
    source = (torch.randn(2, 30, 32),) if kind == "cross" else ()
    mask = None if kind == "cross" else masks.causal() & masks.padding([40, 23])
    found: dict[str, list[Tensor]] = {}
    for way in ("wide", "in float32", "emulated"):
        monkeypatch.setattr(processor, "_EMULATED", frozenset(HALVES if way == "in float32" else ()))
        given = torch.float32 if way == "wide" else dtype
        module = copy.deepcopy(layer).to(given)
        inputs = [part.to(given).detach().clone().requires_grad_() for part in (x, *source)]
        torch.manual_seed(1)  # the same weights are dropped
        out = module(*inputs, mask=mask)
        (out * out.detach()).sum().backward()
        grads = [part.grad for part in (*inputs, *module.parameters())]
        assert all(grad is not None and grad.dtype == given for grad in grads)
        found[way] = [out.detach(), *(grad for grad in grads if grad is not None)]
        assert out.dtype == given
    for wide, ours, emulated in zip(*found.values(), strict=True):
        if wide.norm() > 1e-3:  # a key's bias changes nothing: its gradient is mere rounding
            assert error(ours, wide) < 20 * ERROR[dtype]
            assert error(ours, wide) < 1.2 * error(emulated, wide)


@pytest.mark.parametrize("dtype", HALVES)
def test_attention_returns_the_dtype_of_its_value(dtype: torch.dtype, emulated: None) -> None:
    q, k, v = torch.randn(3, 1, 2, 20, 8).to(dtype)
    for bias in (None, torch.zeros(20, 20, dtype=dtype, requires_grad=True)):  # fused, and a few rows at a time
        out = attention(q, k, v, bias=bias)
        wide = attention(q.double(), k.double(), v.double())
        assert out.dtype == dtype
        assert error(out, wide) < 2 * ERROR[dtype]  # rounded once


def test_recording_equals_what_the_module_computed(emulated: None) -> None:
    layer = MultiHeadAttention(32, 4).bfloat16()
    x = torch.randn(1, 20, 32).bfloat16()
    with torch.no_grad():
        plain = layer(x)
        with record(layer) as recording:
            visible = layer(x)
    assert torch.equal(plain, visible)
    assert recording.proof is not None
    assert recording.proof < 2 * ERROR[torch.bfloat16]


def test_is_emulated_is_false_under_autocast(emulated: None) -> None:
    x = torch.randn(100, 8).bfloat16()
    assert processor.is_emulated(x)
    assert not processor.is_emulated(x.float())
    assert not processor.is_emulated(x.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not processor.is_emulated(x)


def test_transformer_in_half_precision_equals_float32(emulated: None) -> None:
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=50, kind="decoder", embed_dim=32, num_heads=4, num_layers=2, ff_dim=64)
    model = Transformer(config).eval()
    tokens = torch.randint(50, (2, 30))
    with torch.no_grad():
        whole = model(tokens)
        half = copy.deepcopy(model).bfloat16()(tokens)
    assert half.dtype == torch.bfloat16
    assert error(half, whole) < 10 * ERROR[torch.bfloat16]
