"""Linear maps by oneDNN, where MKL leaves a CPU's AVX-512 unused: the same numbers, the same gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from headscope import MultiHeadAttention, masks, record
from headscope.nn.linear import Linear, linear
from headscope.ops.kernels import cpu as processor

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN")


@pytest.fixture(autouse=True)
def preferred(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU on which oneDNN is the faster one, whatever this one is; and for products of any size."""
    monkeypatch.setattr(processor, "_ONEDNN", True)
    monkeypatch.setattr(processor, "_FEW_PRODUCTS", {True: 0, False: 0})
    return


class Ops(TorchDispatchMode):
    """The names of the ops that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def goes_by_onednn(action: Any) -> bool:
    with Ops() as ops:
        action()
    return any("mkldnn" in name for name in ops.names)


INPUTS = {
    "rows": lambda: torch.randn(7, 48),
    "one row": lambda: torch.randn(1, 48),
    "a batch": lambda: torch.randn(2, 7, 48),
    "four axes": lambda: torch.randn(2, 3, 7, 48),
    "a vector": lambda: torch.randn(48),
    "turned": lambda: torch.randn(48, 7).t(),
    "stretched": lambda: torch.randn(1, 48).expand(7, 48),
    "every other": lambda: torch.randn(14, 96)[::2, ::2],
}
WEIGHTS = {
    "whole": lambda: torch.randn(40, 48),
    "rows of a larger one": lambda: torch.randn(120, 48)[40:80],
    "turned": lambda: torch.randn(48, 40).t(),
    "every other": lambda: torch.randn(80, 96)[::2, ::2],
    "stretched": lambda: torch.randn(1, 48).expand(40, 48),
}


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("x", INPUTS)
@pytest.mark.parametrize("bias", [True, False])
def test_whatever_lies_how_in_memory_is_multiplied_right(x: str, weight: str, bias: bool) -> None:
    torch.manual_seed(0)
    given, w, b = INPUTS[x](), WEIGHTS[weight](), torch.randn(40) if bias else None
    assert goes_by_onednn(lambda: linear(given, w, b))
    wide = F.linear(given.double(), w.double(), None if b is None else b.double())
    torch.testing.assert_close(linear(given, w, b).double(), wide, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("x", INPUTS)
@pytest.mark.parametrize("wanted", ["all", "x", "weight", "bias"])
def test_gradients_are_those_of_torchs_own_map(x: str, wanted: str) -> None:
    torch.manual_seed(0)
    operands = {"x": INPUTS[x](), "weight": torch.randn(40, 48), "bias": torch.randn(40)}
    found: list[list[Tensor | None]] = []
    for way, kind in ((linear, torch.float32), (F.linear, torch.float64)):
        leaves = {n: t.to(kind).clone().requires_grad_(wanted in ("all", n)) for n, t in operands.items()}
        out = way(*leaves.values())
        (out.sin() * out.detach()).sum().backward()
        found.append([leaf.grad for leaf in leaves.values()])
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-3)
    assert sum(grad is not None for grad in found[0]) == (3 if wanted == "all" else 1)


def test_gradients_have_gradients() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 16), torch.randn(8, 16), torch.randn(8)
    found = []
    for way, kind in ((linear, torch.float32), (F.linear, torch.float64)):
        leaves = [t.to(kind).clone().requires_grad_() for t in (x, weight, bias)]
        first = torch.autograd.grad(way(*leaves).sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        found.append(second)
    for ours, theirs in zip(*found, strict=True):
        assert theirs.norm() > 0.1
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-3)


def test_torch_keeps_what_it_has_to_see(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Linear(16, 8), torch.randn(5, 16)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    assert goes_by_onednn(lambda: layer(x))

    def parts(w: Tensor) -> Tensor:
        return linear(x, w, bias).sum()

    own = torch.func.grad(lambda w: F.linear(x, w, bias).sum())(weight)
    torch.testing.assert_close(torch.func.grad(parts)(weight), own)
    torch.testing.assert_close(torch.func.vmap(lambda row: linear(row, weight, bias))(x), F.linear(x, weight, bias))
    change = torch.func.jvp(lambda y: linear(y, weight, bias), (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(change, F.linear(torch.ones_like(x), weight))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        change = torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent
        assert change is not None
        torch.testing.assert_close(change, F.linear(torch.ones_like(x), weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert not goes_by_onednn(lambda: copy.deepcopy(layer).double()(x.double()))
    traced = torch.jit.trace(layer, (x,))
    assert "mkldnn" not in str(traced.inlined_graph)
    exported = torch.export.export(layer, (x,))
    assert "mkldnn" not in str(exported.graph)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not goes_by_onednn(lambda: layer(x))
    monkeypatch.setattr(processor, "_FEW_PRODUCTS", {True: 5 * 16 * 8 + 1, False: 5 * 16 * 8})
    assert not goes_by_onednn(lambda: layer(x))
    with torch.no_grad():
        assert goes_by_onednn(lambda: layer(x))


def test_only_where_mkl_leaves_avx512_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    for words, preferred in (
        ({"AuthenticAMD", "avx512f", "avx2"}, True),
        ({"AuthenticAMD", "avx2"}, False),
        ({"GenuineIntel", "avx512f", "avx2"}, False),
        (set(), False),
    ):
        monkeypatch.setattr(processor, "_WORDS", frozenset(words))
        assert processor._has_idle_avx512() is preferred
    monkeypatch.setattr(processor, "_WORDS", frozenset({"AuthenticAMD", "avx512f"}))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert processor._has_idle_avx512() is False


def test_the_module_trains_to_the_same_weights_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    first, x = MultiHeadAttention(32, 4), torch.randn(3, 9, 32)
    trained = []
    for preferred in (True, False):
        monkeypatch.setattr(processor, "_ONEDNN", preferred)
        layer = copy.deepcopy(first)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(20):
            optimizer.zero_grad()
            (layer(x, mask=masks.causal()) - x).square().mean().backward()
            optimizer.step()
        assert goes_by_onednn(lambda layer=layer: layer(x)) is preferred
        trained.append(layer.state_dict())
    assert (trained[0]["in_proj.weight"] - first.in_proj.weight).norm() > 0.01
    for ours, theirs in zip(*(weights.values() for weights in trained), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_what_is_recorded_is_what_the_module_computed() -> None:
    layer, x = MultiHeadAttention(32, 4), torch.randn(2, 9, 32)
    with torch.no_grad():
        plain = layer(x)
        with record(layer) as recording:
            seen = layer(x)
    assert torch.equal(plain, seen)
    assert recording.proof is not None
    assert recording.proof < 1e-5
