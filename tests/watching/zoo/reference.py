"""The oracle: the attention weights that a model's own eager functions return, call by call."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface


@dataclass
class EagerCall:
    """One call of an eager attention function: its arguments and what it returned."""

    module: nn.Module
    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    output: Tensor
    weights: Tensor | None
    kwargs: dict[str, Any] = field(default_factory=dict)


def eager_calls(model: nn.Module, inputs: dict[str, Any]) -> list[EagerCall]:
    """Every call through `AttentionInterface` in one forward of an eager copy of `model`, in order.

    The copy is switched to eager; the model itself is not touched. What does not go through the
    interface is not seen.
    """
    copied = copy.deepcopy(model)
    copied.set_attn_implementation("eager")
    names = {id(module): name for name, module in copied.named_modules()}
    calls: list[EagerCall] = []

    def record(arguments: tuple[Any, ...], kwargs: dict[str, Any], result: tuple[Tensor, Any]) -> None:
        fields = ("module", "query", "key", "value", "attention_mask")
        options = dict(zip(fields, arguments, strict=False)) | kwargs
        module, query, key, value, mask = (options.pop(name, None) for name in fields)
        output, weights = result
        calls.append(EagerCall(module, names[id(module)], query, key, value, mask, output, weights, options))

    with _watched(record), torch.no_grad():
        copied(**copy.deepcopy(inputs))
    return calls


def eager_maps(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """The attention weights [B, H, L, S] of every call, in order, as eager returned them."""
    return [call.weights for call in eager_calls(model, inputs) if call.weights is not None]


@contextmanager
def _watched(record: Callable[[tuple[Any, ...], dict[str, Any], Any], None]) -> Iterator[None]:
    """Tell `record` of every call of the functions that `AttentionInterface` hands out."""
    original = AttentionInterface.get_interface

    def get_interface(self: AttentionInterface, implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        function = original(self, implementation, default)

        def watched(*arguments: Any, **kwargs: Any) -> Any:
            result = function(*arguments, **kwargs)
            record(arguments, kwargs, result)
            return result

        return watched

    AttentionInterface.get_interface = get_interface
    try:
        yield
    finally:
        AttentionInterface.get_interface = original
