"""Chinese sentences for two relations. A frame's words are set apart by spaces; the sentence has none.

As in English, the two halves have their own skeletons, insertions and word lists.
"""

from __future__ import annotations

from collections.abc import Mapping

from headscope.heads.relations.sentences.frames import Frame, Rivals, combine, either_way, fill_all, place
from headscope.heads.relations.sentences.pairs import Example, Relation

__all__ = ["FUNCTION_WORDS", "RELATIONS", "chinese"]

RELATIONS: dict[str, Relation] = {
    name: Relation(name, about, "zh", source)
    for name, about, source in (
        (
            "coreference-zh",
            "A pronoun (他, 她, 它) looks at the noun before it that it stands for, not at another one.",
            "Clark et al. 2019, arXiv 1906.04341, there for English",
        ),
        (
            "giver-receiver-zh",
            "The one who receives something looks at the one who gives it: in 我把苹果给了她, 她 at 我.",
            "defined here",
        ),
    )
}


def _words(listed: str) -> frozenset[str]:
    return frozenset(listed.split())


FUNCTION_WORDS = _words(
    """我 你 他 她 它 我们 你们 他们 她们 的 了 着 地 在 和 跟 把 将 给 是 有 由 从 就 也 才 都 又 很
    更 不 而 而且 那 这 那里 那边 一 个 旁边 后面 后来 然后 先 再
    被 还 只 像 如"""
)


def _lists(**lists: str) -> dict[str, list[str]]:
    return {name: words.split() for name, words in lists.items()}


_LISTS: tuple[Mapping[str, list[str]], ...] = (
    _lists(
        man="爸爸 叔叔 国王 爷爷",
        woman="妈妈 阿姨 王后 奶奶",
        thing="苹果 杯子 雨伞 信",
        animal="小狗 石头 汽车",
        who="我 她 老师 医生 农民 爸爸 妈妈",
        time="昨天 早上",
        adv="慢慢 安静 高兴",
        stood="站 坐",
        left="走 动",
        saw="看见 遇到",
        gave="送 递",
        got="得到 收到",
    ),
    _lists(
        man="哥哥 舅舅 王子 儿子",
        woman="姐姐 姑姑 公主 女儿",
        thing="书包 帽子 椅子 钱",
        animal="小猫 箱子 气球",
        who="你 他 司机 护士 律师 哥哥 姐姐",
        time="今天 晚上",
        adv="小心 认真 客气",
        stood="等 停",
        left="倒 消失",
        saw="发现 碰到",
        gave="交 借",
        got="拿到 接到",
    ),
)

_KINDS_OF_WORDS: Mapping[str, str] = {
    **dict.fromkeys(("{man}", "{woman}", "{animal}", "{who}"), "noun"),
    **dict.fromkeys((f"{{{name}}}" for name in ["stood", "left", "saw", "gave", "got"]), "verb"),
    **dict.fromkeys(("他", "她", "它"), "pronoun"),
    "{thing}": "thing",
}

# Who a pronoun stands for, who else is there, and the pronoun.
_KINDS: tuple[Mapping[str, str], ...] = tuple(
    {"{a}": a, "{d}": d, "{p}": p}
    for a, d, p in (
        ("{man}", "{woman}", "他"),
        ("{woman}", "{man}", "她"),
        ("{animal}", "{man}", "它"),
        ("{man}", "{animal}", "他"),
        ("{animal}", "{woman}", "它"),
        ("{woman}", "{animal}", "她"),
    )
)

# When and how, without a noun for a person: from no word to eight.
_MANNER = (
    (
        "",
        "{time}",
        "{adv} 地",
        "很 {adv} 地",
        "{time} 很 {adv} 地",
        "又 {adv} 又 {adv2} 地",
        "{time} 又 {adv} 又 {adv2} 地",
        "{time} 又 很 {adv} 又 很 {adv2} 地",
    ),
    (
        "",
        "{time}",
        "{time} 也",
        "更 {adv} 地",
        "{time} 更 {adv} 地",
        "{adv} 而且 更 {adv2} 地",
        "{time} 不 {adv} 而 {adv2} 地",
        "{time} 都 不 很 {adv} 而 {adv2} 地",
    ),
)


