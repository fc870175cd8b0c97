"""Other libraries' names and packings of the weights of an attention module."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["from_torch", "load_weights", "packed_rows", "projection_weights", "to_torch", "weights_as"]

_PROJECTIONS = ("q", "k", "v", "o")
_NAMES: dict[str, tuple[str, ...]] = {  # of the four projections, in this order
    "linears": ("linears.0", "linears.1", "linears.2", "linears.3"),
    "huggingface": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "out_proj": ("q_proj", "k_proj", "v_proj", "out_proj"),
}


def packed_rows(module: Any) -> tuple[slice, slice, slice]:
    """The rows of the packed input projection that give queries, keys and values."""
    wide, narrow = module.num_heads * module.head_dim, module.num_kv_heads * module.head_dim
    return slice(0, wide), slice(wide, wide + narrow), slice(wide + narrow, wide + 2 * narrow)


def projection_weights(module: Any) -> dict[str, Tensor]:
    """Views of the four projections' weights: "q.weight", "q.bias", "k.weight" … "o.bias"."""
    views: dict[str, Tensor] = {}
    if hasattr(module, "in_proj"):
        for name, rows in zip("qkv", packed_rows(module), strict=True):
            views |= {f"{name}.{kind}": tensor.data[rows] for kind, tensor in module.in_proj.named_parameters()}
        linears = {"o": module.out_proj}
    else:
        linears = dict(zip(_PROJECTIONS, (module.q_proj, module.k_proj, module.v_proj, module.out_proj), strict=True))
    for name, linear in linears.items():
        views |= {f"{name}.{kind}": tensor.data for kind, tensor in linear.named_parameters()}
    return views


def _norms(module: Any) -> dict[str, Tensor]:
    """Views of the norms of queries and keys, "q_norm.weight" and "k_norm.weight", if there are any."""
    if module.q_norm is None:
        return {}
    return {"q_norm.weight": module.q_norm.weight.data, "k_norm.weight": module.k_norm.weight.data}


