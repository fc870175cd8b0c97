"""A fixture for the tests of this folder."""

import pytest

from headscope.ops.kernels import differentiable, fused, indexing, tiles


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a row or two, blocks of 128 keys, parts of few cells: every loop runs several times."""
    monkeypatch.setattr(tiles, "_BLOCK", 1)
    monkeypatch.setattr(tiles, "_SMALL_BLOCK", 1)
    monkeypatch.setattr(tiles, "_TILE", 2 * 2 * 300)
    monkeypatch.setattr(tiles, "_ROW_MULTIPLE", 1)
    monkeypatch.setattr(tiles, "_ROWS", 2 * 2)
    monkeypatch.setattr(differentiable, "_AUTOGRAD", 2 * 6 * 300 * 2)
    monkeypatch.setattr(fused, "_ROWS", 3)
    monkeypatch.setattr(indexing, "_CELLS", 2 * 6 * 11 * 3)
    monkeypatch.setattr(indexing, "_POINTS", 5)
