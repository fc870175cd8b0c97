"""The hook for torch.nn: nn.MultiheadAttention and nn.TransformerEncoderLayer on all their paths.

The three functions that those modules call last are wrapped where they are looked up, and run unchanged; queries and
keys are computed again from their arguments. In torch's masks True means *hidden*: they are inverted here.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headscope.errors import UnsupportedAttention
from headscope.ops.masks import padding
from headscope.ops.scores import Scores, make_scores
from headscope.watching.hooks.call import AttentionCall, Output
from headscope.watching.hooks.mask_formats import Read, combine, read_mask
from headscope.watching.hooks.reporting import autocast_operands, report, report_call
from headscope.watching.hooks.sdpa import causal_from_the_top, resumed, suspended
from headscope.watching.hooks.watches import (
    Forward,
    active_watches,
    unwatched,
    within_call,
)

_ORIGINAL: list[tuple[Any, str, Any]] = []
_local = threading.local()
_HIDDEN = -1e4  # a number in an additive mask that hides, also in half precision
_SLOW = inspect.signature(F.multi_head_attention_forward)


def install(model: nn.Module) -> None:
    """Wrap the functions, the modules' forward, and what the model's own classes do inside such modules."""
    _install()
    for module in model.modules():
        children: Iterable[nn.Module] = ()
        if isinstance(module, nn.TransformerEncoderLayer):
            children = module.children()
            for name in ("forward", "_sa_block", "_ff_block"):
                _wrap_own(type(module), name)
        elif isinstance(module, nn.TransformerEncoder):
            children = module.layers
        for child in children:
            _wrap_own(type(child), "forward")


def _install() -> None:
    if _ORIGINAL:
        return
    _wrap(F, "multi_head_attention_forward", _report_slow)
    _wrap(torch, "_native_multi_head_attention", _report_native)
    _wrap(torch, "_transformer_encoder_layer_fwd", _report_layer)
    for kind in (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder):
        _wrap_forward(kind)


def remove() -> None:
    """Put them back."""
    while _ORIGINAL:
        owner, name, original = _ORIGINAL.pop()
        setattr(owner, name, original)


def _wrap(owner: Any, name: str, read: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    _ORIGINAL.append((owner, name, original))

    @wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        if not active_watches():
            return original(*args, **kwargs)
        with within_call():
            result = original(*args, **kwargs)
        return report(result, lambda: read(result, *args, **kwargs))

    setattr(owner, name, function)


def _wrap_own(kind: type[nn.Module], name: str) -> None:
    """A method of the user's class may call attention itself: our modes are on while it runs."""
    owner = next(k for k in kind.__mro__ if name in vars(k))
    original = vars(owner)[name]
    wrapped = any(o is owner and n == name for o, n, _ in _ORIGINAL)
    if wrapped or owner.__module__.startswith("torch.") or not inspect.isfunction(original):
        return
    _ORIGINAL.append((owner, name, original))

    @wraps(original)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with resumed():
            return original(self, *args, **kwargs)

    setattr(owner, name, method)


def _wrap_forward(kind: type[nn.Module]) -> None:
    original = kind.forward
    _ORIGINAL.append((kind, "forward", original))

    @wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _on_fast_path(self):
            return original(self, *args, **kwargs)

    kind.forward = forward


@contextmanager
def _on_fast_path(module: nn.Module) -> Iterator[None]:
    """While a torch.nn attention module runs: it is on the stack; our modes, which end its fast path, are off."""
    if not active_watches():
        yield
        return
    _stack().append(module)
    try:
        with suspended():
            yield
    finally:
        _stack().pop()


def _stack() -> list[nn.Module]:
    if not hasattr(_local, "running"):
        _local.running = []
    running: list[nn.Module] = _local.running
    return running


def _module() -> nn.Module | None:
    return _stack()[-1] if _stack() else None


