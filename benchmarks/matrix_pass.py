"""What questions to the attention matrix cost, as a multiple of the fused forward; every ratio includes it.

Peer: the same forward and the same answers from a matrix that is built. Limit: the products and exp alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from measure import Timing, side_by_side, write
from torch import Tensor

from headscope import AttentionMatrix, masks
from headscope.ops.reductions import Entropy, Max, Received, Reduction, TopK

HEADS, GROUPS, SIZE = 9, 3, 64


def rows_for(length: int, rounds: int) -> list[list[str]]:
    """Measure one length."""
    torch.manual_seed(0)
    query = torch.randn(1, HEADS, length, SIZE)
    key, value = torch.randn(1, GROUPS, length, SIZE), torch.randn(1, GROUPS, length, SIZE)

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    def ours(*questions: Reduction) -> object:
        matrix = AttentionMatrix(query, key, mask=masks.causal())
        return matrix @ value, matrix.reduce(*questions)

    def built(top: int) -> object:
        keys, values = key.repeat_interleave(3, 1), value.repeat_interleave(3, 1)
        scores = query @ keys.transpose(-1, -2) * SIZE**-0.5
        scores.masked_fill_(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
        weights = scores.softmax(-1)
        answers = [-torch.xlogy(weights, weights).sum(-1), weights.max(-1), weights.sum(-2)]
        return weights @ values, answers, weights.topk(top, -1) if top else None

    room = torch.empty(HEADS // GROUPS * 128 * length)

    def limit() -> None:
        forward()
        for group in range(GROUPS):
            heads = slice(group * HEADS // GROUPS, (group + 1) * HEADS // GROUPS)
            for stop in range(128, length + 1, 128):
                rows = query[0, heads, stop - 128 : stop].flatten(0, 1)
                out = room[: len(rows) * stop].view(len(rows), stop)
                torch.mm(rows, key[0, group, :stop].T, out=out).exp_()

    work = {
        "fused forward": forward,
        "limit: + QKᵀ and exp of what is visible, nothing else": limit,
        "+ entropy, max, received": lambda: ours(Entropy(), Max(), Received()),
        "+ entropy, max, received, top-5": lambda: ours(Entropy(), Max(), Received(), TopK(5)),
        "matrix built: entropy, max, received": lambda: built(0),
        "matrix built: and top-5": lambda: built(5),
    }
    times = side_by_side(work, rounds)
    base = times["fused forward"]
    return [[str(length), name, *_cells(time, base)] for name, time in times.items()]


def _cells(time: Timing, base: Timing) -> list[str]:
    return [f"{time.median * 1e3:.0f} ms", f"±{time.spread / 2:.0%}", f"{time.over(base):.2f}"]


if __name__ == "__main__":
    with torch.no_grad():
        table = rows_for(2048, 9) + rows_for(8192, 3)
    write(
        "matrix_pass",
        "Questions to the attention matrix, ÷ fused forward",
        ("length", "work", "time", "spread", "÷ fused forward"),
        table,
        f"{HEADS} heads, {GROUPS} key/value heads of size {SIZE}, causal, float32, batch 1. Each line includes the "
        "forward. Medians of rounds in which all lines ran in turn; the ratio is the median of the rounds' ratios.",
    )
