"""Other libraries' names and packings of the weights of an attention module."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

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
    """The four projections' weights as they are applied: "q.weight", "q.bias", "k.weight" … "o.bias".

    Raises:
        ValueError: a projection is more than a weight and a bias, such as a layer with an adapter, or quantised.
    """
    weights: dict[str, Tensor] = {}
    for names, linear in _projections(module).items():
        rows = packed_rows(module) if len(names) == 3 else (slice(None),)
        for kind, tensor in _tensors(linear).items():
            weights |= {f"{name}.{kind}": tensor[part] for name, part in zip(names, rows, strict=True)}
    return weights


def set_weights(module: Any, weights: Mapping[str, Tensor]) -> None:
    """Write weights under the names of projection_weights(); the shapes fit."""
    for names, linear in _projections(module).items():
        for kind in _tensors(linear):
            _set(linear, kind, torch.cat([weights[f"{name}.{kind}"] for name in names]))


def _projections(module: Any) -> dict[str, nn.Module]:
    """The maps, by the letters of what they give: "qkv" or "q", "k", "v"; and "o"."""
    if module.packed:
        return {"qkv": module.in_proj, "o": module.out_proj}
    return {"q": module.q_proj, "k": module.k_proj, "v": module.v_proj, "o": module.out_proj}


def _tensors(layer: Any) -> dict[str, Tensor]:
    """The weight and bias of a layer as it applies them, also if they are pruned or parametrised."""
    tensors: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        tensor = getattr(layer, kind, None)
        if hasattr(layer, f"{kind}_orig") and hasattr(layer, f"{kind}_mask"):  # pruned: its hook sets it before a call
            tensor = getattr(layer, f"{kind}_orig") * getattr(layer, f"{kind}_mask")
        if tensor is not None:
            tensors[kind] = tensor
    known = {*tensors, *(f"{kind}_orig" for kind in tensors)}
    others = [name for name, _ in layer.named_parameters() if name not in known and "parametrizations." not in name]
    if others or not all(isinstance(x, Tensor) and x.is_floating_point() for x in tensors.values()) or not tensors:
        reason = f"has {', '.join(others)} besides a weight and a bias" if others else "has no weight in floating point"
        raise ValueError(
            f"a projection is a {type(layer).__name__} that {reason}: its weights cannot be read or written here. "
            "Merge an adapter first; load weights before a layer is wrapped or quantised."
        )
    return {kind: tensor.detach() for kind, tensor in tensors.items()}


def _check_writable(layer: Any) -> None:
    """Raise ValueError for a parametrisation that has no inverse, which could not take given weights."""
    for kind, functions in getattr(layer, "parametrizations", {}).items():
        for function in functions:
            if not hasattr(function, "right_inverse"):
                raise ValueError(
                    f"the {kind} of a projection is parametrised by {type(function).__name__}, which has no "
                    "right_inverse: remove the parametrisation, load, and register it again."
                )


def _set(layer: Any, kind: str, value: Tensor) -> None:
    """Write a layer's weight or bias: behind the mask if it is pruned, through the inverse if it is parametrised."""
    with torch.no_grad():
        if parametrize.is_parametrized(layer, kind):
            own = getattr(layer, kind)
            setattr(layer, kind, value.to(own.device, own.dtype, copy=True))
        elif hasattr(layer, f"{kind}_orig"):
            getattr(layer, f"{kind}_orig").copy_(value)
            setattr(layer, kind, getattr(layer, f"{kind}_orig") * getattr(layer, f"{kind}_mask"))
        else:
            getattr(layer, kind).copy_(value)


def _norms(module: Any) -> dict[str, nn.Module]:
    """The norms of queries and keys, "q_norm" and "k_norm", if there are any."""
    return {} if module.q_norm is None else {"q_norm": module.q_norm, "k_norm": module.k_norm}


def _norm_weights(module: Any) -> dict[str, Tensor]:
    """Their weights, "q_norm.weight" and "k_norm.weight"."""
    return {f"{name}.weight": _tensors(norm)["weight"] for name, norm in _norms(module).items()}


def load_weights(module: Any, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into the module; all or none. Raises ValueError: see MultiHeadAttention.load_weights."""
    source = _read(weights)
    target = projection_weights(module) | _norm_weights(module)
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
    for layer in (*_projections(module).values(), *_norms(module).values()):
        _check_writable(layer)
    set_weights(module, source)
    for name, norm in _norms(module).items():
        _set(norm, "weight", source[f"{name}.weight"])


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
        norms = {name: tensor.clone() for name, tensor in _norm_weights(module).items()}
        if norms and layout == "linears":
            raise ValueError("layout 'linears' has no names for the norms of queries and keys: use 'huggingface'.")
        return {f"{their_names[name[0]]}{name[1:]}": tensor for name, tensor in own.items()} | norms
    if layout != "torch":
        raise ValueError(f"layout is {layout!r}: it is 'torch', 'linears' or 'huggingface'.")
    _check_torch(module)
    theirs = {f"out_proj{name[1:]}": tensor for name, tensor in own.items() if name[0] == "o"}
    if module.kdim == module.vdim == module.embed_dim:
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
    for ours, theirs in _parameters(new, module):
        for parameter in ours:
            parameter.requires_grad_(theirs.requires_grad)
    return new.train(module.training)


def _parameters(module: Any, torch_module: nn.MultiheadAttention) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Each parameter of torch's module, with those of ours that hold the same numbers."""
    layers = {name: layer for names, layer in _projections(module).items() for name in names}
    for name, parameter in torch_module.named_parameters():
        letters = "o" if name.startswith("out_proj") else name[0] if name[1:].startswith("_proj") else "qkv"
        kind = "bias" if name.endswith("bias") else "weight"
        chosen = {id(layers[letter]): layers[letter] for letter in letters}.values()
        yield [p for layer in chosen for n, p in layer.named_parameters() if kind in n], parameter


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
    for ours, theirs in _parameters(module, new):
        theirs.requires_grad_(any(parameter.requires_grad for parameter in ours))
    return new.train(module.training)
