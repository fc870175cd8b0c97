"""Multi-head attention that you can run, look inside and trust.

In the order in which data passes: a model is loaded, its text tokenized, its attention recorded; each recorded
site is an AttentionMatrix that is never built and answers questions; edits change what heads do; profile() asks
every head of a model everything, over texts, and gives a HeadAtlas.

Each name is imported when it is first used: `import headscope` itself loads nothing, not even torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headscope.errors import HeadscopeError
    from headscope.heads import HeadAtlas, Plan, head_effects, profile
    from headscope.models import load, pull, tokenize
    from headscope.nn import KVCache, MultiHeadAttention, SlidingWindowCache, Transformer, TransformerConfig
    from headscope.ops import AttentionMatrix, attention, masks, positions, reductions
    from headscope.watching import HeadWarning, Recording, ablate, edit, knock_out, monitor, patch, record

__all__ = [
    "AttentionMatrix",
    "HeadAtlas",
    "HeadWarning",
    "HeadscopeError",
    "KVCache",
    "MultiHeadAttention",
    "Plan",
    "Recording",
    "SlidingWindowCache",
    "Transformer",
    "TransformerConfig",
    "ablate",
    "attention",
    "edit",
    "head_effects",
    "knock_out",
    "load",
    "masks",
    "monitor",
    "patch",
    "positions",
    "profile",
    "pull",
    "record",
    "reductions",
    "tokenize",
]

_NAMES = {
    "errors": ("HeadscopeError",),
    "ops": ("AttentionMatrix", "attention", "masks", "positions", "reductions"),
    "nn": ("KVCache", "MultiHeadAttention", "SlidingWindowCache", "Transformer", "TransformerConfig"),
    "models": ("load", "pull", "tokenize"),
    "watching": ("HeadWarning", "Recording", "ablate", "edit", "knock_out", "monitor", "patch", "record"),
    "heads": ("HeadAtlas", "Plan", "head_effects", "profile"),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
_SUBMODULES = ("errors", "ops", "nn", "models", "watching", "heads", "training", "views", "commands")


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f"headscope.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'headscope' has no attribute {name!r}")
    value = getattr(import_module(f"headscope.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
