"""Where a command's text comes from: its argument, a file, or another program that feeds this one."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from headscope.errors import TextError
from headscope.files import decode_text, read_text, unix_lines


def text_of(argument: str | None, file: Path | None, default: str) -> str:
    """The text of a file, of the argument or of the pipe, which "-" stands for; else the default text.

    Raises:
        TextError: It cannot be read, or is not UTF-8 text.
    """
    if file is not None:
        return read_text(file)
    if argument == "-" or (argument is None and is_piped()):
        return read_pipe()
    return default if argument is None else unix_lines(argument_text(argument))


def argument_text(argument: str) -> str:
    """An argument of the command, in UTF-8 also where the locale has another encoding.

    Raises:
        TextError: It is text neither in UTF-8 nor in the encoding of the locale.
    """
    if not any("\udc80" <= character <= "\udcff" for character in argument):
        return argument
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:
        encoding = sys.getfilesystemencoding()
        raise TextError(
            f"An argument is neither UTF-8 nor {encoding}, the encoding of this locale. Put the text into a file, in "
            "UTF-8, and give the file."
        ) from None


def is_piped() -> bool:
    """Whether another program or a file feeds this one; a terminal or the null device does not."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def read_pipe() -> str:
    """All of it, by the rule of :func:`headscope.files.decode_text`, whatever the locale says.

    Raises:
        TextError: It is not UTF-8 text.
    """
    return decode_text(sys.stdin.buffer.read(), "What came through the pipe")
