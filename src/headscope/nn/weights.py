"""How other libraries name and pack the weights of an attention module; only this file knows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["dump", "from_torch", "load", "parts", "rows", "to_torch"]

_MAPS = ("q", "k", "v", "o")
_NAMES: dict[str, tuple[str, ...]] = {  # of the four maps, in the order query, key, value, output
    "linears": ("linears.0", "linears.1", "linears.2", "linears.3"),
    "huggingface": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "out_proj": ("q_proj", "k_proj", "v_proj", "out_proj"),
}


def rows(module: Any) -> tuple[slice, slice, slice]:
    """Where queries, keys and values stand in the packed map."""
    wide, narrow = module.num_heads * module.head_dim, module.num_kv_heads * module.head_dim
    return slice(0, wide), slice(wide, wide + narrow), slice(wide + narrow, wide + 2 * narrow)


def parts(module: Any) -> dict[str, Tensor]:
    """Views of the four maps: "q.weight", "q.bias", "k.weight" … "o.bias"."""
    found: dict[str, Tensor] = {}
    if hasattr(module, "in_proj"):
        for name, span in zip("qkv", rows(module), strict=True):
            found[f"{name}.weight"] = module.in_proj.weight.data[span]
            if module.in_proj.bias is not None:
                found[f"{name}.bias"] = module.in_proj.bias.data[span]
        maps = {"o": module.out_proj}
    else:
        maps = dict(zip(_MAPS, (module.q_proj, module.k_proj, module.v_proj, module.out_proj), strict=True))
    for name, linear in maps.items():
        found |= {f"{name}.{kind}": part.data for kind, part in linear.named_parameters()}
    return found


def _norms(module: Any) -> dict[str, Tensor]:
    """Views of the norms of queries and keys, "q_norm.weight" and "k_norm.weight", if there are any."""
    if module.q_norm is None:
        return {}
    return {"q_norm.weight": module.q_norm.weight.data, "k_norm.weight": module.k_norm.weight.data}


def load(module: Any, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into the module; all or nothing. Raises ValueError: see MultiHeadAttention.load_weights."""
    given = _read(weights)
    own = parts(module) | _norms(module)
    extra = {name: part for name, part in given.items() if name not in own}
    if any(bool(part.any()) for part in extra.values()):
        raise ValueError(f"the weights have {', '.join(sorted(extra))}, which this module has no place for.")
    for name, part in own.items():
        if name not in given and name.endswith(".bias"):
            given[name] = torch.zeros_like(part)  # a map without a bias
        if name not in given:
            raise ValueError(f"the weights lack {name.replace('.', ' ')}: there are {', '.join(sorted(weights))}.")
        if given[name].shape != part.shape:
            raise ValueError(
                f"{name.replace('.', ' ')} has shape {tuple(given[name].shape)}, this module wants "
                f"{tuple(part.shape)}: other sizes or numbers of heads."
            )
    with torch.no_grad():
        for name, part in own.items():
            part.copy_(given[name])


