"""Pretrained models: where they come from, the cache folder that keeps them, their tokens and words."""

from headscope.models.loading import Loaded, ModelEntry, available, load, pull, reader, remove
from headscope.models.tokens import Tokens, Word, tokenize

__all__ = ["Loaded", "ModelEntry", "Tokens", "Word", "available", "load", "pull", "reader", "remove", "tokenize"]
