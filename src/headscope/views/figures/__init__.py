"""Answers as figures: maps of heads, tables of an atlas, an experiment's curves."""
