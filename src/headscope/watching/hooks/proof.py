"""The proof of a call: P @ V is rebuilt for four rows and compared with what the model returned, head by head.

How far they may differ follows from rounding: scores, weights and outputs are rounded in proportion to their sizes, and
these errors add up like independent ones. This is counted for each head by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headscope.errors import ProofError
from headscope.ops.kernels.fused import weighted_values
from headscope.ops.scores import Scores
from headscope.watching.hooks.call import Output

_ROWS = 4
_SPREADS = 4.0  # a sum of independent errors stays below this many roots of the sum of their squares
_KERNEL = 2.0**-17  # relative error of exponentials and sums in a kernel: torch's vectorised exp has 20 bits
_FINISHED = 2.0**-14  # relative error of float32 layers that follow; those in half precision round 16 times
_HIDES = 1e30  # numbers of this size in a mask hide a key; they are no part of a score


@dataclass(frozen=True, eq=False)
class Proved:
    """A reading of a call, and how closely it explains the call's output; None: no row could be compared."""

    scores: Scores
    difference: float | None
    rounded_difference: float | None  # with scores rounded to half precision; None: the call is in single precision
    logsumexp: Tensor | None  # [B, H, L], where it is proved too


@dataclass(frozen=True, eq=False)
class _Rebuilt:
    """Head outputs [N, H, Dv] of the compared rows, how far off they may be and the size of their terms [N, H]."""

    heads: Tensor
    tolerance: Tensor
    size: Tensor


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
    best: tuple[float, float, Scores] | None = None
    for scores in candidates:
        compared = choose_rows(scores, valid)
        rounded = None if _is_single(scores.query.dtype) else _difference(scores, value, output, compared, rounds=True)
        known = logsumexp is not None and not bool(logsumexp.transpose(1, 2)[compared].isnan().all())
        for lse in [logsumexp, None] if known else [None]:
            exact = _difference(scores, value, output, compared, lse)
            if exact is None:
                return Proved(scores, None, None, None)
            for difference, tolerance in (exact,) if rounded is None else (exact, rounded):
                if difference <= tolerance:
                    return Proved(scores, exact[0], None if rounded is None else rounded[0], lse)
                if best is None or difference < best[0]:
                    best = difference, tolerance, scores
    assert best is not None  # every way in offers at least one reading
    raise ProofError(
        f"{where}: softmax of its queries and keys, times its values, differs by {best[0]:.2g} from what its own "
        f"function returned (tolerance {best[1]:.0e}, {best[2].query.dtype}). "
        "Its attention does something that Headscope does not understand, so no weights are shown."
    )


def _difference(
    scores: Scores,
    value: Tensor,
    output: Output,
    compared: tuple[Tensor, Tensor],
    logsumexp: Tensor | None = None,
    rounds: bool = False,
) -> tuple[float, float] | None:
    """The largest difference over the ``compared`` rows and heads, and how large it may be, both relative to its head.

    Where a head differs by more than it may, it is that head's. ``rounds``: of scores rounded to half precision. None
    if there is nothing to compare: rows without visible keys, rows that are NaN both here and there, scores beyond the
    range of their dtype.
    """
    if not len(compared[0]):
        return None
    texts, counts = (part.tolist() for part in compared[0].unique_consecutive(return_counts=True))
    parts = []
    for b, rows in zip(texts, compared[1].split(counts), strict=True):
        lse = None if logsumexp is None else logsumexp[b, :, rows]
        parts.append(_of_text(scores, value, b, rows, lse, rounds, output.heads is None))
    rebuilt = _Rebuilt(*(torch.cat([getattr(part, name) for part in parts]) for name in ("heads", "tolerance", "size")))
    differences = _differences(output, rebuilt.heads, compared, value.dtype)
    if differences is None or (not bool(differences.isfinite().all()) and _is_out_of_range(scores)):
        return None  # a training that diverged: kernels treat infinite numbers differently
    tolerance, size = _of_output(rebuilt, output, compared, value.dtype)
    finite = (tolerance + size).isfinite()  # values that are not make outputs that are not, here and there
    if not bool(finite.any()):
        return None
    relative, allowed = (differences / size)[finite].nan_to_num(torch.inf), (tolerance / size)[finite]
    wrong = relative > allowed
    worst = int(torch.where(wrong, relative, -1).argmax()) if bool(wrong.any()) else int(relative.argmax())
    return float(relative[worst]), float(allowed[worst])


