"""The Parquet file of an atlas: round trip, other readers, damaged files, the shipped atlases."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import polars
import pyarrow
import pyarrow.parquet
import pytest
import torch

from headscope.errors import AtlasError
from headscope.heads.atlas import file as atlas_file
from headscope.heads.atlas.atlas import HeadAtlas
from headscope.heads.atlas.profiler import weights_hash
from headscope.heads.measures import standard
from tests.options import one_thread  # noqa: F401  (for the whole module)
from tests.tiny_atlas import assert_same_atlas


def test_saved_atlas_is_the_same_when_loaded(tiny_atlas: HeadAtlas, tmp_path: Path) -> None:
    path = tiny_atlas.save(tmp_path / "heads.parquet")
    again = HeadAtlas.load(path)
    assert_same_atlas(again, tiny_atlas, 0)
    assert again.info == json.loads(json.dumps(tiny_atlas.info))
    assert again.measurements.token_examples == tiny_atlas.measurements.token_examples
    assert again.relations.pair_examples.pairs == tiny_atlas.relations.pair_examples.pairs
    plain = pyarrow.parquet.read_table(path)  # any reader of Parquet
    assert polars.read_parquet(path)["roles"].to_list() == plain.column("roles").to_pylist()
    assert plain.num_rows == 12
    assert plain.column("layer").to_pylist() == [0] * 6 + [1] * 6
    assert plain.column("entropy").to_pylist() == pytest.approx(tiny_atlas.value("entropy").flatten().tolist())


def test_read_takes_metadata_above_the_limit_of_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atlas_file, "_LEVEL", 0)  # not compressed: 80 MiB are 112 MB of text, the limit is 105
    sums = torch.arange(10 << 20)
    path = tmp_path / "large.parquet"
    atlas_file.write(
        path,
        atlas_file.table([{"layer": 0, "head": 0, "roles": ["sink"]}]),
        {"sums": sums},
        {"format": atlas_file.FORMAT},
    )
    tensors, _ = atlas_file.read(path)
    assert path.stat().st_size > 105_000_000
    assert torch.equal(tensors["sums"], sums)


def test_write_refuses_sums_above_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atlas_file, "_MAX_SUMS", 1000)
    shown = atlas_file.table([{"layer": 0, "head": 0, "roles": []}])
    with pytest.raises(AtlasError, match="would hold 2 MB of sums, more than such a file can"):
        atlas_file.write(tmp_path / "large.parquet", shown, {"sums": torch.zeros(1 << 18, dtype=torch.float64)}, {})
    assert not list(tmp_path.iterdir())


def test_atlas_converts_to_pandas_and_polars(tiny_atlas: HeadAtlas) -> None:
    frame = tiny_atlas.to_table().to_pandas()
    assert frame.groupby("layer")["entropy"].mean()[1] == pytest.approx(float(tiny_atlas.value("entropy")[1].mean()))
    other = polars.DataFrame(tiny_atlas)
    assert other.filter(polars.col("head") == 5)["confidence"].to_list() == pytest.approx(
        tiny_atlas.value("confidence")[:, 5].tolist()
    )


def test_load_refuses_files_that_are_no_atlas(tiny_atlas: HeadAtlas, tmp_path: Path) -> None:
    path = tiny_atlas.save(tmp_path / "heads.parquet")
    with pytest.raises(AtlasError, match="There is no file"):
        HeadAtlas.load(tmp_path / "none.parquet")
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(AtlasError, match="no Parquet file, or is cut short"):
        HeadAtlas.load(cut)
    other = tmp_path / "other.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"layer": [0]}), other)
    with pytest.raises(AtlasError, match="not an atlas of heads"):
        HeadAtlas.load(other)
    table = pyarrow.parquet.read_table(path)
    metadata = dict(table.schema.metadata)
    data = json.loads(metadata[b"headscope.atlas"])
    for name, value, match in (
        (b"headscope.atlas", json.dumps(data | {"format": 7}).encode(), "format 7; this version reads format 4"),
        (b"headscope.atlas", b"{", "is damaged"),
        (b"headscope.sums", b"\x00\x01", "is damaged"),
        (b"headscope.atlas", json.dumps({"format": 4}).encode(), "is not a whole atlas"),
        (b"headscope.atlas", json.dumps([data]).encode(), "is not a whole atlas"),
        (b"headscope.atlas", json.dumps(data | {"info": {"columns": {}}}).encode(), "is not a whole atlas: 'model'"),
    ):
        pyarrow.parquet.write_table(table.replace_schema_metadata(metadata | {name: value}), other)
        with pytest.raises(AtlasError, match=match):
            HeadAtlas.load(other)
    with pytest.raises(AtlasError, match="no column 'entropie'; it has: offset"):
        HeadAtlas(tiny_atlas.info | {"columns": {"offset_hits-1": {}}}, tiny_atlas.measurements).value("entropie")


@pytest.mark.parametrize("name", ["smollm2", "minilm"])
def test_shipped_atlas_is_of_the_pulled_model(name: str, request: pytest.FixtureRequest) -> None:

    loaded = request.getfixturevalue(name)
    with resources.as_file(resources.files("headscope.heads.atlas") / "shipped" / f"{name}.parquet") as path:
        shipped = HeadAtlas.load(path)
    assert shipped.info["model"]["weights"] == weights_hash(loaded.model)
    assert len(shipped) == {"smollm2": 270, "minilm": 72}[name]
    assert set(shipped.info["columns"]) == {column.name for measure in standard() for column in measure.columns}
    best = [row for row in shipped.roles() if row.role == "coreference"]
    assert best
    assert all(row.low > 0.2 and row.p < 0.05 for row in best)
    assert shipped.value("ablation_zero").isfinite().all()
