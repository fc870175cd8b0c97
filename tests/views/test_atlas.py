"""Figures and tables of an atlas."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from headscope.errors import AtlasError
from headscope.heads.atlas.atlas import HeadAtlas
from headscope.views.figures import atlas as atlas_figures
from headscope.views.terminal.heads import print_head
from tests.options import one_thread  # noqa: F401  (for the whole module)


@pytest.mark.parametrize("by", ["roles", "worth", "entropy"])
def test_atlas_figure_is_drawn(by: str, tiny_atlas: HeadAtlas, tmp_path: Path) -> None:
    path = atlas_figures.draw(tiny_atlas, tmp_path / "heads.svg", by=by)
    svg = path.read_text("utf-8")
    assert svg.count("<path") > 12
    with pytest.raises(AtlasError, match="no column 'x'"):
        atlas_figures.draw(tiny_atlas, path, by="x")
    with pytest.raises(ValueError, match="png"):
        atlas_figures.draw(tiny_atlas, tmp_path / "heads.txt", by=by)


def test_print_head_shows_value_null_and_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    monkeypatch.setenv("COLUMNS", "80")
    with resources.as_file(resources.files("headscope.heads.atlas") / "shipped" / "minilm.parquet") as path:
        shipped = HeadAtlas.load(path)
    print_head(shipped, 3, 1, measures=True)
    shown = {line.split("  ")[0].strip(): line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    (row,) = [r for r in shipped.relation_scores() if (r.direction, r.layer, r.head) == ("coreference", 3, 1)]
    better = sum(r.accuracy > row.accuracy for r in shipped.relation_scores() if r.direction == "coreference")
    assert shown["coreference"][1:4] == [f"{row.accuracy:.3f}", f"{row.null:.3f}", f"{better + 1}/72"]
    assert shown["entropy"][1] == f"{float(shipped.value('entropy')[3, 1]):.3f}"
    assert shown["entropy"][2] == f"{float(shipped.measurements.null.value('entropy')[3, 0]):.3f}"
