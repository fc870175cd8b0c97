"""What heads and links are worth: ablated, by gradient, knocked out; and the means that mean ablation needs."""

from headscope.effects.answers import next_token_loss
from headscope.effects.heads import head_effects
from headscope.effects.links import LinkEffect, LinkEffects, TokenChange, link_effect, link_effects
from headscope.effects.means import head_means, head_sums, output_sum
from headscope.effects.table import HeadEffects, agreement

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
