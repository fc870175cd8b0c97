"""The definition of attention by brute force, in float64: every answer is compared with it.

Nothing of headscope is used here. Masks are bool tensors, and every formula is written as in the article.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FINFO_MIN = torch.finfo(torch.float32).min


def operands(
    batch: int = 2,
    kv_heads: int = 3,
    shared: int = 2,
    queries: int = 7,
    keys: int = 11,
    size: int = 5,
    width: int = 4,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, no two axes equal."""
    query = torch.randn(batch, kv_heads * shared, queries, size).to(dtype)
    key = torch.randn(batch, kv_heads, keys, size).to(dtype)
    return query, key, torch.randn(batch, kv_heads, keys, width).to(dtype)


def for_each_head(per_group: Tensor, heads: int) -> Tensor:
    """Key/value head g belongs to the query heads g·n … g·n + n − 1, n = H ÷ G."""
    n = heads // per_group.shape[1]
    return torch.stack([per_group[:, h // n] for h in range(heads)], 1)


def scores(
    query: Tensor,
    key: Tensor,
    *,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """s = Q Kᵀ · scale, capped, plus the bias; −inf where hidden: [B, H, L, S]."""
    query, key = query.double(), for_each_head(key.double(), query.shape[1])
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    s = torch.einsum("bhld,bhsd->bhls", query, key) * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias.double()
    return s if visible is None else torch.where(visible, s, -math.inf)


def logsumexp(s: Tensor, sinks: Tensor | None = None) -> Tensor:
    """The logarithm of each row's denominator; −inf where nothing is visible and there is no sink."""
    if sinks is not None:
        column = sinks.double().view(1, -1, 1, 1).expand(s.shape[0], -1, s.shape[2], 1)
        s = torch.cat([s, column], -1)
    return torch.logsumexp(s, -1)


def weights(query: Tensor, key: Tensor, *, sinks: Tensor | None = None, **options: object) -> Tensor:
    """P = softmax(s); a sink takes its share and is not a column; an empty row is zeros."""
    s = scores(query, key, **options)
    if sinks is not None:
        column = sinks.double().view(1, -1, 1, 1).expand(s.shape[0], -1, s.shape[2], 1)
        s = torch.cat([s, column], -1)
    p = torch.softmax(s, -1).nan_to_num(nan=0.0)
    return p if sinks is None else p[..., :-1]


def attend(p: Tensor, value: Tensor) -> Tensor:
    return p @ for_each_head(value.double(), p.shape[1])


def entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(-1)


def topk(p: Tensor, visible: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest visible weights of each row and their keys; weight 0 and key −1 past the visible."""
    ordered = torch.where(visible.expand(p.shape), p, -1.0).sort(dim=-1, descending=True, stable=True)
    missing = ordered.values[..., :k] < 0
    return ordered.values[..., :k].masked_fill(missing, 0), ordered.indices[..., :k].masked_fill(missing, -1)


def received(p: Tensor, visible: Tensor | None = None) -> Tensor:
    """Column sums; with ``visible`` ÷ the number of queries that may see the key."""
    sums = p.sum(-2)
    return sums if visible is None else sums / visible.expand(p.shape).sum(-2).clamp(min=1)


def offsets(p: Tensor, radius: int) -> Tensor:
    """P[i, i+δ], where query row i stands at position S − L + i."""
    queries, keys = p.shape[2:]
    out = p.new_zeros(*p.shape[:3], 2 * radius + 1)
    for row in range(queries):
        for n, delta in enumerate(range(-radius, radius + 1)):
            key = keys - queries + row + delta
            if 0 <= key < keys:
                out[:, :, row, n] = p[:, :, row, key]
    return out


def groups(p: Tensor, ids: Tensor, count: int) -> Tensor:
    """The weight on each group of keys; ids [S] or [B, S]."""
    out = p.new_zeros(*p.shape[:3], count)
    ids = ids.expand(p.shape[0], -1)
    for b in range(p.shape[0]):
        for group in range(count):
            out[b, ..., group] = p[b][..., ids[b] == group].sum(-1)
    return out


def bins(count: int, size: int) -> Tensor:
    """Group ids of even bins."""
    count = min(count, size)
    return torch.tensor([i * count // size for i in range(size)])


def pool(p: Tensor, rows: Tensor, cols: Tensor, how: str) -> Tensor:
    """One number for each cell of row group × column group; ids [L] or [B, L], [S] or [B, S]."""
    rows, cols = rows.expand(p.shape[0], -1), cols.expand(p.shape[0], -1)
    out = p.new_zeros(*p.shape[:2], int(rows.max()) + 1, int(cols.max()) + 1)
    for b in range(p.shape[0]):
        for r in range(out.shape[2]):
            for c in range(out.shape[3]):
                part = p[b][:, rows[b] == r][:, :, cols[b] == c]
                if part.numel():
                    out[b, :, r, c] = _pooled(part, how)
    return out


def _pooled(part: Tensor, how: str) -> Tensor:
    if how == "max":
        return part.amax((-2, -1))
    return part.mean((-2, -1)) if how == "mean" else part.sum(-1).mean(-1)


def visible_where(
    rule: Callable[[int, int, int, int], bool],
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    origin: int | None = None,
) -> Tensor:
    """A mask from a rule for each cell; the queries are the last of the key positions."""
    first = keys - queries if origin is None else origin
    cells = [
        [[[rule(b, h, first + i, j) for j in range(keys)] for i in range(queries)] for h in range(heads)]
        for b in range(batch)
    ]
    return torch.tensor(cells, dtype=torch.bool).view(batch, heads, queries, keys)


def all_in(lengths: Sequence[int]) -> Callable[[int, int, int, int], bool]:
    """The rule of right padding."""
    return lambda b, h, i, j: j < lengths[b]
