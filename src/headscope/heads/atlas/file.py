"""An atlas as a Parquet file: a table for any reader of Parquet, and in its metadata the sums behind the table.

docs/atlas.md describes the format. Nothing is pickled: the sums are a safetensors block, all else is JSON.
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from headscope.errors import AtlasError, optional_imports
from headscope.files import FileKind, whole_file

if TYPE_CHECKING:
    from pyarrow import Table as Table

FORMAT = 4  # of the file and of its shards
_INFO, _STATE, _EXAMPLES = b"headscope.atlas", b"headscope.sums", b"headscope.examples"
_EXAMPLE_NAMES = ("token_examples", "pair_examples")  # data that goes into an entry of its own, compressed
_LEVEL = 6  # of compression
_MAX_SUMS = 1 << 32  # bytes of sums, before compression
_MAX_TEXT = (1 << 31) - 1  # bytes of one entry in Parquet's metadata
_FOOTER = 8  # bytes at the end of a Parquet file: the length of its metadata, and "PAR1"
_LIMITS = {"thrift_string_size_limit": _MAX_TEXT, "thrift_container_size_limit": _MAX_TEXT}  # pyarrow's are 100 MB


def _is_atlas(path: Path) -> bool:
    """Whether a file is Parquet with an atlas' metadata."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - _FOOTER))
            footer = file.read()
            size = int.from_bytes(footer[:4], "little")
            if footer[4:] != b"PAR1" or size + _FOOTER > end:
                return False
            file.seek(end - _FOOTER - size)
            return _INFO in file.read(size)
    except OSError:
        return False


KIND = FileKind("an atlas of heads", _is_atlas)


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows of heads as an Arrow table."""
    with optional_imports("atlas", "Atlas files and tables"):
        import pyarrow

    kinds = {"layer": pyarrow.int32(), "head": pyarrow.int32(), "roles": pyarrow.list_(pyarrow.string())}
    names = list(rows[0]) if rows else list(kinds)
    columns = [pyarrow.array([row[name] for row in rows], kinds.get(name, pyarrow.float64())) for name in names]
    return pyarrow.table(columns, names=names)


def write(path: Path, shown: Table, tensors: dict[str, Tensor], data: dict[str, Any], *, force: bool = False) -> None:
    """Write the Parquet file, whole or not at all.

    Parquet's metadata is text, hence base64. The Arrow schema is not stored: it would contain all metadata again.

    Raises:
        AtlasError: The sums are larger than such a file can be.
        HeadscopeError: It cannot be written.
    """
    with optional_imports("atlas", "Atlas files and tables"):
        from pyarrow import parquet

    size = sum(tensor.nbytes for tensor in tensors.values())
    packed = _packed(save_tensors(tensors)) if size <= _MAX_SUMS else b""
    if size > _MAX_SUMS or len(packed) > _MAX_TEXT:
        raise AtlasError(
            f"{path} would hold {size >> 20} MB of sums, more than such a file can: profile the treebanks one by one, "
            "each with an --out of its own."
        )
    info = {name: value for name, value in data.items() if name not in _EXAMPLE_NAMES}
    examples = {name: data[name] for name in _EXAMPLE_NAMES if name in data}
    metadata = {_INFO: _json(info), _STATE: packed, _EXAMPLES: _packed(_json(examples))}
    with (
        whole_file(path, KIND, force=force) as scratch,
        parquet.ParquetWriter(scratch, shown.schema, compression="zstd", store_schema=False) as writer,
    ):
        writer.write_table(shown)
        writer.add_key_value_metadata(metadata)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The sums and the JSON data in such a file.

    Raises:
        AtlasError: The file is missing, not an atlas, or cut short.
    """
    with optional_imports("atlas", "Atlas files and tables"):
        from pyarrow import ArrowException, parquet

    if not path.is_file():
        raise AtlasError(f"There is no file {path}. headscope heads --out {path.name} makes one.")
    try:
        with parquet.ParquetFile(path, **_LIMITS) as file:
            metadata = file.metadata.metadata or {}
    except (ArrowException, OSError) as error:
        raise AtlasError(f"{path} is no Parquet file, or is cut short: {str(error).splitlines()[0]}") from None
    for name in (_INFO, _STATE, _EXAMPLES):
        if name not in metadata:
            raise AtlasError(f"{path} is a Parquet file, but not an atlas of heads: it has no {name.decode()!r}.")
    try:
        data = json.loads(metadata[_INFO])
        check_format(data, path)
        examples = json.loads(_unpacked(path, metadata[_EXAMPLES]))
        return load_tensors(_unpacked(path, metadata[_STATE])), data | examples
    except (ValueError, TypeError, zlib.error, safetensors.SafetensorError) as error:
        raise AtlasError(f"{path} is damaged: {error}") from None


def _json(data: Any) -> bytes:
    return json.dumps(data, ensure_ascii=False).encode()


def _packed(data: bytes) -> bytes:
    """Compressed, and as text."""
    return base64.b64encode(zlib.compress(data, _LEVEL))


def _unpacked(path: Path, packed: bytes) -> bytes:
    """What :func:`_packed` was given. Raises AtlasError when it is larger than anything that we write."""
    unfold = zlib.decompressobj()
    data = unfold.decompress(base64.b64decode(packed, validate=True), _MAX_SUMS + (1 << 20))
    if unfold.unconsumed_tail:
        raise AtlasError(f"{path} unfolds to more than {_MAX_SUMS >> 20} MB of sums: it is not one of ours.")
    return data


def check_format(data: object, where: object) -> None:
    """Raises AtlasError when another version wrote this, or something else did."""
    if not isinstance(data, Mapping):
        raise AtlasError(f"{where} is not a whole atlas: its description is no JSON object.")
    if data.get("format") != FORMAT:
        raise AtlasError(
            f"{where} is an atlas of format {data.get('format')!r}; this version reads format {FORMAT}. "
            "Make it again with headscope heads, or use the version that wrote it."
        )