def _report_slow(result: Any, *args: Any, **kwargs: Any) -> Any:
    """F.multi_head_attention_forward: [L, B, E], or [L, E] without a batch."""
    bound = _SLOW.bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = SimpleNamespace(**bound.arguments)
    flat = arguments.query.dim() == 2
    q, k, v, extra = _project(arguments, flat)
    shape = (q.shape[0], arguments.num_heads, q.shape[2], k.shape[2])
    padding_read = _read(_as_padding(arguments.key_padding_mask), shape, extra)

    def candidates(_: Forward) -> Iterator[Scores]:
        mask = arguments.attn_mask
        if mask is not None and arguments.is_causal:  # the function may use this hint instead of the mask
            yield make_scores(q, k, *combine((causal_from_the_top(shape), None), padding_read), None)
        yield make_scores(q, k, *combine(_read(_four_axes(mask, shape), shape, extra), padding_read), None)

    returned = result[0].unsqueeze(1) if flat else result[0]

    def finish(heads: Tensor, b: Tensor, r: Tensor) -> Tensor:
        weight, bias = arguments.out_proj_weight.to(heads.dtype), arguments.out_proj_bias  # autocast has another dtype
        return F.linear(heads.flatten(-2), weight, None if bias is None else bias.to(heads.dtype))

    def write(new: Tensor) -> Tensor:
        return finish(new.permute(2, 0, 1, 3), new, new).view_as(result[0])

    output = Output(result[0], finish, lambda b, r: returned[r, b], write)
    dropout = float(arguments.dropout_p) if arguments.training else 0.0
    valid = _valid(arguments.key_padding_mask, shape)
    cross = arguments.query.shape != arguments.key.shape or arguments.query.data_ptr() != arguments.key.data_ptr()
    call = report_call(_module(), "torch.nn", candidates, v, output, dropout, valid=valid, cross=cross)
    return _edited(call, result)


def _edited(call: AttentionCall, result: Any) -> Any:
    """What the function returns: unchanged, or with the output of an edit, and its weights if they were requested."""
    if call.output.raw is result[0]:
        return result
    weights = result[1]
    if isinstance(weights, Tensor) and weights.numel():
        with unwatched():
            maps = call.matrix().dense(limit=1 << 62).to(weights.dtype)  # torch built this map, too
        maps = maps if maps.numel() == weights.numel() else maps.mean(1)
        weights = maps.view_as(weights)
    return call.output.raw, weights


def _project(arguments: SimpleNamespace, flat: bool) -> tuple[Tensor, Tensor, Tensor, int]:
    """Queries, keys and values [B, H, *, D] from the function's arguments, and how many keys it adds itself."""
    if arguments.static_k is not None or arguments.static_v is not None:
        raise UnsupportedAttention(
            "multi_head_attention_forward got static_k or static_v, which are not read: pass key and value instead."
        )
    q, k, v = (x.unsqueeze(1) if flat else x for x in _projected(arguments))
    extra = 0
    if arguments.bias_k is not None and arguments.bias_v is not None:
        k, v = (torch.cat([x, b.expand(1, x.shape[1], -1)]) for x, b in ((k, arguments.bias_k), (v, arguments.bias_v)))
        extra += 1
    if arguments.add_zero_attn:
        k, v = (torch.cat([x, x.new_zeros(1, *x.shape[1:])]) for x in (k, v))
        extra += 1
    q, k, v = (x.unflatten(-1, (arguments.num_heads, -1)).permute(1, 2, 0, 3) for x in autocast_operands(q, k, v))
    return q, k, v, extra


def _projected(arguments: SimpleNamespace) -> Sequence[Tensor]:
    """The three projections, packed where torch packs them: in half precision the rounding depends on that."""
    query, key, value = arguments.query, arguments.key, arguments.value
    if arguments.use_separate_proj_weight:
        weights: Sequence[Tensor] = (arguments.q_proj_weight, arguments.k_proj_weight, arguments.v_proj_weight)
    else:
        weights = arguments.in_proj_weight.chunk(3)
    biases = (None, None, None) if arguments.in_proj_bias is None else arguments.in_proj_bias.chunk(3)
    if key is not value or arguments.use_separate_proj_weight:
        return [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]
    if query is key:
        return F.linear(query, arguments.in_proj_weight, arguments.in_proj_bias).chunk(3, -1)
    size = len(weights[0])
    both = F.linear(key, arguments.in_proj_weight[size:], None if biases[0] is None else arguments.in_proj_bias[size:])
    return [F.linear(query, weights[0], biases[0]), *both.chunk(2, -1)]


