"""Text that another program, or a file, feeds to this one."""

from __future__ import annotations

import os
import stat
import sys

from headscope.errors import TextError

__all__ = ["is_piped", "read_pipe"]


def is_piped() -> bool:
    """Whether another program or a file feeds this one; a terminal or the null device does not."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def read_pipe() -> str:
    """All of it, in UTF-8 whatever the locale says; a byte order mark at its start is left out.

    Raises:
        TextError: It is not UTF-8.
    """
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"What came through the pipe is not UTF-8 text: byte {error.start}.") from None
