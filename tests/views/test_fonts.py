"""Fonts for a text: each character from a font that has it, and lines no wider than asked."""

import re
from pathlib import Path

import matplotlib
import pytest
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

from headscope.views.figures import fonts as fonts_module
from headscope.views.figures.fonts import Fonts

FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
DEJAVU, STIX = FOLDER / "DejaVuSans.ttf", FOLDER / "STIXGeneral.ttf"
NEITHER = "\U00012000"


@pytest.fixture
def only_in_stix(monkeypatch: pytest.MonkeyPatch) -> str:
    """A character that only a font has of which matplotlib does not know yet."""
    listed = [entry for entry in font_manager.fontManager.ttflist if entry.fname == str(DEJAVU)]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", listed)
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    fonts_module._characters.cache_clear()
    stix, dejavu = (set(map(chr, FT2Font(str(path)).get_charmap())) for path in (STIX, DEJAVU))
    return min(filter(str.isprintable, stix - dejavu))


def test_a_font_that_was_just_installed_is_found(only_in_stix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Fonts(f"ok {only_in_stix}").missing == only_in_stix
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(FOLDER / "no such.ttf"), str(STIX)])
    fonts = Fonts(f"ok {only_in_stix} {NEITHER}")
    assert fonts.missing == NEITHER
    assert fonts.families[0] == "DejaVu Sans"
    assert len(fonts.families) == 2


@pytest.mark.parametrize(
    "text", ["我把苹果给了她，因为她饿了。" * 9, "W" * 300, "AVAST MMM! " * 40, "ok\u3000她 x" * 30]
)
@pytest.mark.parametrize("width", [2.0, 5.5])
def test_wrapped_lines_are_no_wider_than_asked(text: str, width: float) -> None:
    fonts = Fonts(text)
    lines = fonts.wrapped(text, width, 7.5)
    assert max(fonts.inches(line, 7.5) for line in lines) <= width
    assert min(fonts.inches(line, 7.5) for line in lines[:-1]) > width / 2
    assert re.sub(r"\s", "", "".join(lines)) == re.sub(r"\s", "", text)
    assert not any(line[0] in "，。" for line in lines)
