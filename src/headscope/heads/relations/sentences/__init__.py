"""Sentences whose pairs of words are known: constructed ones, English and Chinese, and those of treebanks."""

from headscope.heads.relations.sentences.languages import chinese_sentences, constructed_relations, english_sentences
from headscope.heads.relations.sentences.pairs import Example, Pair, Relation

__all__ = ["Example", "Pair", "Relation", "chinese_sentences", "constructed_relations", "english_sentences"]
