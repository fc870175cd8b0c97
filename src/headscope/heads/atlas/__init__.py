"""HeadAtlas: what every head of a model does, one row per head; profile() measures it over a corpus."""

from headscope.heads.atlas.atlas import HeadAtlas
from headscope.heads.atlas.profiler import Plan, profile

__all__ = ["HeadAtlas", "Plan", "profile"]
