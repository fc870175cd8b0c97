"""What each head of a model does: measures, relations, effects, roles, and the atlas with all of these."""

from headscope.heads.atlas import HeadAtlas, Plan, profile
from headscope.heads.effects import head_effects

__all__ = ["HeadAtlas", "Plan", "head_effects", "profile"]