def _report_native(
    result: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> Any:
    """The fast path of nn.MultiheadAttention: [B, L, E], also nested."""

    def finish(heads: Tensor, b: Tensor, r: Tensor) -> Tensor:
        return F.linear(heads.flatten(-2), proj_weight, proj_bias)

    projected = (query, qkv_weight, qkv_bias, num_heads)
    return _edited(_report_fast(result[0], projected, (mask, mask_type), finish), result)


def _report_layer(
    result: Tensor,
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    ffn1_weight: Tensor,
    ffn1_bias: Tensor,
    ffn2_weight: Tensor,
    ffn2_bias: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """The fast path of nn.TransformerEncoderLayer, which returns the whole layer's output."""

    def norm1(x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], norm1_weight, norm1_bias, eps)

    def norm2(x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], norm2_weight, norm2_bias, eps)

    def feed_forward(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn1_weight, ffn1_bias)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn2_weight, ffn2_bias)

    whole = _padded(src)[0]

    def finish(heads: Tensor, b: Tensor, r: Tensor) -> Tensor:
        x = whole[b, r] + F.linear(heads.flatten(-2), proj_weight, proj_bias)
        if norm_first:
            return x + feed_forward(norm2(x))
        x = norm1(x)
        return norm2(x + feed_forward(x))

    into = norm1(whole) if norm_first else whole
    lengths = _padded(src)[1]
    projected = (into, qkv_weight, qkv_bias, num_heads)
    return _report_fast(result, projected, (mask, mask_type), finish, lengths, ".self_attn").output.raw


def _report_fast(
    returned: Tensor,
    projected: tuple[Tensor, Tensor, Tensor, int],
    masked: tuple[Tensor | None, int | None],
    finish: Callable[[Tensor, Tensor, Tensor], Tensor],
    lengths: Tensor | None = None,
    suffix: str = "",
) -> AttentionCall:
    x, weight, bias, num_heads = projected
    if x.is_nested:
        x, lengths = _padded(x)
    q, k, v = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in F.linear(x, weight, bias).chunk(3, -1))
    shape = (q.shape[0], num_heads, q.shape[2], k.shape[2])
    outputs = _padded(returned)[0]

    def candidates(_: Forward) -> Iterator[Scores]:
        mask, kind = masked
        hidden = None if mask is None else mask.bool()  # as the op reads it: any number but 0 hides
        hidden = _as_padding(hidden) if kind == 1 else _four_axes(hidden, shape)
        read = _read(hidden, shape, 0)
        yield make_scores(q, k, *(read if lengths is None else combine(read, (padding(lengths), None))), None)

    def write(new: Tensor) -> Tensor:
        b, r = torch.meshgrid(torch.arange(shape[0]), torch.arange(shape[2]), indexing="ij")
        rows = finish(new.transpose(1, 2).flatten(0, 1), b.flatten(), r.flatten()).view(*outputs.shape)
        if not returned.is_nested:
            return rows
        return torch.nested.as_nested_tensor([rows[i, : int(n)] for i, n in enumerate(lengths)])  # type: ignore[arg-type]

    valid = None if lengths is None else torch.arange(shape[2]) < lengths[:, None]
    if masked[1] == 1 and masked[0] is not None:
        valid = ~masked[0].bool()
    output = Output(returned, finish, lambda b, r: outputs[b, r], write)
    return report_call(_module(), "torch.nn", candidates, v, output, suffix=suffix, valid=valid)


def _padded(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    if not tensor.is_nested:
        return tensor, None
    parts = list(tensor.unbind())
    lengths = torch.tensor([len(part) for part in parts])
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True), lengths


def _four_axes(mask: Tensor | None, shape: tuple[int, int, int, int]) -> Tensor | None:
    """[L, S], [1, L, S], [B·H, L, S] or 4-D as 4-D."""
    if mask is None or mask.dim() == 4:
        return mask
    if mask.dim() == 2 or len(mask) == 1:
        return mask.view(1, 1, *mask.shape[-2:])
    return mask.view(shape[0], shape[1], *mask.shape[-2:])


def _as_padding(mask: Tensor | None) -> Tensor | None:
    """A key padding mask [B, S] (or [S]) as [B, 1, 1, S]."""
    return None if mask is None else mask.view(-1, 1, 1, mask.shape[-1])


def _read(mask: Tensor | None, shape: tuple[int, int, int, int], extra: int) -> Read:
    """A torch.nn mask, bool (True: hidden) or additive; ``extra`` keys were added after it."""
    if mask is None:
        return None, None
    visible_or_bias = ~mask if mask.dtype == torch.bool else mask
    if extra:
        visible_or_bias = F.pad(visible_or_bias, (0, extra), value=mask.dtype == torch.bool)
    return read_mask(visible_or_bias, shape)


def _valid(mask: Tensor | None, shape: tuple[int, int, int, int]) -> Tensor | None:
    if mask is None or mask.dim() != 2:
        return None
    valid = ~mask if mask.dtype == torch.bool else mask > _HIDDEN  # what is not hidden is a bias
    return valid if shape[2] == valid.shape[1] else None
