"""What heads and links are worth: ablation, gradient, knock-out; and the means that mean ablation needs."""

from headscope.heads.effects.ablation import head_effects
from headscope.heads.effects.links import LinkEffect, LinkEffects, TokenChange, link_effect, link_effects
from headscope.heads.effects.means import head_means, head_sums, output_sum
from headscope.heads.effects.metrics import next_token_loss
from headscope.heads.effects.table import HeadEffects, agreement

__all__ = [
    "HeadEffects",
    "LinkEffect",
    "LinkEffects",
    "TokenChange",
    "agreement",
    "head_effects",
    "head_means",
    "head_sums",
    "link_effect",
    "link_effects",
    "next_token_loss",
    "output_sum",
]
