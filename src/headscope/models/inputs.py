"""What a model reads: whether it is a text, which Headscope can put words on, or images or sound."""

from __future__ import annotations

from typing import Any

from headscope.errors import HeadscopeError


def check_reads_text(where: str) -> None:
    """Raise HeadscopeError if the model of a folder or a hub name reads no text; before its tokenizer and weights."""
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto as auto

    config = AutoConfig.from_pretrained(where)
    if type(config) in auto.MODEL_MAPPING:
        kind = auto.MODEL_MAPPING[type(config)]
        check_main_input(where, kind[0] if isinstance(kind, tuple) else kind)


def check_main_input(name: str, model: Any) -> None:
    """Raise HeadscopeError if the main input of a model, or of its class, is not token ids."""
    wanted = getattr(model, "main_input_name", "input_ids")
    if wanted != "input_ids":
        what = {"pixel": "images", "input": "sound"}.get(str(wanted).split("_")[0], "something else")
        raise HeadscopeError(
            f"{name} reads {what} ({wanted}) and not a text, so no words can be put on what its heads attend to. "
            "Give a model that reads text; or run this one yourself under headscope.record(model) and use its matrices."
        )