def load_weights(module: Any, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into the module; all or none. Raises ValueError: see MultiHeadAttention.load_weights."""
    source = _read(weights)
    target = projection_weights(module) | _norms(module)
    extra = {name: tensor for name, tensor in source.items() if name not in target}
    if any(bool(tensor.any()) for tensor in extra.values()):  # a bias of zeros changes nothing
        raise ValueError(f"the weights have {', '.join(sorted(extra))}, which this module has no place for.")
    for name, tensor in target.items():
        if name not in source and name.endswith(".bias"):
            source[name] = torch.zeros_like(tensor)  # a projection without a bias
        if name not in source:
            raise ValueError(f"the weights lack {name.replace('.', ' ')}: there are {', '.join(sorted(weights))}.")
        if source[name].shape != tensor.shape:
            raise ValueError(
                f"{name.replace('.', ' ')} has shape {tuple(source[name].shape)}, this module wants "
                f"{tuple(tensor.shape)}: other sizes or numbers of heads."
            )
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])


def _read(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of any known layout, as "q.weight" and so on."""
    for name in ("bias_k", "bias_v"):
        if name in weights:
            raise ValueError(f"the weights hold {name} (add_bias_kv): a key without a position is not supported.")
    if "in_proj_weight" in weights or "q_proj_weight" in weights:
        return _read_torch(weights)
    for names in _NAMES.values():
        if all(f"{name}.weight" in weights for name in names):
            pairs = list(zip(names, _PROJECTIONS, strict=True))
            own_names = {f"{theirs}.{kind}": f"{own}.{kind}" for theirs, own in pairs for kind in ("weight", "bias")}
            own_names |= {name: name for name in ("q_norm.weight", "k_norm.weight")}
            _refuse_others(weights, own_names)
            return {own_names[name]: tensor for name, tensor in weights.items() if name in own_names}
    if "in_proj.weight" in weights:
        raise ValueError("these are weights under the module's own names: use module.load_state_dict(weights).")
    raise ValueError(
        f"weights named {', '.join(sorted(weights)[:6])} are of no known layout: nn.MultiheadAttention's, "
        "linears.0 … linears.3, or q_proj, k_proj, v_proj, o_proj."
    )


def _refuse_others(weights: Mapping[str, Tensor], known: Collection[str]) -> None:
    """Raise ValueError for names that are not ``known``. Rotary frequencies, which old files contain, are ignored."""
    other = sorted(name for name in weights if name not in known and name != "rotary_emb.inv_freq")
    if other:
        raise ValueError(
            f"the weights hold {', '.join(other)} besides the four projections: this module has no place for them."
        )


def _read_torch(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    packed = ["in_proj_weight"] if "in_proj_weight" in weights else [f"{name}_proj_weight" for name in "qkv"]
    _refuse_others(weights, {*packed, "in_proj_bias", "out_proj.weight", "out_proj.bias"})
    own = {f"o.{kind}": weights[f"out_proj.{kind}"] for kind in ("weight", "bias") if f"out_proj.{kind}" in weights}
    if "in_proj_weight" in weights:
        chunks = dict(zip("qkv", weights["in_proj_weight"].chunk(3), strict=True))
    else:
        chunks = {name: weights[f"{name}_proj_weight"] for name in "qkv"}
    own |= {f"{name}.weight": chunk for name, chunk in chunks.items()}
    if "in_proj_bias" in weights:
        own |= {f"{name}.bias": chunk for name, chunk in zip("qkv", weights["in_proj_bias"].chunk(3), strict=True)}
    return own


def weights_as(module: Any, layout: str) -> dict[str, Tensor]:
    """Copies of the weights under another library's names. Raises ValueError for an unknown layout."""
    own = {name: tensor.clone() for name, tensor in projection_weights(module).items()}
    if layout in ("linears", "huggingface"):
        their_names = dict(zip(_PROJECTIONS, _NAMES[layout], strict=True))
        norms = {name: tensor.clone() for name, tensor in _norms(module).items()}
        if norms and layout == "linears":
            raise ValueError("layout 'linears' has no names for the norms of queries and keys: use 'huggingface'.")
        return {f"{their_names[name[0]]}{name[1:]}": tensor for name, tensor in own.items()} | norms
    if layout != "torch":
        raise ValueError(f"layout is {layout!r}: it is 'torch', 'linears' or 'huggingface'.")
    _check_torch(module)
    theirs = {f"out_proj{name[1:]}": tensor for name, tensor in own.items() if name[0] == "o"}
    if hasattr(module, "in_proj"):
        theirs["in_proj_weight"] = torch.cat([own[f"{n}.weight"] for n in "qkv"])
    else:
        theirs |= {f"{n}_proj_weight": own[f"{n}.weight"] for n in "qkv"}
    if "q.bias" in own:
        theirs["in_proj_bias"] = torch.cat([own[f"{n}.bias"] for n in "qkv"])
    return theirs


def _check_torch(module: Any) -> None:
    standard = module.num_heads == module.num_kv_heads and module.head_dim * module.num_heads == module.embed_dim
    if not standard or module.position is not None or module.q_norm is not None:
        raise ValueError(
            "nn.MultiheadAttention has no shared key/value heads, head sizes of its own, positions or norms: "
            "this module cannot become one."
        )


def from_torch(make: Callable[..., Any], module: nn.MultiheadAttention) -> Any:
    """The module ``make(…)`` with torch's sizes and weights. Raises ValueError for add_bias_kv and add_zero_attn."""
    if not isinstance(module, nn.MultiheadAttention):
        raise ValueError(f"from_torch() got {type(module).__name__}: give it an nn.MultiheadAttention.")
    if module.bias_k is not None or module.add_zero_attn:
        name = "add_bias_kv" if module.bias_k is not None else "add_zero_attn"
        raise ValueError(f"nn.MultiheadAttention with {name}=True adds a key without a position: not supported.")
    new = make(
        module.embed_dim,
        module.num_heads,
        kdim=module.kdim,
        vdim=module.vdim,
        bias=module.in_proj_bias is not None,
        dropout_p=module.dropout,
    )
    reference = module.out_proj.weight
    new.to(reference.device, reference.dtype)  # before the weights are copied, so that none is rounded
    load_weights(new, module.state_dict())
    return new.train(module.training)


def to_torch(module: Any) -> nn.MultiheadAttention:
    """Torch's module with the same weights. Raises ValueError: see MultiHeadAttention.to_torch."""
    weights = weights_as(module, "torch")
    new = nn.MultiheadAttention(
        module.embed_dim,
        module.num_heads,
        dropout=module.dropout_p,
        bias=module.out_proj.bias is not None,
        kdim=module.kdim,
        vdim=module.vdim,
        batch_first=True,
    )
    reference = module.out_proj.weight
    new.to(reference.device, reference.dtype).load_state_dict(weights)
    return new.train(module.training)
