"""Scores of heads: ratios of sums, computed in one pass over the weights, each with its unit and source."""

from headscope.heads.measures.measure import AttentionBatch, Column, Measure, Ratio, Visibility, take
from headscope.heads.measures.patterns import REPEATED, standard

__all__ = ["REPEATED", "AttentionBatch", "Column", "Measure", "Ratio", "Visibility", "standard", "take"]
