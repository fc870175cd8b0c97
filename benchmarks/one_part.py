"""One 256 × 256 part of one head at 32,768 tokens: first, and again. A built matrix would take 4 GiB a head."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from measure import write
from torch import nn

from headscope import AttentionMatrix, masks, record

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

    class Forward(nn.Module):
        def forward(self) -> torch.Tensor:
            return F.scaled_dot_product_attention(query, key, key, is_causal=True)

    with record(model := Forward()) as recording:
        model()

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
        for whose, looked_at in (("recorded", recording.calls[0].matrix()), ("nothing known", matrix)):
            for name, left in (
                ("first look", 20_000),
                ("the part beside it", 20_256),
                ("again", 20_256),
                ("and again", 20_256),
            ):
                part = (0, 0, slice(32_000, 32_256), slice(left, left + ROWS))
                timed(f"{whose}: {name}", partial(looked_at.__getitem__, part))
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
        "A recording has the rows' sums from the model's own kernel. A matrix of which nothing is known sums its 256 "
        "rows over all the keys they may see: its first look cannot be quicker than the product of these rows with "
        "these keys. The part beside it knows these sums, and the last part is kept. "
        "Causal, head size 64, float32, in turns. The whole head as a matrix would take 4 GiB.",
    )
