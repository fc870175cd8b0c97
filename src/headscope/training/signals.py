"""Ctrl-C and a scheduler's SIGTERM: the step that is under way is finished first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from types import FrameType

__all__ = ["StopFlag", "Stopped", "stop_signals"]

_SAME = 1.0  # seconds within which two signals are one Ctrl-C: from the terminal, and from torchrun that had it too


class Stopped(KeyboardInterrupt):
    """A run was stopped between two steps.

    Attributes:
        step: Steps done.
        path: The checkpoint that was saved; None if the run has no folder.
    """

    def __init__(self, step: int, path: Path | None) -> None:
        super().__init__(f"stopped after step {step}")
        self.step, self.path = step, path


class StopFlag:
    """Whether somebody asked to stop."""

    def __init__(self) -> None:
        self.asked = False
        self.since = 0.0  # when, by the clock of time.monotonic


@contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """A flag that the first Ctrl-C or SIGTERM in the block sets; a second Ctrl-C interrupts as usual.

    Outside the main thread, which alone receives signals, the flag stays as it is.
    """
    flag = StopFlag()

    def ask(number: int, frame: FrameType | None) -> None:
        if flag.asked and number == signal.SIGINT and monotonic() - flag.since > _SAME:
            raise KeyboardInterrupt
        if not flag.asked:
            flag.asked, flag.since = True, monotonic()

    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
