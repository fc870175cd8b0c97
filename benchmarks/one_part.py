"""One 256 × 256 part of one head at 32,768 tokens: first, and again. A built matrix would take 4 GiB a head."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from measure import write

from headscope import AttentionMatrix, masks

LENGTH, SIZE, ROWS, BLOCK = 32_768, 64, 256, 1024


def looks(rounds: int) -> dict[str, list[float]]:
    """Seconds of the looks at parts, and of the products that the first of them cannot do without."""
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, LENGTH, SIZE), torch.randn(1, 1, LENGTH, SIZE)
    rows, room = query[0, 0, -ROWS:] / SIZE**0.5, torch.empty(ROWS, BLOCK)

    def in_blocks(summed: bool) -> None:
        total = torch.zeros(ROWS)
        for start in range(0, LENGTH, BLOCK):
            torch.mm(rows, key[0, 0, start : start + BLOCK].T, out=room)
            if summed:
                total += room.exp_().sum(1)

    found: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        start = time.perf_counter()
        work()
        found.setdefault(name, []).append(time.perf_counter() - start)

    for _ in range(rounds):
        timed("limit: the matrix product 256 × 32,768 × 64 alone, in blocks into used memory", lambda: in_blocks(False))
        timed("the same, each block's exp summed", lambda: in_blocks(True))
        timed("the matrix product alone, into fresh memory", lambda: rows @ key[0, 0].T)
        matrix = AttentionMatrix(query, key, mask=masks.causal())
        for name, left in (
            ("first look", 20_000),
            ("the part beside it", 20_256),
            ("again", 20_256),
            ("and again", 20_256),
        ):
            timed(name, partial(matrix.__getitem__, (0, 0, slice(32_000, 32_256), slice(left, left + ROWS))))
    return found


if __name__ == "__main__":
    with torch.no_grad():
        found = looks(30)
    limit = statistics.median(next(iter(found.values())))
    rows = [
        [name, f"{statistics.median(t) * 1e3:.3f} ms", f"{min(t) * 1e3:.3f} ms", f"{statistics.median(t) / limit:.3f}"]
        for name, t in found.items()
    ]
    write(
        "one_part",
        "One 256 × 256 part of one head at 32,768 tokens",
        ("look", "median", "fastest", "÷ limit"),
        rows,
        "The first look sums its 256 rows over all the keys they may see: it cannot be quicker than the product of "
        "these rows with these keys. The part beside it knows these sums, and the last part is kept. "
        "Causal, head size 64, float32, in turns. The whole head as a matrix would take 4 GiB.",
    )