def _read(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of any known layout, as "q.weight" and so on."""
    for name in ("bias_k", "bias_v"):
        if name in weights:
            raise ValueError(f"the weights hold {name} (add_bias_kv): a key that no position has is not supported.")
    if "in_proj_weight" in weights or "q_proj_weight" in weights:
        return _read_torch(weights)
    for names in _NAMES.values():
        if all(f"{name}.weight" in weights for name in names):
            short = dict(zip(names, _MAPS, strict=True))
            known = {f"{n}.{kind}": f"{short[n]}.{kind}" for n in names for kind in ("weight", "bias")}
            known |= {name: name for name in ("q_norm.weight", "k_norm.weight")}
            _refuse_others(weights, known)
            return {known[name]: part for name, part in weights.items() if name in known}
    if "in_proj.weight" in weights:
        raise ValueError("these are weights under the module's own names: use module.load_state_dict(weights).")
    raise ValueError(
        f"weights named {', '.join(sorted(weights)[:6])} are of no known layout: nn.MultiheadAttention's, "
        "linears.0 … linears.3, or q_proj, k_proj, v_proj, o_proj."
    )


def _refuse_others(weights: Mapping[str, Tensor], known: Collection[str]) -> None:
    """Raise ValueError for names that have no place; rotary frequencies, which old files hold, are no weights."""
    other = sorted(name for name in weights if name not in known and name != "rotary_emb.inv_freq")
    if other:
        raise ValueError(f"the weights hold {', '.join(other)} besides the four maps: they have no place here.")


def _read_torch(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    packed = ["in_proj_weight"] if "in_proj_weight" in weights else [f"{name}_proj_weight" for name in "qkv"]
    _refuse_others(weights, {*packed, "in_proj_bias", "out_proj.weight", "out_proj.bias"})
    given = {f"o.{kind}": weights[f"out_proj.{kind}"] for kind in ("weight", "bias") if f"out_proj.{kind}" in weights}
    if "in_proj_weight" in weights:
        chunks = dict(zip("qkv", weights["in_proj_weight"].chunk(3), strict=True))
    else:
        chunks = {name: weights[f"{name}_proj_weight"] for name in "qkv"}
    given |= {f"{name}.weight": part for name, part in chunks.items()}
    if "in_proj_bias" in weights:
        given |= {f"{n}.bias": part for n, part in zip("qkv", weights["in_proj_bias"].chunk(3), strict=True)}
    return given


def dump(module: Any, layout: str) -> dict[str, Tensor]:
    """Copies of the weights under another library's names. Raises ValueError for an unknown layout."""
    own = {name: part.clone() for name, part in parts(module).items()}
    if layout in ("linears", "huggingface"):
        long = dict(zip(_MAPS, _NAMES[layout], strict=True))
        norms = {name: part.clone() for name, part in _norms(module).items()}
        if norms and layout == "linears":
            raise ValueError("layout 'linears' has no names for the norms of queries and keys: use 'huggingface'.")
        return {f"{long[name[0]]}{name[1:]}": part for name, part in own.items()} | norms
    if layout != "torch":
        raise ValueError(f"layout is {layout!r}: it is 'torch', 'linears' or 'huggingface'.")
    _check_torch(module)
    named = {f"out_proj{name[1:]}": part for name, part in own.items() if name[0] == "o"}
    if hasattr(module, "in_proj"):
        named["in_proj_weight"] = torch.cat([own[f"{n}.weight"] for n in "qkv"])
    else:
        named |= {f"{n}_proj_weight": own[f"{n}.weight"] for n in "qkv"}
    if "q.bias" in own:
        named["in_proj_bias"] = torch.cat([own[f"{n}.bias"] for n in "qkv"])
    return named


def _check_torch(module: Any) -> None:
    standard = module.num_heads == module.num_kv_heads and module.head_dim * module.num_heads == module.embed_dim
    if not standard or module.position is not None or module.q_norm is not None:
        raise ValueError(
            "nn.MultiheadAttention has no shared key/value heads, head sizes of its own, positions or norms: "
            "this module cannot become one."
        )


def from_torch(make: Callable[..., Any], module: nn.MultiheadAttention) -> Any:
    """A module that ``make`` makes, like torch's. Raises ValueError for add_bias_kv and add_zero_attn."""
    if not isinstance(module, nn.MultiheadAttention):
        raise ValueError(f"from_torch() got {type(module).__name__}: give it an nn.MultiheadAttention.")
    if module.bias_k is not None or module.add_zero_attn:
        name = "add_bias_kv" if module.bias_k is not None else "add_zero_attn"
        raise ValueError(f"nn.MultiheadAttention with {name}=True adds a key that no position has: not supported.")
    made = make(
        module.embed_dim,
        module.num_heads,
        kdim=module.kdim,
        vdim=module.vdim,
        bias=module.in_proj_bias is not None,
        dropout_p=module.dropout,
    )
    reference = module.out_proj.weight
    made.to(reference.device, reference.dtype)  # before the weights come: they would be rounded
    load(made, module.state_dict())
    return made.train(module.training)


def to_torch(module: Any) -> nn.MultiheadAttention:
    """Torch's module with the same weights. Raises ValueError: see MultiHeadAttention.to_torch."""
    weights = dump(module, "torch")
    made = nn.MultiheadAttention(
        module.embed_dim,
        module.num_heads,
        dropout=module.dropout_p,
        bias=module.out_proj.bias is not None,
        kdim=module.kdim,
        vdim=module.vdim,
        batch_first=True,
    )
    reference = module.out_proj.weight
    made.to(reference.device, reference.dtype).load_state_dict(weights)
    return made.train(module.training)
