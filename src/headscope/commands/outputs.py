"""The files that a command writes, checked before the work: none is an input, and none is written twice."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from headscope.errors import HeadscopeError
from headscope.files import FileKind, output_path

Force = Annotated[
    bool, typer.Option("--force", help="Overwrite files of another kind, too; never an input of the command.")
]

_STREAMS = {"stdin": "the standard input", "stdout": "the standard output", "stderr": "the error stream"}


class Output(NamedTuple):
    """A file that a command writes: the option that names it, its path, and what it will be."""

    option: str
    path: Path | None
    kind: FileKind


def figure_output(path: Path | None) -> list[Output]:
    """The output of --figure, if there is one.

    Raises:
        ValueError: Its name has another extension.
    """
    if path is None:
        return []
    from headscope.views.figures.file import figure_kind

    return [Output("--figure", path, figure_kind(path))]


def check_outputs(outputs: Sequence[Output], inputs: Iterable[Path | None], *, force: bool) -> None:
    """Raise an error if an output cannot be written, is an input, or is another output.

    Args:
        outputs: The outputs; those without a path are left out.
        inputs: The files that the command reads; of a folder, all that is in it.
        force: Whether files of another kind may be overwritten.

    Raises:
        HeadscopeError: An output is an input, another output, no regular file, or a file of another kind.
    """
    taken = dict(_streams())
    read = {_identity(file): file for path in inputs if path is not None for file in _files_of(path)}
    for option, path, kind in outputs:
        if path is None:
            continue
        identity = _identity(path)
        if identity in read:
            raise HeadscopeError(f"{option} {path} would overwrite {read[identity]}, which is read. Give another name.")
        if identity in taken:
            raise HeadscopeError(f"{option} {path} is also {taken[identity]}. Give another name.")
        taken[identity] = option
        output_path(path, kind, force=force)


def _identity(path: Path) -> tuple[object, ...]:
    """What is the same for two paths of one file, also through links; where there is no file, its whole name."""
    try:
        return _of_file(path.stat())
    except OSError:
        return (os.path.normcase(os.path.realpath(path)),)


def _of_file(status: os.stat_result) -> tuple[object, ...]:
    return status.st_dev, status.st_ino


def _files_of(path: Path) -> Iterator[Path]:
    yield path
    if path.is_dir():
        yield from (file for file in path.rglob("*") if file.is_file())


def _streams() -> Iterator[tuple[tuple[object, ...], str]]:
    """Those standard streams that a shell's `<` or `>` has made files."""
    for name, description in _STREAMS.items():
        try:
            status = os.fstat(getattr(sys, name).fileno())
        except (OSError, ValueError, AttributeError):
            continue
        if stat.S_ISREG(status.st_mode):
            yield _of_file(status), description
