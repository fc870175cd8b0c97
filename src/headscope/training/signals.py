"""Ctrl-C and a scheduler's SIGTERM: the step that is under way is finished first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

__all__ = ["StopFlag", "Stopped", "stop_signals"]


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


@contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """A flag that the first Ctrl-C or SIGTERM in the block sets; a second Ctrl-C interrupts as usual.

    Outside the main thread, which alone receives signals, the flag stays as it is.
    """
    flag = StopFlag()

    def ask(number: int, frame: FrameType | None) -> None:
        if flag.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        flag.asked = True

    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
