"""Which heads find the words that belong to each other: a pronoun's noun, a verb's subject, a gift's giver.

Sentences whose pairs are known come from `english_sentences`, `chinese_sentences` or a treebank
(`sentences.treebank.read_conllu`, which needs the package conllu); `count_relations` runs a model over them, and
`scores` says which heads do better than a fixed distance.
"""

from headscope.heads.relations.counts import RelationCounts, Tally
from headscope.heads.relations.evaluate import can_read, count_relations
from headscope.heads.relations.hits import count_class_baseline, count_controls, count_hits, strongest_words
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
    "can_read",
    "chinese_sentences",
    "constructed_relations",
    "count_class_baseline",
    "count_controls",
    "count_hits",
    "count_relations",
    "english_sentences",
    "scores",
    "strongest_words",
]
