"""Words of a text from its characters alone: which characters make up one word, and which are a word each."""

import re
import unicodedata

Span = tuple[int, int]

# Each character has a class, a letter, and words are found by one regular expression over the
# classes: l letter, d digit, c a character that is a word alone (Chinese, Japanese), m mark that
# belongs to the character before (accent, skin tone), k keycap, z zero-width joiner, f other
# invisible format character, r half a flag, h may join letters (hyphen, apostrophe), n may join
# digits (decimal point), p any other mark or symbol, s space.
_LETTER = r"[ld](?!m*k)m*"
_WORD = re.compile(
    rf"{_LETTER}(?:(?:h|(?<=d)n(?=d))?[zf]*{_LETTER}|[zf]+m+)*"  # a word or a number
    r"|rr[mk]*"  # a flag
    r"|[ldchnrpmk][mk]*(?:z+[ldchnrp][mk]*)*"  # a character alone, or an emoji joined from several
)


class _Classes(dict[int, str]):
    """The class of each character, computed once for each that occurs."""

    def __missing__(self, code: int) -> str:
        self[code] = _character_class(code)
        return self[code]


# The ranges of characters that are words alone: Chinese, and the two Japanese syllabaries.
_ALONE = (
    (0x2E80, 0x2FDF),
    (0x3005, 0x3007),
    (0x3021, 0x3029),
    (0x3041, 0x3096),
    (0x309D, 0x30FF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9D),
    (0x1AFF0, 0x1B16F),
    (0x20000, 0x3FFFD),
)
_BY_CODE = {0x200D: "z", 0x20E3: "k", ord("_"): "l"}
_BY_CODE |= dict.fromkeys(map(ord, ".,٫٬．⁄"), "n")  # the fourth and fifth: Arabic decimal point and thousands mark
_BY_CODE |= dict.fromkeys(map(ord, "⁺⁻⁼⁽⁾₊₋₌₍₎"), "l")  # raised and lowered: they belong to the number or letter
_BY_CODE |= dict.fromkeys(map(ord, "'’-‐‑·׳״＇"), "h")
_BY_CODE |= dict.fromkeys((0xFF9E, 0xFF9F), "m")  # the half-width voicing marks


def _character_class(code: int) -> str:
    if code in _BY_CODE:
        return _BY_CODE[code]
    if 0x1F3FB <= code <= 0x1F3FF or 0xE0020 <= code <= 0xE007F:
        return "m"
    if 0x1F1E6 <= code <= 0x1F1FF:
        return "r"
    category = unicodedata.category(chr(code))
    if category[0] in "LN" and any(first <= code <= last for first, last in _ALONE):
        return "c"
    if category == "Nd":
        return "d"
    if category == "Cf":
        return "f"
    if category[0] == "Z" or category == "Cc":
        return "s"
    return {"L": "l", "N": "l", "M": "m"}.get(category[0], "p")


_CLASSES = _Classes()


def word_spans(text: str) -> list[Span]:
    """Start and end of each word of the text, from its characters alone."""
    return [match.span() for match in _WORD.finditer(text.translate(_CLASSES))]
