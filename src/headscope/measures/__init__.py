"""Scores of heads: each a ratio of sums, taken in one pass over the weights, with its unit and source."""

from headscope.measures.measure import Column, Measure, Page, Ratio, Visibility, take
from headscope.measures.patterns import REPEATED, standard

__all__ = ["REPEATED", "Column", "Measure", "Page", "Ratio", "Visibility", "standard", "take"]
