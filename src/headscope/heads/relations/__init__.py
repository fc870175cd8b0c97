"""Which heads find the words that belong to each other: a pronoun's noun, a verb's subject, a gift's giver.

Sentences whose pairs are known come from `english_sentences`, `chinese_sentences` or a treebank
(`sentences.treebank.read_conllu`, which needs the package conllu); `count_relations` runs a model over them, and
`scores` compares every head with three nulls.
"""

from headscope.heads.relations.counts import RelationCounts
from headscope.heads.relations.evaluate import can_read, count_relations
from headscope.heads.relations.score import RelationScore, scores
from headscope.heads.relations.sentences import (
    Example,
    Pair,
    Relation,
    chinese_sentences,
    constructed_relations,
    english_sentences,
)

__all__ = [
    "Example",
    "Pair",
    "Relation",
    "RelationCounts",
    "RelationScore",
    "can_read",
    "chinese_sentences",
    "constructed_relations",
    "count_relations",
    "english_sentences",
    "scores",
]
