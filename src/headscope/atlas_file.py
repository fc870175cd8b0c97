"""An atlas as a Parquet file: a table that any reader of Parquet shows, with everything behind it in its metadata.

docs/atlas.md says what lies where. Nothing is pickled: the sums are a safetensors block, the rest is JSON.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import safetensors
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from headscope.atlas import FORMAT, HeadAtlas, Worth
from headscope.errors import AtlasError
from headscope.files import whole_file
from headscope.profiling import Measured
from headscope.relations.counts import RelationCounts

__all__ = ["from_parts", "load_atlas", "save_atlas", "to_parts", "to_table"]

_INFO, _STATE = b"headscope.atlas", b"headscope.sums"
_MOST = 1 << 30  # bytes of sums that a file may unfold to


def to_parts(atlas: HeadAtlas) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything that an atlas holds, as tensors and as JSON data."""
    tensors: dict[str, Tensor] = {}
    for name, sums in (("sums", atlas.measured.sums), ("null", atlas.measured.null)):
        tensors |= {f"{name}/{column}": value.contiguous() for column, value in sums.values.items()}
    counts, told = atlas.relations.to_tensors()
    tensors |= {f"relations/{name}": value.contiguous() for name, value in counts.items()}
    tensors |= {f"worth/{method}": value.contiguous() for method, value in atlas.worth.values.items()}
    tensors["worth_clean"] = atlas.worth.clean.contiguous()
    data = {
        "format": FORMAT,
        "info": atlas.info,
        "relations": told,
        "rows": atlas.measured.sums.documents,
        "notes": atlas.measured.notes,
        "worth": {"documents": atlas.worth.documents, "unit": atlas.worth.unit},
    }
    return tensors, data


def from_parts(tensors: dict[str, Tensor], data: dict[str, Any], where: str) -> HeadAtlas:
    """The atlas that ``to_parts`` took apart. Raises AtlasError when it was another version's."""
    if data.get("format") != FORMAT:
        raise AtlasError(
            f"{where} is an atlas of format {data.get('format')!r}; this version reads format {FORMAT}. "
            "Make it again with headscope heads, or use the version that wrote it."
        )
    try:
        measured = Measured()
        for name, sums in (("sums", measured.sums), ("null", measured.null)):
            sums.values = _under(tensors, f"{name}/")
        measured.sums.documents = dict(data["rows"])
        measured.notes = list(data["notes"])
        relations = RelationCounts.from_tensors(_under(tensors, "relations/"), data["relations"])
        told = data["worth"]
        worth = Worth(_under(tensors, "worth/"), tensors["worth_clean"], list(told["documents"]), told["unit"])
        return HeadAtlas(data["info"], measured, relations, worth)
    except (KeyError, TypeError, ValueError) as error:
        raise AtlasError(f"{where} is not a whole atlas: {error}. Make it again with headscope heads.") from error


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def to_table(atlas: HeadAtlas) -> pyarrow.Table:
    """One row a head as an Arrow table: ``.to_pandas()``, or ``polars.from_arrow(table)``."""
    rows = atlas.rows()
    kinds = {"layer": pyarrow.int32(), "head": pyarrow.int32(), "roles": pyarrow.list_(pyarrow.string())}
    names = list(rows[0]) if rows else list(kinds)
    columns = [pyarrow.array([row[name] for row in rows], kinds.get(name, pyarrow.float64())) for name in names]
    return pyarrow.table(columns, names=names)


def save_atlas(atlas: HeadAtlas, path: Path) -> Path:
    """Write the Parquet file, whole or not at all. Raises HeadscopeError when it cannot be written."""
    tensors, data = to_parts(atlas)
    metadata = {_INFO: json.dumps(data, ensure_ascii=False).encode(), _STATE: zlib.compress(save_tensors(tensors), 6)}
    table = to_table(atlas).replace_schema_metadata(metadata)
    with whole_file(path) as scratch:
        pyarrow.parquet.write_table(table, scratch, compression="zstd")
    return path


def load_atlas(path: Path) -> HeadAtlas:
    """Read such a file.

    Raises:
        AtlasError: It is not there, not an atlas, cut short, or of another version.
    """
    if not path.is_file():
        raise AtlasError(f"There is no file {path}. headscope heads --out {path.name} makes one.")
    try:
        metadata = pyarrow.parquet.read_schema(path).metadata or {}
    except (pyarrow.ArrowException, OSError) as error:
        raise AtlasError(f"{path} is no Parquet file, or is cut short: {str(error).splitlines()[0]}") from None
    if _INFO not in metadata or _STATE not in metadata:
        raise AtlasError(f"{path} is a Parquet file, but not an atlas of heads: it has no {_INFO.decode()!r}.")
    try:
        data = json.loads(metadata[_INFO])
        unfold = zlib.decompressobj()
        packed = unfold.decompress(metadata[_STATE], _MOST)
        if unfold.unconsumed_tail:
            raise AtlasError(f"{path} unfolds to more than {_MOST >> 20} MB of sums: it is not one of ours.")
        tensors = load_tensors(packed)
    except (ValueError, zlib.error, safetensors.SafetensorError) as error:
        raise AtlasError(f"{path} is damaged: {error}") from None
    return from_parts(tensors, data, str(path))
