"""Files: bytes that become text by one rule, and files that appear whole or not at all."""

from __future__ import annotations

import codecs
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from headscope.errors import HeadscopeError, TextError


def read_text(path: Path) -> str:
    """The text of a file, by the rule of `decode_text`.

    Raises:
        TextError: The file cannot be read, or is not UTF-8 text.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TextError(f"Cannot read {path}: {error.strerror}.") from None
    return decode_text(data, str(path))


def decode_text(data: bytes, source: str) -> str:
    """Bytes in UTF-8 as text: no byte order mark, line feeds between lines, and none after the last line.

    So `echo text | headscope see` reads what `headscope see text` reads.

    Args:
        data: The bytes.
        source: Where they come from, for the error message.

    Raises:
        TextError: They are not UTF-8 text.
    """
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    zero = data.find(b"\0")
    if data.startswith(marks) or zero >= 0:
        what = "begins like UTF-16" if data.startswith(marks) else f"has a zero byte at {zero}, as UTF-16 does"
        raise TextError(f"{source} is not UTF-8 text: it {what}. Save it as UTF-8.")
    try:
        return unix_lines(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise TextError(f"{source} is not UTF-8 text: byte {error.start} cannot be read. Save it as UTF-8.") from None


def check_characters(text: str, source: str) -> None:
    """Raise TextError if the text has characters that UTF-8 does not, and that no tokenizer can read.

    Args:
        text: The text.
        source: Where it comes from, for the error message.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        what = f"half a character (the surrogate U+{code:04X} alone)"
        if 0xDC80 <= code <= 0xDCFF:  # what Python makes of a byte that it cannot decode
            what = f"the byte 0x{code - 0xDC00:02X}, which was read in another encoding than its own"
        raise TextError(
            f"{source}: character {error.start} is {what}, which no tokenizer can read. Remove it, or read the text "
            "again with its right encoding."
        ) from None


def unix_lines(text: str) -> str:
    r"""The text with a line feed in place of each CR LF and each CR alone, and without the end of its last line.

    >>> unix_lines("one\r\ntwo\rthree\n")
    'one\ntwo\nthree'
    """
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")


class FileKind(NamedTuple):
    """A kind of file that Headscope writes.

    Attributes:
        name: The kind, in a message.
        matches: Whether a file is of this kind.
    """

    name: str
    matches: Callable[[Path], bool]


def safetensors_kind(name: str, file_format: str) -> FileKind:
    """The safetensors files whose header names one format.

    >>> safetensors_kind("a recording", "headscope-recording").matches(Path("no such file"))
    False
    """
    return FileKind(name, lambda path: _safetensors_format(path) == file_format)


def kind_by_start(name: str, start: bytes) -> FileKind:
    """The files that have these bytes near their start."""
    return FileKind(name, lambda path: start in _first_bytes(path))


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(1000)
    except OSError:
        return b""


def _safetensors_format(path: Path) -> str | None:
    """The format in a file's header; None if there is none. The tensors may be cut short."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if size <= path.stat().st_size else {}
        return str(header["__metadata__"]["format"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def output_path(
    path: Path,
    kind: FileKind | None = None,
    *,
    force: bool = False,
    error: type[HeadscopeError] = HeadscopeError,
) -> Path:
    """The file that is written for ``path``: itself, or the target of a link. Call it before long work.

    Args:
        path: Where a file is to be written.
        kind: What is written; None: whatever is there may be overwritten.
        force: Whether a file of another kind may be overwritten.
        error: The class of the error.

    Raises:
        HeadscopeError: It is no regular file, holds something of another kind, or cannot be written; as ``error``.
    """
    target = Path(os.path.realpath(path))
    try:
        status = path.stat()
    except FileNotFoundError:
        status = None
    except OSError as reason:
        raise error(f"Cannot write {path}: {reason.strerror}.") from None
    if status is None and not target.parent.is_dir():
        raise error(f"Cannot write {path}: there is no folder {target.parent}. Make it, or choose another.")
    if status is not None:
        _check_replaceable(path, status, kind, force, error)
    if not os.access(target.parent, os.W_OK):
        raise error(f"Cannot write {path}: no permission to write in {target.parent}. Choose another folder.")
    return target


def _check_replaceable(
    path: Path, status: os.stat_result, kind: FileKind | None, force: bool, error: type[HeadscopeError]
) -> None:
    """Raise unless what is there may be overwritten."""
    if stat.S_ISDIR(status.st_mode):
        raise error(f"Cannot write {path}: it is a folder. Give the name of a file.")
    if not stat.S_ISREG(status.st_mode):
        raise error(f"Cannot write {path}: it is a device, a pipe or a socket. Give the name of a file.")
    if not os.access(path, os.W_OK):
        raise error(f"Cannot write {path}: it is write-protected. Choose another name.")
    if kind is not None and not force and status.st_size and not kind.matches(path):
        raise error(
            f"Cannot write {path}: the file that is there is not {kind.name}. Choose another name, or overwrite it: "
            "--force, in Python force=True."
        )


@contextmanager
def whole_file(
    path: Path,
    kind: FileKind | None = None,
    *,
    force: bool = False,
    error: type[HeadscopeError] = HeadscopeError,
) -> Iterator[Path]:
    """A temporary name with the suffix of ``path``, which becomes ``path`` once it is on the disk.

    If the block fails, or the machine does, ``path`` is what it was before. A new file has the mode that the umask
    gives, an overwritten one keeps its own. The arguments are those of `output_path`.

    Raises:
        HeadscopeError: The file cannot be written; as ``error``.
    """
    target = output_path(path, kind, force=force, error=error)
    scratch = target.with_name(f".{target.stem}.{os.getpid()}.part{path.suffix}")
    try:
        scratch.unlink(missing_ok=True)
        os.close(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        mode = stat.S_IMODE((target if target.exists() else scratch).stat().st_mode)
        yield scratch
        scratch.chmod(mode)  # a writer may have made a private file of it
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(scratch, target)
        if os.name == "posix":  # the new name, too, must be on the disk
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, SafetensorError) as reason:
        raise error(f"Cannot write {path}: {getattr(reason, 'strerror', None) or reason}.") from reason
    finally:
        scratch.unlink(missing_ok=True)
