"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from headscope.errors import HeadscopeError

__all__ = ["check_writable", "whole_file"]


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
