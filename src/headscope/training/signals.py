"""Ctrl-C and a scheduler's SIGTERM, which stop a run after the current step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from types import FrameType

_SAME = 1.0  # seconds within which two signals are one Ctrl-C: from the terminal, and passed on by torchrun


class Stopped(KeyboardInterrupt):
    """A run was stopped between two steps.

    Attributes:
        step: Steps done.
        path: The last checkpoint; None if the run has no folder.
    """

    def __init__(self, step: int, path: Path | None) -> None:
        super().__init__(f"stopped after step {step}")
        self.step, self.path = step, path


class StopFlag:
    """Whether a signal to stop was received."""

    def __init__(self) -> None:
        self.is_set = False
        self.since = 0.0  # of time.monotonic


@contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """A flag that the first Ctrl-C or SIGTERM in the block sets; a second Ctrl-C interrupts as usual.

    Only the main thread receives signals; in other threads the flag stays unset.
    """
    flag = StopFlag()

    def set_flag(number: int, frame: FrameType | None) -> None:
        if flag.is_set and number == signal.SIGINT and monotonic() - flag.since > _SAME:
            raise KeyboardInterrupt
        if not flag.is_set:
            flag.is_set, flag.since = True, monotonic()

    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {number: signal.signal(number, set_flag) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
