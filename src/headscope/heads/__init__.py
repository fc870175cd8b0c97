"""What each head of a model does: `measures/`, `relations/` between words, `effects/`, roles, and the `atlas/`."""

from headscope.heads.atlas import HeadAtlas, Plan, profile
from headscope.heads.effects import head_effects

__all__ = ["HeadAtlas", "Plan", "head_effects", "profile"]
