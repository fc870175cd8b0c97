"""Attention modules: MultiHeadAttention, its caches, a Transformer built from it; weights read from other libraries."""

from headscope.nn.cache import KVCache, SlidingWindowCache
from headscope.nn.multihead import MultiHeadAttention
from headscope.nn.transformer import Transformer, TransformerConfig

__all__ = ["KVCache", "MultiHeadAttention", "SlidingWindowCache", "Transformer", "TransformerConfig"]
