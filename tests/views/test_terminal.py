"""Tables in the terminal."""

import io
import math
import re
import sys

import pytest
import torch
from rich.cells import cell_len

from headscope import models
from headscope.models.tokens import tokenize
from headscope.views import links
from headscope.views.links import Head
from headscope.views.terminal import console as terminal
from headscope.views.terminal.links import print_links
from headscope.views.terminal.training import print_head_stats
from headscope.watching.monitoring import HeadStats
from headscope.watching.texts import record_text

TEXT = "The animal didn't cross the street because it was too tired."


def shown(loaded: models.Loaded, text: str, capsys: pytest.CaptureFixture[str], **options: object) -> str:
    tokens = tokenize(text, loaded.tokenizer, start_token_id=loaded.start_token_id)
    target = options.pop("target", None)
    view = links.find_links(
        record_text(loaded, tokens),
        tokens,
        [tokens.find(word) for word in options.pop("sources", [])],  # type: ignore[attr-defined]
        target=tokens.find(str(target)) if target else None,
        causal=loaded.causal,
        **options,
    )
    capsys.readouterr()
    print_links(view, model=loaded.name, causal=loaded.causal, command="headscope see {}".format)
    return capsys.readouterr().out


def test_print_links_explains_the_table(smollm2: models.Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(smollm2, TEXT, capsys, sources=["it"])
    rows = [line.split() for line in out.splitlines()]
    assert ["animal", "6", "back", "3.8"] in [row[:4] for row in rows]
    text = " ".join(out.split())
    assert "30 layers × 9 = 270 heads" in text
    assert "both counted from 0" in text
    assert "For “it”, this head puts 96 % of its attention on “because”." in text
    assert "Checked: these weights × values give the model's own attention output (error" in text
    assert "not listed: start token 48 %, the word itself 8 % (mean of" in text
    assert "Try: headscope see --head 3.8 headscope see --from it --to animal" in text


def test_print_links_has_no_colour_in_a_pipe(smollm2: models.Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    assert "\x1b" not in shown(smollm2, TEXT, capsys, head=Head(13, 8))


@pytest.mark.parametrize("width", [40, 80])
def test_print_links_fits_the_terminal(
    smollm2: models.Loaded, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    out = shown(smollm2, "我把苹果给了她，因为她饿了 supercalifragilisticexpialidocious.", capsys)
    lines = [line for line in out.splitlines() if "headscope see" not in line]  # a command stays whole, to be copied
    assert max(cell_len(line) for line in lines) <= width
    assert "她#2" in out


def test_print_links_gives_a_chinese_character_two_cells(
    smollm2: models.Loaded, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown(smollm2, "她饿了 today", capsys, sources=["today"])
    ends = {cell_len(line[: line.index(" back")]) for line in out.splitlines() if " back" in line}
    assert len(ends) == 1


def test_print_links_shows_square_brackets_as_text(minilm: models.Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(minilm, "see [bold] it", capsys, sources=["bold"])
    assert "bold" in out
    assert "[" in [row.split()[0] for row in out.splitlines() if "1 back" in row] + out.split()


def test_print_links_says_when_the_weights_were_not_checked(
    smollm2: models.Loaded, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = tokenize("a b", smollm2.tokenizer, start_token_id=0)
    view = links.find_links(record_text(smollm2, tokens), tokens)
    object.__setattr__(view, "proof", None)
    print_links(view, model="m", causal=True)
    assert "Not checked" in capsys.readouterr().out


def test_print_line_replaces_a_character_that_the_terminal_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", file)
    terminal.print_line("她 x")
    file.flush()
    assert file.buffer.getvalue() == b"? x\n"


def test_print_head_stats_shows_a_number_or_a_word_per_head(capsys: pytest.CaptureFixture[str]) -> None:
    share = torch.tensor([[0.42, 0.2, math.nan, math.nan]]).double()
    dead, finite = torch.tensor([[False, True, False, False]]), torch.tensor([[True, True, True, False]])
    print_head_stats(HeadStats(50, ("layers.0",), share, share, share, share, dead, finite, (4,)))
    out = capsys.readouterr().out
    assert "Heads at step 50" in out
    assert re.search(r"layers\.0 +42\s% +dead +– +not finite", out)


def test_stages_are_timed_and_silent_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    stages = terminal.Stages()
    with stages.stage("counting") as on_progress:
        on_progress(1, 2)
    assert capsys.readouterr() == ("", "")
    terminal.print_stages(stages, {"text": "12 words"})
    out, err = capsys.readouterr()
    assert out == ""
    assert err.split()[:4] == ["text", "12", "words", "counting"]
