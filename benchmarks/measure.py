"""Timing side by side, peak memory, and the table that a benchmark writes."""

from __future__ import annotations

import gc
import math
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Seconds of one piece of work over several rounds."""

    median: float
    spread: float  # (largest − smallest) ÷ median
    taken: tuple[float, ...]  # one a round

    def over(self, other: Timing) -> float:
        """How many times the other: the median over the rounds, so that a slow minute counts on both sides."""
        return statistics.median(self._ratios(other))

    def between(self, other: Timing) -> tuple[float, float]:
        """The quartiles of the rounds' ratios: half of the rounds lie between."""
        low, _, high = statistics.quantiles(self._ratios(other), n=4, method="inclusive")
        return low, high

    def _ratios(self, other: Timing) -> list[float]:
        return [a / b for a, b in zip(self.taken, other.taken, strict=True)]


def side_by_side(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Time several pieces of work in turn, so that a slow minute of the machine meets all of them; a single round
    is not warmed up: for work so long that it does not matter.
    """
    times = {name: _times(action) if rounds > 1 else 1 for name, action in work.items()}
    taken: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        gc.collect()
        for name, action in work.items():
            start = time.perf_counter()
            for _ in range(times[name]):
                action()
            taken[name].append((time.perf_counter() - start) / times[name])
    return {
        name: Timing(statistics.median(t), (max(t) - min(t)) / statistics.median(t), tuple(t))
        for name, t in taken.items()
    }


def _times(action: Callable[[], object]) -> int:
    """How often to do a piece of work in a round, so that a round takes some hundredths of a second; warms it up."""
    start = time.perf_counter()
    action()
    if time.perf_counter() - start > 1:
        return 1
    start = time.perf_counter()
    action()
    return max(1, math.ceil(0.03 / (time.perf_counter() - start)))


def peak_memory() -> float:
    """The most memory this process ever held, in MB (on macOS the kernel counts in bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if platform.system() == "Darwin" else peak / 1e3


def machine() -> str:
    """What the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{cpu}, {torch.get_num_threads()} threads, {capability}; torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.system()}; {datetime.now(UTC):%Y-%m-%d}"
    )


def write(name: str, title: str, header: Sequence[str], rows: Sequence[Sequence[str]], notes: str) -> None:
    """Print a table and write it to results/<name>.md."""
    lines = [f"# {title}", "", machine(), "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    text = "\n".join([*lines, "", notes, ""])
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)
    print(text)
