"""TensorBoard logs of a run; the package `tensorboard` is optional (`pip install 'headscope[train]'`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from headscope.errors import optional_imports


def has_tensorboard() -> bool:
    """Whether the package is installed."""
    return find_spec("tensorboard") is not None


@contextmanager
def tensorboard(folder: Path) -> Iterator[Callable[[str, float, int], None]]:
    """A function that writes (name, value, step) into TensorBoard's files in ``folder``.

    A resumed run replaces the values of the steps that it repeats.

    Raises:
        MissingExtra: The package `tensorboard` is not installed.
    """
    with optional_imports("train", "TensorBoard logs"):
        from torch.utils.tensorboard import SummaryWriter

    writers: list[Any] = []

    def log(name: str, value: float, step: int) -> None:
        if not writers:
            writers.append(SummaryWriter(str(folder), purge_step=step))
        writers[0].add_scalar(name, value, step)

    try:
        yield log
    finally:
        for writer in writers:
            writer.close()
