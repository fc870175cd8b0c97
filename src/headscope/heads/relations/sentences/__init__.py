"""Sentences whose pairs of words are known: constructed ones, English and Chinese, and those of treebanks."""