def _of_text(
    scores: Scores, value: Tensor, b: int, rows: Tensor, logsumexp: Tensor | None, rounds: bool, recomputed: bool
) -> _Rebuilt:
    """Some rows [n] of one text. ``logsumexp`` [H, n]; ``recomputed``: operands that the model computed itself, too."""
    own, unit = value[b], _unit(scores.query.dtype)
    with torch.autocast(scores.query.device.type, enabled=False):
        x = _rounded_rows(scores, b, rows) if rounds else scores.rows(b, rows)  # [H, n, S]
        if logsumexp is None or bool(logsumexp.isnan().any()):
            logsumexp = _logsumexp(x, scores.sinks)
        weights = (x - logsumexp.unsqueeze(-1)).exp()
        weights = weights.to(scores.query.dtype).to(x.dtype) if rounds else weights
        heads = weighted_values(weights.unsqueeze(0), own.unsqueeze(0))[0]
        value_norms = torch.linalg.vector_norm(own, dim=-1, dtype=x.dtype)  # [G, S]
        along = heads.reshape(len(own), -1, heads.shape[-1]) @ own.to(x.dtype).transpose(1, 2)
        norms = value_norms.repeat_interleave(len(x) // len(own), 0).unsqueeze(1)  # [H, 1, S]
        length = torch.linalg.vector_norm(heads, dim=-1)
        apart = (norms.square() - 2 * along.view(x.shape) + length.square().unsqueeze(-1)).clamp(min=0)
        error = _score_errors(scores, x, b, rows, rounds, recomputed).clamp(max=30).expm1()
        spread = weights.square() * (error.square() * apart + (unit * norms).square())
        size = (weights * norms).sum(-1)
        tolerance = _SPREADS * spread.sum(-1).sqrt() + (_KERNEL + unit) * size
        tolerance = tolerance + _SPREADS * _unit(x.dtype) * logsumexp.abs() * length
    return _Rebuilt(*(part.transpose(0, 1) for part in (heads, tolerance, size.clamp(min=1e-30))))


def _score_errors(scores: Scores, x: Tensor, b: int, rows: Tensor, rounds: bool, recomputed: bool) -> Tensor:
    """How far each score [H, n, S] may be off: as a number in float32 or one rounded in another order; as a product."""
    magnitude = x.abs()
    if scores.bias is not None:
        magnitude = magnitude + _added(scores, b, rows).abs()
    magnitude = magnitude.masked_fill(~(magnitude < _HIDES), 0)
    if scores.sinks is not None:
        magnitude = magnitude + magnitude.amax(-1, keepdim=True)  # the maximum is subtracted in the model's dtype
    query = torch.linalg.vector_norm(scores.query[b][:, rows.to(x.device)], dim=-1, dtype=x.dtype)  # [H, n]
    key = torch.linalg.vector_norm(scores.key[b], dim=-1, dtype=x.dtype)  # [G, S]
    products = abs(scores.scale) * query.unsqueeze(-1) * key.repeat_interleave(scores.per_group, 0).unsqueeze(1)
    reduced = scores.query.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    of_product = 2.0**-9 if reduced else 4 * _unit(torch.float32)
    if recomputed:
        of_product += 4 * _unit(scores.query.dtype) / math.sqrt(scores.query.shape[-1])
    of_number = _unit(scores.query.dtype) / 2 if rounds else _unit(torch.float32)
    return of_number * magnitude + of_product * products


def _rounded_rows(scores: Scores, b: int, rows: Tensor) -> Tensor:
    """Scores as eager attention has them in half precision, rounded after each step; in float32."""
    dtype = scores.query.dtype
    products = replace(scores, scale=1.0, softcap=None, bias=None, mask=None).rows(b, rows).to(dtype)
    return (scores.capped(products * scores.scale) + _added(scores, b, rows).to(dtype)).float()


def _added(scores: Scores, b: int, rows: Tensor) -> Tensor:
    """What is added to the products of some rows: bias, and −inf where hidden."""
    nothing = scores.query.new_zeros(()).expand(scores.query.shape)
    return replace(scores, query=nothing).rows(b, rows)


def _logsumexp(x: Tensor, sinks: Tensor | None) -> Tensor:
    """Of rows [H, n, S], with a sink [H] in the denominator if there is one."""
    logsumexp = x.logsumexp(-1)
    return logsumexp if sinks is None else torch.logaddexp(logsumexp, sinks.to(x.dtype).unsqueeze(-1))


def _is_single(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.float64)


def _unit(dtype: torch.dtype) -> float:
    """The relative error of one rounding; of float64 that of float32, in which some functions take the softmax."""
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) / 2


