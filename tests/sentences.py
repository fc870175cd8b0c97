"""The shipped sentences, for the tests of frames and of what is counted on them."""

from headscope.heads.relations import Example, chinese_sentences, english_sentences

ENGLISH, CHINESE = english_sentences(), chinese_sentences()
FRAMES = ENGLISH + CHINESE


def sentences_of(relation: str, half: int) -> list[Example]:
    return [e for e in FRAMES if e.half == half and e.pairs[0].relation == relation]


def one_per_frame(examples: list[Example]) -> list[Example]:
    return list({e.cluster: e for e in examples}.values())
