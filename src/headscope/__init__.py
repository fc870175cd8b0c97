"""Multi-head attention that you can run, look inside and trust.

In the order in which data passes: a model is loaded, its text tokenized, its attention recorded; each recorded
site is an AttentionMatrix that is never built and answers questions; edits change what heads do.
"""

from headscope import masks, positions, reductions
from headscope.cache import KVCache, SlidingWindowCache
from headscope.edits import ablate, edit, knock_out, patch
from headscope.errors import HeadscopeError
from headscope.matrix import AttentionMatrix, attention
from headscope.models import load, pull
from headscope.monitor import HeadWarning, monitor
from headscope.multihead import MultiHeadAttention
from headscope.recording import Recording, record
from headscope.tokens import tokenize
from headscope.transformer import Transformer, TransformerConfig

__all__ = [
    "AttentionMatrix",
    "HeadWarning",
    "HeadscopeError",
    "KVCache",
    "MultiHeadAttention",
    "Recording",
    "SlidingWindowCache",
    "Transformer",
    "TransformerConfig",
    "ablate",
    "attention",
    "edit",
    "knock_out",
    "load",
    "masks",
    "monitor",
    "patch",
    "positions",
    "pull",
    "record",
    "reductions",
    "tokenize",
]
