"""Virtual tokens (prefix and prompt tuning): learnt keys before the text, which are no tokens of it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class VirtualTokens:
    """How many virtual tokens a forward has, and its text with them."""

    text_shape: tuple[int, int] | None = None  # batch and length, with virtual tokens; None: it got no text
    number: int | None = 0  # None: not known

    def begin(self, module: nn.Module, inputs: Mapping[str, Any], number: int, valid: Tensor | None) -> Tensor | None:
        """The outermost module gets its inputs, ``number`` virtual tokens among them. Returns which keys are text."""
        self.text_shape = None if _has_decoder_text(module) else _text_shape(inputs)
        self.number = None if number and self.text_shape is None else number
        if valid is not None and self.number:
            valid = valid.clone()
            valid[:, : self.number] = False
        return valid

    def enter(self, module: nn.Module, inputs: Mapping[str, Any], valid: Tensor | None) -> Tensor | None:
        """A module inside gets its inputs: tokens were added if its text is longer. Returns which keys are text."""
        text, outer = _text_shape(inputs), self.text_shape
        if _has_decoder_text(module):
            self.text_shape = None
        elif text is not None and outer is not None and text[0] == outer[0] and text[1] > outer[1]:
            added = text[1] - outer[1]
            self.number, self.text_shape = (self.number or 0) + added, text
            return None if valid is None else F.pad(valid, (added, 0), value=False)
        return valid


def inputs_of(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a module's forward by name."""
    names = inspect.signature(module.forward).parameters if args else ()  # of the wrapped function, if it is wrapped
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def tuned(model: nn.Module) -> tuple[str, int] | None:
    """The name of PEFT's module and its number of virtual tokens, in a model that is tuned by them; None otherwise."""
    for name, module in model.named_modules():
        configs, active = getattr(module, "peft_config", None), getattr(module, "active_adapter", None)
        config = configs.get(active) if isinstance(configs, dict) and isinstance(active, str) else None
        if getattr(config, "is_prompt_learning", False):
            return name, int(config.num_virtual_tokens)  # type: ignore[union-attr]
    return None


def _text_shape(inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Batch and length of the text that a module gets, with what is in its cache; None: it gets no text."""
    tokens = inputs.get("input_ids")
    tokens = inputs.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(tokens, Tensor) or tokens.dim() < 2:
        return None
    length = getattr(inputs.get("past_key_values"), "get_seq_length", None)
    return tokens.shape[0], tokens.shape[1] + (int(length()) if callable(length) else 0)


def _has_decoder_text(module: nn.Module) -> bool:
    """Whether a module gets two texts, one of them its decoder's."""
    return "decoder_input_ids" in inspect.signature(module.forward).parameters
