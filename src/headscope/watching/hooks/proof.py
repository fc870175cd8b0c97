"""The proof of a call: P @ V is rebuilt for four rows and compared with what the model returned."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from headscope.errors import ProofError
from headscope.ops.kernels.fused import product_by_rows, weighted_values
from headscope.ops.scores import Scores
from headscope.watching.hooks.call import Output


@dataclass(frozen=True, eq=False)
class Proved:
    """A reading of a call, and how closely it explains the call's output; None: no row could be compared."""

    scores: Scores
    difference: float | None
    logsumexp: Tensor | None  # [B, H, L], where it is proved too


TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_ROWS = 4


def prove(
    where: str,
    candidates: Iterable[Scores],
    value: Tensor,
    output: Output,
    valid: Tensor | None,
    logsumexp: Tensor | None = None,
) -> Proved:
    """The first reading of a call that explains its output.

    ``logsumexp`` [B, H, L], as the model's kernel gave it, is part of a reading: each is tried with it first, if it is
    known for a row that is compared, and then without.

    Raises:
        ProofError: no reading does: the call has a cap, a sink, a mask or a bias that is not understood.
    """
    best: tuple[float, Scores] | None = None
    for scores in candidates:
        batch, row = choose_rows(scores, valid)
        known = logsumexp is not None and not bool(logsumexp.transpose(1, 2)[batch, row].isnan().all())
        for lse in [logsumexp, None] if known else [None]:
            difference = _difference(scores, value, output, (batch, row), lse)
            if difference is None:
                return Proved(scores, None, None)
            if difference <= TOLERANCE.get(scores.query.dtype, 1e-4):
                return Proved(scores, difference, lse)
            if best is None or difference < best[0]:
                best = difference, scores
    assert best is not None  # every way in offers at least one reading
    scores = best[1]
    raise ProofError(
        f"{where}: softmax of its queries and keys, times its values, differs by {best[0]:.2g} from what its own "
        f"function returned (tolerance {TOLERANCE.get(scores.query.dtype, 1e-4):.0e}, {scores.query.dtype}). "
        "Its attention does something that Headscope does not understand, so no weights are shown."
    )


def _difference(
    scores: Scores, value: Tensor, output: Output, compared: tuple[Tensor, Tensor], logsumexp: Tensor | None
) -> float | None:
    """Largest difference over the ``compared`` rows, relative to the largest number there.

    None if there is nothing to compare: rows without visible keys, rows that are NaN both here and there, queries and
    keys that are not finite.
    """
    batch, row = compared
    if not len(batch):
        return None
    texts, counts = (part.tolist() for part in batch.unique_consecutive(return_counts=True))
    rows = zip(texts, row.split(counts), strict=True)
    rebuilt = torch.cat([_head_outputs(scores, value, b, of_text, logsumexp) for b, of_text in rows])
    wanted = output.rows(batch, row).float()
    got = output.finish(rebuilt.to(value.dtype), batch, row).float()
    if not bool(got.isfinite().all()) and not bool(scores.query.isfinite().all() & scores.key.isfinite().all()):
        return None  # a training that diverged; kernels treat NaN differently
    both = ~(wanted.isnan() & got.isnan())
    wanted, got = wanted[both], got[both]
    if not len(wanted):
        return None
    scale = wanted.abs().max().clamp(min=1e-6)
    difference = float((wanted - got).abs().max() / scale)
    return math.inf if math.isnan(difference) else difference


def _head_outputs(scores: Scores, value: Tensor, b: int, rows: Tensor, logsumexp: Tensor | None) -> Tensor:
    """P @ V of some rows [n] of one text, [n, H, Dv]."""
    own = value[b : b + 1]
    known = None if logsumexp is None else logsumexp[b, :, rows]
    if known is None or bool(known.isnan().any()):
        parts = [scores.narrow(slice(b, b + 1), slice(0, scores.shape[1]), slice(r, r + 1)) for r in rows.tolist()]
        return torch.cat([product_by_rows(part, own)[:, :, 0] for part in parts])
    with torch.autocast(scores.query.device.type, enabled=False):
        weights = (scores.rows(b, rows) - known.unsqueeze(-1)).exp()
    return weighted_values(weights.unsqueeze(0), own)[0].transpose(0, 1)


def choose_rows(scores: Scores, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Up to four (batch row, query row) pairs that are text and have a visible key."""
    batch, _, queries, keys = scores.shape
    picked: list[tuple[int, int]] = []
    rows_each = max(1, _ROWS // batch)
    for b in sorted({0, batch - 1}) if batch < _ROWS else range(0, batch, math.ceil(batch / _ROWS)):
        rows = _valid_rows(valid, b, batch, queries, keys, scores.origin[2])
        if rows is None:
            rows = list(range(queries))
        wanted = [rows[-1], rows[len(rows) // 2], rows[0], rows[len(rows) // 3]] if rows else []
        for r in list(dict.fromkeys(wanted))[:rows_each]:
            if _has_visible_key(scores, b, r):
                picked.append((b, r))
    pairs = torch.tensor(picked[:_ROWS], dtype=torch.int64).view(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _valid_rows(valid: Tensor | None, b: int, batch: int, queries: int, keys: int, first: int) -> list[int] | None:
    if valid is None or valid.dim() != 2 or valid.shape[0] != batch:
        return None
    if valid.shape[1] == queries:
        rows = valid[b]
    elif valid.shape[1] > queries and queries <= keys:
        rows = valid[b, -queries:]  # the queries are the last of the positions so far
    else:
        return None
    return [int(i) for i in rows.nonzero().flatten().tolist()]


def _has_visible_key(scores: Scores, b: int, r: int) -> bool:
    part = scores.narrow(slice(b, b + 1), slice(0, scores.shape[1]), slice(r, r + 1))
    visible = torch.ones(1, dtype=torch.bool)
    if scores.mask is not None:
        visible = part.visible(slice(0, 1), slice(0, scores.shape[1]), slice(0, 1), slice(0, scores.shape[3]))
    bias = part.bias_tensor
    if bias is not None:
        visible = visible & (bias > -torch.inf)
    return bool(visible.any(-1).all())
