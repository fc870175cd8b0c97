"""Which heads find the words that belong to each other: a pronoun's noun, a verb's subject, a gift's giver.

Sentences whose pairs are known come from `english`, `chinese` or a treebank (`read_conllu`, in
`headscope.relations.treebank`, which needs the package conllu); `count_relations` runs a model over them, and
`scores` says which heads do better than a fixed distance.
"""

from headscope.relations.chinese import RELATIONS as _CHINESE
from headscope.relations.chinese import chinese
from headscope.relations.count import count_relations, reads
from headscope.relations.counts import RelationCounts, Tally
from headscope.relations.english import RELATIONS as _ENGLISH
from headscope.relations.english import english
from headscope.relations.hits import count_blind, count_controls, count_hits, strongest
from headscope.relations.pairs import Example, Pair, Relation
from headscope.relations.score import RelationScore, best_heads, scores

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
