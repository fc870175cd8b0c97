"""One attention module, forward and forward + backward, beside its peers of the same sizes; every line a ratio.

Peers: nn.MultiheadAttention with and without weights, the article's code, x-transformers with flash. Limit: the matrix
products alone at the rate that this machine reaches in one large product, in float32 where that is the faster one.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import Timing, side_by_side, write
from torch import Tensor, nn
from x_transformers.x_transformers import Attention as XAttention

from headscope import MultiHeadAttention

EMBED, HEADS = 512, 8
LARGE = 2048  # rows, columns and depth of the product that shows the machine's peak
LIMIT = "limit: the products alone at the machine's peak"
SIZES = ((1, 16), (32, 64), (8, 512), (1, 2048), (1, 8192))
Work = Callable[[Tensor], Tensor]


class Article(nn.Module):
    """What the article's reader types in: four maps, heads side by side, the matrix built."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(EMBED, EMBED) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Self-attention."""
        size = EMBED // HEADS
        q, k, v = (m(x).view(len(x), -1, HEADS, size).transpose(1, 2) for m in self.linears[:3])
        weights = (q @ k.transpose(-2, -1) / math.sqrt(size)).softmax(-1)
        return self.linears[3]((weights @ v).transpose(1, 2).reshape(x.shape))


def modules(dtype: torch.dtype) -> dict[str, Work]:
    """The peers, in evaluation mode: no dropout anywhere."""
    ours, article = MultiHeadAttention(EMBED, HEADS), Article()
    theirs = nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
    flash = XAttention(dim=EMBED, heads=HEADS, dim_head=EMBED // HEADS, flash=True)
    for module in (ours, article, theirs, flash):
        module.to(dtype).eval()
    return {
        "headscope": ours,
        "nn.MultiheadAttention": lambda x: theirs(x, x, x, need_weights=False)[0],
        "nn.MultiheadAttention, weights": lambda x: theirs(x, x, x, need_weights=True)[0],
        "the article's code": article,
        "x-transformers, flash": lambda x: flash(x),
    }


def limit(product: Timing, batch: int, length: int, backward: bool) -> Timing:
    """The time of the matrix products alone at the rate of one large ``product``, round by round.

    The four maps, and each head's scores and sums; a backward pass needs each of them twice more.
    """
    rows = batch * length
    work = 2 * rows * EMBED * (4 * EMBED + 2 * length) * (3 if backward else 1)
    share = work / (2 * LARGE**3)
    return Timing(product.median * share, product.spread, tuple(t * share for t in product.taken))


def fastest(dtype: torch.dtype) -> torch.dtype:
    """The one in which this machine multiplies faster, ``dtype`` or float32: bfloat16 may be emulated."""
    square = torch.randn(512, 512)
    kinds = {str(kind): square.to(kind) for kind in (torch.float32, dtype)}
    times = side_by_side({name: lambda x=x: x @ x for name, x in kinds.items()}, 3)
    return kinds[min(times, key=lambda name: times[name].median)].dtype


def rows_for(batch: int, length: int, dtype: torch.dtype, backward: bool, rounds: int) -> list[list[str]]:
    """One line a peer."""
    torch.manual_seed(0)
    x = torch.randn(batch, length, EMBED, dtype=dtype, requires_grad=backward)
    work: dict[str, Callable[[], object]] = {}
    for name, module in modules(dtype).items():
        if length >= 8192 and ("weights" in name or "article" in name):
            continue  # 2 GiB and more of matrix

        def forward(module: Work = module) -> object:
            if not backward:
                with torch.no_grad():
                    return module(x)
            module(x).sum().backward()
            return None

        work[name] = forward
    left, right = torch.randn(2, LARGE, LARGE).to(fastest(dtype))
    work[LIMIT] = lambda: F.linear(left, right)
    times = side_by_side(work, rounds)
    times[LIMIT] = limit(times[LIMIT], batch, length, backward)
    ours = times["headscope"]
    kind = "forward + backward" if backward else "forward"
    return [
        [f"{batch} × {length}", kind, name, f"{t.median * 1e3:.2f} ms", f"{ours.over(t):.2f}"]
        for name, t in times.items()
    ]


def main() -> None:
    """All sizes, a table for each precision (or of the one that is named); written anew after each size."""
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        if not sys.argv[1:] or name in sys.argv:
            one_precision(dtype, name)


def one_precision(dtype: torch.dtype, name: str) -> None:
    """Its table."""
    rows: list[list[str]] = []
    for backward in (False, True):
        for batch, length in SIZES:
            work = batch * length * (length + 2000) * (1 if dtype == torch.float32 else 8)
            rounds = 15 if work < 2e7 else 5 if work < 6e7 else 3 if work < 1e8 else 1
            rows += rows_for(batch, length, dtype, backward, rounds)
            write(
                f"module_{name}",
                f"Self-attention, embed_dim {EMBED}, {HEADS} heads, {name}",
                ("batch × length", "what", "whose", "time", "headscope ÷ it"),
                rows,
                "Below 1 in the last column: headscope is faster. Medians of rounds in which all lines ran in "
                "turn (of the longest in bfloat16 a single one); the ratio is the median of the rounds' ratios. No "
                f"mask, no dropout, evaluation mode. Limit: the flops of the four maps, the scores and the sums (three "
                f"times with backward), at the rate of one {LARGE} × {LARGE} × {LARGE} product of the same rounds, "
                f"by the library that is faster here, in {str(fastest(dtype)).removeprefix('torch.')}.",
            )


if __name__ == "__main__":
    main()
