"""Multi-head attention that you can run, look inside and trust.

In the order in which data passes: a model is loaded, its text tokenized, its attention recorded; each recorded
site is an AttentionMatrix that is never built and answers questions; edits change what heads do; profile() asks
every head of a model everything, over texts, and gives a HeadAtlas.
"""

from headscope.errors import HeadscopeError
from headscope.heads.atlas.atlas import HeadAtlas
from headscope.heads.atlas.profiler import Plan, profile
from headscope.heads.effects import head_effects
from headscope.models.loading import load, pull
from headscope.models.tokens import tokenize
from headscope.nn.cache import KVCache, SlidingWindowCache
from headscope.nn.multihead import MultiHeadAttention
from headscope.nn.transformer import Transformer, TransformerConfig
from headscope.ops import AttentionMatrix, attention, masks, positions, reductions
from headscope.watching.edits import ablate, edit, knock_out, patch
from headscope.watching.monitoring import HeadWarning, monitor
from headscope.watching.recording import Recording, record

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
