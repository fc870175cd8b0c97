"""Multi-head attention that you can run, look inside and trust."""

from headscope import masks, reductions
from headscope.errors import HeadscopeError
from headscope.matrix import AttentionMatrix, attention

__all__ = ["AttentionMatrix", "HeadscopeError", "attention", "masks", "reductions"]
