"""Which heads find the words that belong to each other: a pronoun's noun, a verb's subject, a gift's giver.

Sentences whose pairs are known come from `english`, `chinese` or a treebank (`sentences.treebank.read_conllu`,
which needs the package conllu); `count_relations` runs a model over them, and
`scores` says which heads do better than a fixed distance.
"""

from headscope.heads.relations.counts import RelationCounts, Tally
from headscope.heads.relations.evaluate import count_relations, reads
from headscope.heads.relations.hits import count_blind, count_controls, count_hits, strongest
from headscope.heads.relations.score import RelationScore, best_heads, scores
from headscope.heads.relations.sentences.chinese import RELATIONS as _CHINESE
from headscope.heads.relations.sentences.chinese import chinese
from headscope.heads.relations.sentences.english import RELATIONS as _ENGLISH
from headscope.heads.relations.sentences.english import english
from headscope.heads.relations.sentences.pairs import Example, Pair, Relation

__all__ = [
    "RELATIONS",
    "Example",
    "Pair",
    "Relation",
    "RelationCounts",
    "RelationScore",
    "Tally",
    "best_heads",
    "chinese",
    "count_blind",
    "count_controls",
    "count_hits",
    "count_relations",
    "english",
    "reads",
    "scores",
    "strongest",
]

RELATIONS: dict[str, Relation] = _ENGLISH | _CHINESE
