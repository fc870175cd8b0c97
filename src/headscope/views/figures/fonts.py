"""Fonts for a text in any script: which ones draw each of its characters, and how wide its lines are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache

from matplotlib import font_manager
from matplotlib.font_manager import FontProperties
from matplotlib.ft2font import FT2Font
from matplotlib.textpath import text_to_path

_FIRST = "DejaVu Sans"  # matplotlib brings it
_FALLBACKS = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Noto Sans CJK JP",  # the name under which matplotlib knows the file of all Noto Sans CJK
    "Source Han Sans SC",
    "Source Han Sans CN",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "Hiragino Sans GB",
    "Heiti SC",
    "Microsoft YaHei",
    "SimHei",
    "Droid Sans Fallback",
    "Arial Unicode MS",
    "Noto Sans",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Noto Emoji",
)
_EMPTY = re.compile("last ?resort|blank|tofu", re.IGNORECASE)  # fonts that have a box for every character
_WIDE = "\u2e80-\U0003ffff"  # Chinese, Japanese, Korean and signs: a line may end behind each
_CLOSING = "，。、！？；：”’）】》」』〉"  # no line begins with these
_UNIT = re.compile(rf"\s*(?:[{_WIDE}][{_CLOSING}]*|[^\s{_WIDE}]+)")
_BOX = "□"


class Fonts:
    """The fonts that draw a text, character by character.

    Attributes:
        families: The fonts; each character is drawn by the first that has it.
        missing: The characters that no font has.
    """

    def __init__(self, text: str) -> None:
        left = {character for character in text if character.isprintable() and not character.isspace()}
        left -= _characters(_FIRST)
        self.families = [_FIRST]
        for name in _other_fonts() if left else ():
            if has := left & _characters(name):
                self.families.append(name)
                left -= has
            if not left:
                break
        self.missing = "".join(sorted(left))

    def shown(self, name: str, index: int) -> str:
        """A word for an axis; its number if no font has any of its characters."""
        if set(name) <= set(self.missing):
            return f"({index})"
        name = self.drawable(name)
        return name if len(name) <= 24 else name[:23] + "…"

    def drawable(self, text: str) -> str:
        """The text with a box in the place of each character that no font has."""
        return text.translate(dict.fromkeys(map(ord, self.missing), _BOX))

    def inches(self, text: str, size: float, weight: str = "normal") -> float:
        """The width of one line of text."""
        font = FontProperties(family=self.families, size=size, weight=weight)
        return float(text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]) / 72

    def wrapped(self, text: str, width: float, size: float, weight: str = "normal") -> list[str]:
        """The text in lines of at most ``width`` inches; they end at spaces, and between Chinese characters."""
        lines = [""]
        for unit in _UNIT.findall(text):
            if self.inches(lines[-1] + unit, size, weight) <= width:
                lines[-1] += unit
                continue
            lines.append("")
            for character in unit.lstrip():  # what is longer than a line is cut
                if lines[-1] and self.inches(lines[-1] + character, size, weight) > width:
                    lines.append("")
                lines[-1] += character
        return [line for line in lines if line] or [""]


def _other_fonts() -> Iterator[str]:
    """The installed fonts, those that are good for text first; then those that came after matplotlib's list."""
    names = _installed()
    yield from (name for name in _FALLBACKS if name in names)
    yield from sorted(names - {_FIRST, *_FALLBACKS})
    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    for path in font_manager.findSystemFonts():
        if path not in known:
            with suppress(OSError, RuntimeError, ValueError):  # a damaged file, or one of bitmaps
                font_manager.fontManager.addfont(path)
    new = _installed() - names
    yield from (name for name in _FALLBACKS if name in new)
    yield from sorted(new - {*_FALLBACKS})


def _installed() -> set[str]:
    return {entry.name for entry in font_manager.fontManager.ttflist if not _EMPTY.search(entry.name)}


@cache
def _characters(name: str) -> frozenset[str]:
    """The characters that a font has; none if its file is gone or damaged."""
    faces = [entry for entry in font_manager.fontManager.ttflist if entry.name == name]
    regular = min(faces, key=lambda face: (face.style != "normal", str(face.weight) not in ("400", "normal")))
    try:
        return frozenset(map(chr, FT2Font(regular.fname).get_charmap()))
    except (OSError, RuntimeError, ValueError):
        return frozenset()
