"""Scores of heads: each a ratio of sums, taken in one pass over the weights, with its unit and source."""

from headscope.heads.measures.measure import Column, Measure, Page, Ratio, Visibility, take
from headscope.heads.measures.patterns import REPEATED, standard

__all__ = ["REPEATED", "Column", "Measure", "Page", "Ratio", "Visibility", "standard", "take"]
