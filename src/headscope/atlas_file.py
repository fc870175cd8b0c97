"""An atlas as a Parquet file: a table that any reader of Parquet shows, with everything behind it in its metadata.

docs/atlas.md says what lies where. Nothing is pickled: the sums are a safetensors block, the rest is JSON.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from headscope.errors import AtlasError
from headscope.files import whole_file

if TYPE_CHECKING:
    from pyarrow import Table as Table

__all__ = ["read", "table", "write"]

_INFO, _STATE = b"headscope.atlas", b"headscope.sums"
_MOST = 1 << 30  # bytes of sums that a file may unfold to


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows of heads as an Arrow table."""
    import pyarrow

    kinds = {"layer": pyarrow.int32(), "head": pyarrow.int32(), "roles": pyarrow.list_(pyarrow.string())}
    names = list(rows[0]) if rows else list(kinds)
    columns = [pyarrow.array([row[name] for row in rows], kinds.get(name, pyarrow.float64())) for name in names]
    return pyarrow.table(columns, names=names)


def write(path: Path, shown: Table, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
    """Write the Parquet file, whole or not at all. Raises HeadscopeError when it cannot be written."""
    from pyarrow import parquet

    metadata = {_INFO: json.dumps(data, ensure_ascii=False).encode(), _STATE: zlib.compress(save_tensors(tensors), 6)}
    with whole_file(path) as scratch:
        parquet.write_table(shown.replace_schema_metadata(metadata), scratch, compression="zstd")


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What lies behind the table of such a file.

    Raises:
        AtlasError: It is not there, not an atlas, or cut short.
    """
    from pyarrow import ArrowException, parquet

    if not path.is_file():
        raise AtlasError(f"There is no file {path}. headscope heads --out {path.name} makes one.")
    try:
        metadata = parquet.read_schema(path).metadata or {}
    except (ArrowException, OSError) as error:
        raise AtlasError(f"{path} is no Parquet file, or is cut short: {str(error).splitlines()[0]}") from None
    if _INFO not in metadata or _STATE not in metadata:
        raise AtlasError(f"{path} is a Parquet file, but not an atlas of heads: it has no {_INFO.decode()!r}.")
    try:
        data = json.loads(metadata[_INFO])
        unfold = zlib.decompressobj()
        packed = unfold.decompress(metadata[_STATE], _MOST)
        if unfold.unconsumed_tail:
            raise AtlasError(f"{path} unfolds to more than {_MOST >> 20} MB of sums: it is not one of ours.")
        return load_tensors(packed), data
    except (ValueError, zlib.error, safetensors.SafetensorError) as error:
        raise AtlasError(f"{path} is damaged: {error}") from None
