"""The catalogue: the Hugging Face model types that we build tiny and random, with their inputs."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto as auto

from tests.watching.zoo.excluded import NO_ATTENTION, NOT_BUILT
from tests.watching.zoo.families import FAMILIES
from tests.watching.zoo.inputs import default_inputs, first_tensors
from tests.watching.zoo.overrides import OVERRIDES
from tests.watching.zoo.shrink import shrink, sub_configs
from tests.watching.zoo.special import INPUTS

__all__ = [
    "NOT_BUILT",
    "NO_ATTENTION",
    "ZOO",
    "ZooModel",
    "class_name",
    "first_tensors",
    "tiny_config",
]

_MAPS = [
    auto.MODEL_MAPPING_NAMES,
    *(getattr(auto, name) for name in dir(auto) if re.fullmatch(r"MODEL_FOR_\w+_MAPPING_NAMES", name)),
]
_QUERY_OR_KEY = re.compile(
    r"q_proj|k_proj|query|key|qkv|c_attn|in_proj|to_q|to_k|wq|wk|q_lin|k_lin|\.q\b|\.k\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class ZooModel:
    """A model type: how to build it tiny and random, and what to feed it."""

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], dict[str, Any]]


def class_name(name: str) -> str | None:
    """The class that transformers' auto classes make for a model type, the bare model first."""
    for mapping in _MAPS:
        if name in mapping:
            entry = mapping[name]
            return entry if isinstance(entry, str) else entry[0]
    return None


def tiny_config(name: str) -> PreTrainedConfig:
    """The tiny config of a model type."""
    config = shrink(CONFIG_MAPPING[name]())
    for path, value in OVERRIDES.get(name, {}).items():
        _set_field(config, path.split("."), value() if callable(value) else value)
    config.dtype = torch.float32
    return config


def _set_field(owner: Any, path: list[str], value: Any) -> None:
    """Set a field of a config, or of one inside it; `*` stands for all configs that have it."""
    first, *rest = path
    if first == "*":
        for part in sub_configs(owner):
            if rest[0] in vars(part):
                setattr(part, rest[0], value)
    elif isinstance(owner, dict):
        owner[first] = value
    elif rest:
        _set_field(getattr(owner, first), rest, value)
    else:
        setattr(owner, first, value)


def _build(name: str) -> nn.Module:
    model_class = getattr(transformers, class_name(name) or "")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = model_class._from_config(tiny_config(name))
    _roughen(model)
    return model.float().eval()


def _roughen(model: nn.Module) -> None:
    """Give all parameters values large enough that attention is far from uniform.

    Freshly initialised models have logits near zero, so that rows are uniform and a wrong scale or
    a swapped head would not be seen. Embeddings get unit variance, matrices keep the variance of
    what goes through them, those that make queries and keys enlarge it, and vectors (biases, norms,
    sinks) get noise on top.
    """
    generator = torch.Generator().manual_seed(11)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point() or parameter.numel() == 0:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.add_(0.2 * noise)
            elif id(parameter) in embeddings:
                parameter.copy_(noise)
            else:
                gain = 1.5 if _QUERY_OR_KEY.search(name) else 1.0
                parameter.copy_(noise * gain / parameter[0].numel() ** 0.5)


def _entry(name: str, family: str) -> ZooModel:
    inputs = INPUTS.get(name, partial(default_inputs, family=family))
    return ZooModel(name, family, partial(_build, name), inputs)


ZOO: dict[str, ZooModel] = {name: _entry(name, family) for name, family in sorted(FAMILIES.items())}
