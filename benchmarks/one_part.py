"""One 256 × 256 part of one head at 32,768 tokens: first, and again. A built matrix would take 4 GiB a head."""

from __future__ import annotations

import statistics
import time

import torch
from measure import write

from headscope import AttentionMatrix, masks

LENGTH, SIZE = 32_768, 64


def looks(rounds: int) -> dict[str, list[float]]:
    """Seconds of the first look at a part, of one at the part beside it, of a second look at that, and of a third."""
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, LENGTH, SIZE), torch.randn(1, 1, LENGTH, SIZE)
    names = ("first", "the part beside it", "again", "and again")
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        matrix = AttentionMatrix(query, key, mask=masks.causal())
        for name, left in zip(names, (20_000, 20_256, 20_256, 20_256), strict=True):
            start = time.perf_counter()
            matrix[0, 0, 32_000:32_256, left : left + 256]
            found[name].append(time.perf_counter() - start)
    return found


if __name__ == "__main__":
    with torch.no_grad():
        found = looks(30)
        limit_query, limit_key = torch.randn(256, SIZE), torch.randn(SIZE, LENGTH)
        products = []
        for _ in range(30):
            start = time.perf_counter()
            limit_query @ limit_key
            products.append(time.perf_counter() - start)
    limit = statistics.median(products)
    rows = [
        [name, f"{statistics.median(t) * 1e3:.3f} ms", f"{min(t) * 1e3:.3f} ms", f"{statistics.median(t) / limit:.2f}"]
        for name, t in (*found.items(), ("limit: the matrix product 256 × 32,768 alone", products))
    ]
    write(
        "one_part",
        "One 256 × 256 part of one head at 32,768 tokens",
        ("look", "median", "fastest", "÷ limit of the first"),
        rows,
        "The first look sums its 256 rows over all the keys they may see; the part beside it knows these sums, and the "
        "last part is kept. The limit writes its product into fresh memory. Causal, head size 64, float32. The whole "
        "head as a matrix would take 4 GiB.",
    )
