"""Figures are drawn, whole, and show what they should."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from headscope import models
from headscope.errors import HeadscopeError
from headscope.models.tokens import Tokens, tokenize
from headscope.views.figures import maps as figures
from headscope.views.figures.fonts import Fonts
from headscope.views.links import Head
from headscope.watching.recording import Recording
from headscope.watching.texts import record_text

Run = tuple[Recording, Tokens]


@pytest.fixture(scope="module")
def run(minilm: models.Loaded) -> Run:
    tokens = tokenize("The animal didn't cross because it was tired.", minilm.tokenizer)
    return record_text(minilm, tokens), tokens


@pytest.mark.parametrize(("ending", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")])
def test_thumbnails_write_png_svg_and_pdf(run: Run, tmp_path: Path, ending: str, start: bytes) -> None:
    path = tmp_path / f"heads{ending}"
    drawn = figures.thumbnails(*run, path, model="minilm")
    assert drawn == figures.Drawn(path, "")
    assert path.read_bytes().startswith(start)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_figures_draw_a_larger_weight_darker(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawings = []
    draw = figures._draw
    monkeypatch.setattr(
        figures, "_draw", lambda axes, maps, special: drawings.append((maps, special)) or draw(axes, maps, special)
    )
    figures.thumbnails(*run, tmp_path / "a.png")
    figures.head_map(*run, Head(0, 2), tmp_path / "b.png")
    (mosaic, strips), (one, beside) = drawings
    count = len(run[1].words)
    weights = one[:, -count:]
    before = weights.diagonal(-1)
    assert before[[0, *range(2, count - 1)]].min() > 0.9  # 0.2 looks at the token before
    assert before[1] == pytest.approx(1 / 3, abs=0.01)  # "didn't" is three tokens
    assert np.allclose(np.nansum(one.numpy(), 1) + np.nansum(beside.numpy()[:, :1], 1), 1, atol=1e-4)
    tall, wide = mosaic.shape[0] // 6, mosaic.shape[1] // 12
    small = mosaic[:count, 2 * wide : 3 * wide]
    assert np.allclose(small[:, ~small.isnan().all(0)].numpy(), weights.numpy())
    assert not strips[tall : tall + count, 0].isnan().any()
    picture = image.imread(tmp_path / "a.png")
    assert picture[..., :3].min() < 0.2  # something dark is on it


def test_small_maps_leave_out_what_the_mask_hides(smollm2: models.Loaded) -> None:
    tokens = tokenize("a b c", smollm2.tokenizer, start_token_id=0)
    maps, special = figures._small_maps(record_text(smollm2, tokens)[0], tokens, 64)
    assert maps.shape == (9, 3, 3)
    assert maps.isnan().sum().item() == 9 * 3  # above the diagonal
    assert special.min() > 0


def test_small_maps_of_a_long_text_have_rows_that_sum_to_1(minilm: models.Loaded, tmp_path: Path) -> None:
    tokens = tokenize("one two three four five " * 30, minilm.tokenizer)
    recording = record_text(minilm, tokens)
    maps, special = figures._small_maps(recording[1], tokens, 64)
    assert maps.shape == (12, 64, 64)
    assert np.allclose((maps.sum(-1) + special).numpy(), 1, atol=1e-4)
    figures.head_map(recording, tokens, Head(1, 4), tmp_path / "long.png")
    assert (tmp_path / "long.png").stat().st_size > 10_000


def test_head_map_names_characters_that_no_font_has(minilm: models.Loaded, tmp_path: Path) -> None:
    tokens = tokenize("ok \U00012000", minilm.tokenizer)  # a cuneiform sign
    drawn = figures.head_map(record_text(minilm, tokens), tokens, Head(0, 0), tmp_path / "a.svg")
    assert drawn.missing == "\U00012000"
    fonts = Fonts(tokens.text)
    assert [fonts.shown(word.text, i) for i, word in enumerate(tokens.words)] == ["ok", "(1)"]
    assert fonts.drawable("a\U00012000b") == "a□b"


@pytest.mark.parametrize("name", ["heads.jpg", "heads"])
def test_thumbnails_refuse_another_extension(run: Run, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"a figure is \.png, \.svg or \.pdf"):
        figures.thumbnails(*run, tmp_path / name)


def test_thumbnails_refuse_a_missing_folder(run: Run, tmp_path: Path) -> None:
    with pytest.raises(HeadscopeError, match=r"there is no folder .*nowhere"):
        figures.thumbnails(*run, tmp_path / "nowhere" / "heads.png")


def test_thumbnails_leave_the_old_file_when_they_fail(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "heads.png"
    path.write_bytes(b"old")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(HeadscopeError, match=r"Cannot write .*heads\.png: No space left on device"):
        figures.thumbnails(*run, path, force=True)
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1
