"""English and Chinese sentences, built from the word lists and frames in ``data/``, a TOML file for each language.

A relation's frames are cores, each with a distractor in every place that it can have. A distractor is another word of
the target's class, from the same word list; it stands before both words of the pair in a third of the frames, between
them in a third, behind both in a third. So the first, the last and the nearest word of a class are each the target in
about half of the pairs. Each core with its distractor is a cluster of its own; insertions and words vary within it.

Half 0 and half 1 share function words alone. A pair has one order in a core; most relations have cores in both orders,
because a decoder sees only the words before.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from headscope.heads.relations.sentences.frames import Frame, combine, either_way, fill_all, place
from headscope.heads.relations.sentences.pairs import Example, Relation


@dataclass(frozen=True, eq=False, slots=True)
class Language:
    """What the sentences of a language are built from.

    Attributes:
        code: "en" or "zh".
        spaced: Whether the language puts spaces between words.
        function_words: The words that may stand in both halves.
        words: For each half the words of each slot.
        relations: The relations that have frames, by name.
        frames: The frames of each half.
    """

    code: str
    spaced: bool
    function_words: frozenset[str]
    words: tuple[Mapping[str, list[str]], Mapping[str, list[str]]]
    relations: Mapping[str, Relation]
    frames: tuple[list[Frame], list[Frame]]

    def sentences(self) -> list[Example]:
        """All sentences of both halves; the same ones each time."""
        return fill_all(self.frames, self.words, language=self.code, spaced=self.spaced)


@cache
def load_language(name: str) -> Language:
    """The language of ``data/<name>.toml``: "english" or "chinese"."""
    path = resources.files("headscope.heads.relations") / "data" / f"{name}.toml"
    data = tomllib.loads(path.read_text("utf-8"))
    relations = {r["name"]: Relation(r["name"], r["about"], data["code"], r["source"]) for r in data["relations"]}
    return Language(
        data["code"],
        data["spaced"],
        frozenset(data["function_words"].split()),
        (_words(data, 0), _words(data, 1)),
        relations,
        (_frames(data, 0), _frames(data, 1)),
    )


def english_sentences() -> list[Example]:
    """The English sentences of eight relations, both halves; the same ones each time.

    >>> print(english_sentences()[0].text)
    The monk stood near the waitress patiently until he moved.
    """
    return load_language("english").sentences()


def chinese_sentences() -> list[Example]:
    """The Chinese sentences of two relations, both halves; the same ones each time.

    >>> print(chinese_sentences()[0].text)
    爷爷在王后旁边坐着，后来高兴地他走了。
    """
    return load_language("chinese").sentences()


def constructed_relations() -> dict[str, Relation]:
    """The relations of both languages, by name."""
    return {**load_language("english").relations, **load_language("chinese").relations}


def _words(data: dict[str, Any], half: int) -> dict[str, list[str]]:
    """The word lists of a half; a slot in a list stands for the words of that slot's list."""
    lists = {f"{{{slot}}}": halves[half].split() for slot, halves in data["words"].items()}
    return {slot[1:-1]: [w for word in words for w in lists.get(word, [word])] for slot, words in lists.items()}


def _frames(data: dict[str, Any], half: int) -> list[Frame]:
    frames: list[Frame] = []
    for relation in data["relations"]:
        for group in relation["frames"]:
            if "cores" in group:
                distractors = data["distractors"][group["distractors"]]
                where = tuple(distractors[name][half] for name in ("before", "between", "behind"))
                skeletons = place(group["cores"][half], where)
            else:
                skeletons = either_way(group["openings"][half], group["endings"][half])
            pronouns = [{f"{{{name}}}": text for name, text in kind.items()} for kind in group.get("pronouns", [{}])]
            classes = _classes(data["classes"], group.get("one_class", []))
            insertions = data["insertions"][group["insertions"]][half]
            frames += combine(relation["name"], skeletons, insertions, pronouns, classes)
    return frames


def _classes(members: dict[str, str], one_class: list[str]) -> dict[str, str]:
    """The class of each slot and word; those in `one_class` are all called noun."""
    return {word: "noun" if name in one_class else name for name, words in members.items() for word in words.split()}
