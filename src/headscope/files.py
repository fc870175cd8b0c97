"""Files: bytes that become text by one rule, and files that appear whole or not at all."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    """Bytes in UTF-8 as text: without a byte order mark at the start, and each line ends with a line feed.

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


def unix_lines(text: str) -> str:
    r"""The text with a line feed in place of each CR LF and each CR alone.

    >>> unix_lines("one\r\ntwo\rthree")
    'one\ntwo\nthree'
    """
    return text.replace("\r\n", "\n").replace("\r", "\n")


def check_writable(path: Path, error: type[HeadscopeError] = HeadscopeError) -> None:
    """Raise unless a file can be written; call it before long work.

    Raises:
        HeadscopeError: No such folder, no permission, or a folder of that name; as ``error``.
    """
    if path.is_dir():
        raise error(f"Cannot write {path}: it is a folder. Give the name of a file.")
    if not path.parent.is_dir():
        raise error(f"Cannot write {path}: there is no folder {path.parent}. Make it, or choose another.")
    if not os.access(path.parent, os.W_OK):
        raise error(f"Cannot write {path}: no permission to write in {path.parent}. Choose another folder.")


@contextmanager
def whole_file(path: Path, error: type[HeadscopeError] = HeadscopeError) -> Iterator[Path]:
    """A temporary name beside ``path`` with its suffix, which becomes ``path`` once it is on the disk.

    If the block fails, or the machine does, ``path`` is what it was before.

    Raises:
        HeadscopeError: The file cannot be written; as ``error``.
    """
    check_writable(path, error)
    scratch = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield scratch
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)
        if os.name == "posix":  # the new name, too, must be on the disk
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, SafetensorError) as reason:
        raise error(f"Cannot write {path}: {getattr(reason, 'strerror', None) or reason}.") from reason
    finally:
        scratch.unlink(missing_ok=True)
