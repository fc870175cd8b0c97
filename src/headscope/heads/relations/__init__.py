"""Which heads find the words that belong to each other: a pronoun's noun, a verb's subject, a gift's giver.

Sentences whose pairs are known come from `english_sentences`, `chinese_sentences` or a treebank
(`sentences.treebank.read_conllu`, which needs the package conllu); `count_relations` runs a model over them, and
`scores` says which heads do better than a fixed distance.
"""

from headscope.heads.relations.counts import RelationCounts, Tally
from headscope.heads.relations.evaluate import count_relations, reads
from headscope.heads.relations.hits import count_blind, count_controls, count_hits, strongest
from headscope.heads.relations.score import RelationScore, best_heads, scores
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
    "Tally",
    "best_heads",
    "chinese_sentences",
    "constructed_relations",
    "count_blind",
    "count_controls",
    "count_hits",
    "count_relations",
    "english_sentences",
    "reads",
    "scores",
    "strongest",
]
