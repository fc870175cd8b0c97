"""Small models with one or two attention calls, and what tests of watching compare."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from transformers.modeling_utils import AttentionInterface

from headscope.ops.kernels import fused
from headscope.watching.recording import record
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


def recorded_weights(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
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


def layer_of(heads: int = H, **options: Any) -> nn.MultiheadAttention:
    layer = nn.MultiheadAttention(E, heads, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer


def self_attending() -> nn.Module:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = layer_of(batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    return Both()


def llama() -> tuple[nn.Module, dict[str, Any]]:
    model = ZOO["llama"].build()
    return model, ZOO["llama"].inputs(model)


def state() -> list[Any]:
    """Everything that watching puts something in the place of."""
    return [
        AttentionInterface.get_interface,
        nn.Module._call_impl,
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
    assert fused.observers == []
    assert _get_current_function_mode_stack() == []
    hooks = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    always = [h for m in model.modules() for h in m._forward_hooks_always_called]
    assert hooks == always == []