# Another person, before both words of a pair, between them, behind both.
_PERSONS: tuple[Rivals, Rivals] = (
    (
        ("{who3} 也 在 ，", "在 {who3} 旁边 ，", "有 {who3} 在 ，"),
        ("而 不 是 {who3}", "在 {who3} 旁边", "不 像 {who3}"),
        ("， 不 是 {who3}", "， 在 {who3} 旁边", "， {who3} 也 在"),
    ),
    (
        ("{who3} 还 在 ，", "在 {who3} 后面 ，", "是 {who3} 在 ，"),
        ("， 不 是 {who3} ，", "在 {who3} 后面", "不 如 {who3}"),
        ("， 而 不 是 {who3}", "， 在 {who3} 后面", "， 而 {who3} 还 在"),
    ),
)


def _coreference(half: int) -> list[Frame]:
    openings = (
        (
            "{x} 在 {y} 旁边 {stood} 着 ，",
            "我们 {saw} 了 {x} 和 {y} ，",
            "{x} 旁边 有 {y} ，",
            "有 {x} ， 也 有 {y} ，",
        ),
        (
            "{x} {stood} 在 {y} 后面 ，",
            "你们 先 {saw} {x} ， 再 {saw2} {y} ，",
            "{x} 后面 是 {y} ，",
            "那里 是 {x} ， 还 有 {y} ，",
        ),
    )
    endings = (
        ("后来 * {p}/s {left} 了 。", "* {p}/s 就 {left} 了 。", "然后 * {p}/s 也 {left} 了 。"),
        ("而 * {p}/s 才 {left} 了 。", "* {p}/s 又 {left} 了 。", "再 后来 * {p}/s 还 {left} 了 。"),
    )
    skeletons = either_way(openings[half], endings[half])
    return combine("coreference-zh", skeletons, _MANNER[half], _KINDS, _KINDS_OF_WORDS)


def _giver_receiver(half: int) -> list[Frame]:
    cores = (
        (
            "^ {who}/t * + 把 {thing} 给 了 {who2}/s = 。",
            "^ {who}/t * + {gave} 给 {who2}/s 一 个 {thing} = 。",
            "^ 那 {thing} ， {who}/t * + 都 {gave} 给 了 {who2}/s = 。",
            "^ {who2}/s * + 从 {who}/t 那里 {got} 了 {thing} = 。",
            "^ {who2}/s * + {got} 了 {who}/t 的 {thing} = 。",
            "^ {who2}/s * + 又 有 了 {who}/t 的 {thing} = 。",
        ),
        (
            "^ {who}/t * + 将 {thing} {gave} 给 {who2}/s = 。",
            "^ {who}/t * + {gave} 了 那 个 {thing} 给 {who2}/s = 。",
            "^ 这 个 {thing} ， {who}/t * + 先 给 了 {who2}/s = 。",
            "^ {who2}/s * + {got} 了 由 {who}/t {gave} 的 {thing} = 。",
            "^ {who2}/s * + 有 了 {who}/t {gave} 的 {thing} = 。",
            "^ {who2}/s * + 才 {got} {who}/t {gave} 的 {thing} = 。",
        ),
    )
    return combine("giver-receiver-zh", place(cores[half], _PERSONS[half]), _MANNER[half], classes=_KINDS_OF_WORDS)


def chinese() -> list[Example]:
    """The Chinese sentences of both relations, both halves; the same ones each time.

    >>> print(chinese()[0].text)
    爷爷在王后旁边坐着，后来高兴地他走了。
    """
    halves = [[*_coreference(half), *_giver_receiver(half)] for half in (0, 1)]
    return fill_all(halves, _LISTS, language="zh", spaced=False)
