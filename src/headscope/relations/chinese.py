"""Chinese sentences for two relations. A frame's words are set apart by spaces; the sentence has none.

As in English, the two halves have their own skeletons, insertions and word lists.
"""

from __future__ import annotations

from collections.abc import Mapping

from headscope.relations.frames import Frame, combine, fill_all
from headscope.relations.pairs import Example, Relation

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
    被 还 只"""
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
    **dict.fromkeys(("他", "她", "它", "我们", "你们"), "pronoun"),
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


def _coreference(half: int) -> list[Frame]:
    skeletons = (
        (
            "{a}/t 和 {d} * {stood} 着 ， 后来 {p}/s {left} 了 。",
            "{d} 和 {a}/t * {stood} 着 ， 后来 {p}/s {left} 了 。",
            "我们 {saw} 了 {a}/t 和 {d} ， * {p}/s 就 {left} 了 。",
            "我们 {saw} 了 {d} 和 {a}/t ， * {p}/s 就 {left} 了 。",
            "{a}/t {stood} 在 {d} 旁边 ， 后来 * {p}/s 也 {left} 了 。",
            "{d} 旁边 有 {a}/t ， 后来 * {p}/s 也 {left} 了 。",
        ),
        (
            "{a}/t 跟 {d} * {stood} 了 ， 然后 {p}/s {left} 了 。",
            "{d} 跟 {a}/t * {stood} 了 ， 然后 {p}/s {left} 了 。",
            "你们 先 {saw} {a}/t ， 再 {saw2} {d} ， * {p}/s 才 {left} 了 。",
            "你们 先 {saw} {d} ， 再 {saw2} {a}/t ， * {p}/s 才 {left} 了 。",
            "{a}/t {stood} 在 {d} 后面 ， 然后 * {p}/s 还 {left} 了 。",
            "{d} 后面 是 {a}/t ， 然后 * {p}/s 还 {left} 了 。",
        ),
    )
    return combine("coreference-zh", skeletons[half], _MANNER[half], _KINDS, _KINDS_OF_WORDS)


def _giver_receiver(half: int) -> list[Frame]:
    skeletons = (
        (
            "{who3} 也 在 ， {who}/t * 把 {thing} 给 了 {who2}/s 。",
            "{who3} 也 在 ， {who}/t * {gave} 给 {who2}/s 一 个 {thing} 。",
            "{who}/t 而 不 是 {who3} * 把 {thing} 给 了 {who2}/s 。",
            "{who}/t 而 不 是 {who3} * {gave} 给 {who2}/s 一 个 {thing} 。",
            "{who}/t * 把 这 个 {thing} {gave} 给 了 {who2}/s ， 不 是 {who3} 。",
            "{who}/t * {gave} 给 {who2}/s 一 个 {thing} ， {who3} 也 在 。",
            "{who3} 也 在 ， {who2}/s * 从 {who}/t 那里 {got} 了 {thing} 。",
            "{who3} 也 在 ， {who2}/s * {got} 了 {who}/t 的 {thing} 。",
            "{who2}/s 而 不 是 {who3} * 从 {who}/t 那里 {got} 了 {thing} 。",
            "{who2}/s 而 不 是 {who3} * {got} 了 {who}/t 的 {thing} 。",
            "{who2}/s * {got} 了 {who}/t 的 {thing} ， 不 是 {who3} 的 。",
            "{who2}/s 的 {thing} 是 * 从 {who}/t 那里 {got} 的 ， {who3} 也 在 。",
        ),
        (
            "{who3} 还 在 ， {who}/t * 将 {thing} {gave} 给 {who2}/s 。",
            "{who3} 还 在 ， 那 个 {thing} {who}/t * 先 给 了 {who2}/s 。",
            "{who}/t ， 不 是 {who3} ， * 将 {thing} {gave} 给 {who2}/s 。",
            "那 个 {thing} ， {who}/t 不 是 {who3} * 先 给 了 {who2}/s 。",
            "{who}/t * {gave} 了 那 个 {thing} 给 {who2}/s ， 不 给 {who3} 。",
            "那 个 {thing} ， {who}/t * 先 给 了 {who2}/s ， {who3} 还 在 。",
            "{who3} 还 在 ， {who2}/s * {got} 了 由 {who}/t {gave} 的 {thing} 。",
            "{who3} 还 在 ， {who2}/s * 有 了 {who}/t {gave} 的 {thing} 。",
            "{who2}/s ， 不 是 {who3} ， * {got} 了 由 {who}/t {gave} 的 {thing} 。",
            "{who2}/s 不 是 {who3} * 有 了 {who}/t {gave} 的 {thing} 。",
            "{who2}/s * {got} 了 由 {who}/t {gave} 的 {thing} ， 不 是 由 {who3} 。",
            "{who2}/s 那 个 {thing} ， * 是 由 {who}/t {gave} 的 ， {who3} 还 在 。",
        ),
    )
    return combine("giver-receiver-zh", skeletons[half], _MANNER[half], classes=_KINDS_OF_WORDS)


def chinese() -> list[Example]:
    """The Chinese sentences of both relations, both halves; the same ones each time.

    >>> print(chinese()[0].text)
    阿姨和叔叔站着，后来她走了。
    """
    halves = [[*_coreference(half), *_giver_receiver(half)] for half in (0, 1)]
    return fill_all(halves, _LISTS, language="zh", spaced=False)