def _differences(output: Output, heads: Tensor, compared: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor | None:
    """Norms of the differences from what was returned: [N, H], or [N, 1] where it mixes heads; None: all are NaN."""
    wanted = output.rows(*compared).float()
    got = output.finish(heads.to(dtype), *compared).float()
    both = wanted.isnan() & got.isnan()
    if bool(both.all()):
        return None
    difference = (wanted - got).masked_fill(both, 0)
    return torch.linalg.vector_norm(difference.view(len(heads), -1, difference.shape[-1]), dim=-1)


def _of_output(
    rebuilt: _Rebuilt, output: Output, compared: tuple[Tensor, Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Tolerance and size of what the function returns: the heads' own, or [N, 1] where it mixes heads."""
    if output.heads is not None:
        return rebuilt.tolerance, rebuilt.size
    heads = rebuilt.heads
    rows, num_heads, width = heads.shape
    direction = torch.randn(width, generator=torch.Generator().manual_seed(0)).to(heads)
    shifts = (rebuilt.tolerance / direction.norm()).unsqueeze(-1) * direction  # [N, H, Dv]
    shifted = heads + torch.eye(num_heads).to(heads)[:, None, :, None] * shifts  # [H, N, H, Dv]: one head each
    whole = output.finish(heads.to(dtype), *compared).float()
    parts = output.finish(shifted.flatten(0, 1).to(dtype), *(index.repeat(num_heads) for index in compared)).float()
    effects = torch.linalg.vector_norm(parts.view(num_heads, rows, -1) - whole, dim=-1)
    size = torch.linalg.vector_norm(output.rows(*compared).float(), dim=-1).clamp(min=1e-30)
    after = _FINISHED if _is_single(dtype) else 16 * _unit(dtype)
    tolerance = 2 * effects.square().sum(0).sqrt() + after * size
    return tolerance.unsqueeze(-1), size.unsqueeze(-1)


def _is_out_of_range(scores: Scores) -> bool:
    """Whether products of queries and keys may be NaN, or too large for their dtype."""
    norms = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64).max() for x in (scores.query, scores.key)]
    return not float(norms[0] * norms[1]) * max(1.0, abs(scores.scale)) < torch.finfo(scores.query.dtype).max


def choose_rows(scores: Scores, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Up to four (batch row, query row) pairs that are text and have a visible key."""
    batch, _, queries, keys = scores.shape
    picked: list[tuple[int, int]] = []
    rows_each = max(1, _ROWS // max(1, batch))
    for b in sorted({0, batch - 1}) if 0 < batch < _ROWS else range(0, batch, math.ceil(batch / _ROWS) or 1):
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
