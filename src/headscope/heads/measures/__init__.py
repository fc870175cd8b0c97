"""Scores of heads: each a ratio of sums, taken in one pass over the weights, with its unit and source."""

from headscope.heads.measures.measure import AttentionBatch, Column, Measure, Ratio, Visibility, take
from headscope.heads.measures.patterns import REPEATED, standard

__all__ = ["REPEATED", "AttentionBatch", "Column", "Measure", "Ratio", "Visibility", "standard", "take"]
