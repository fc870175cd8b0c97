"""AttentionMatrix: attention weights as an operator, computed when you ask, never stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.ops.kernels.blockwise import stream
from headscope.ops.kernels.differentiable import by_rows
from headscope.ops.kernels.fused import fused_product_with_logsumexp, is_fused, product
from headscope.ops.kernels.indexing import PartReader
from headscope.ops.masks import Mask
from headscope.ops.positions import Alibi
from headscope.ops.reductions import (
    Entropy,
    Groups,
    Max,
    Offsets,
    Pool,
    Received,
    Reduction,
    TopK,
    TransposedProduct,
    WeightsAt,
    check_reductions,
)
from headscope.ops.scores import Normalizer, Scores, as_value, make_scores
from headscope.ops.sizes import format_bytes, parse_bytes


class AttentionMatrix:
    """P = softmax(QKᵀ·scale + bias), hidden where the mask says so: [B, H, L, S], computed when you ask, never stored.

    It keeps the query and the key. ``P @ value`` is computed by the fused kernel; ``P.entropy()``, ``P.max()``,
    ``P.topk(k)``, ``P.received()`` … in one blockwise pass; ``P[index]`` from the rows and keys that it names.
    Weights are before dropout, float32 (float64 for float64 inputs).

    Args:
        query: [B, H, L, D]; key: [B, G, S, D] with H a multiple of G.
        mask, bias, scale: as for :func:`headscope.attention`.
        softcap: c for models that cap scores, s → c·tanh(s/c), before the bias (arXiv 2408.00118).
        sinks: [H], an extra logit per head in the denominator; rows then sum to less than 1.

    Raises:
        ValueError: operands that do not fit; NaN or infinite operands, at the first answer other than ``P @ value``.

    Example:
        >>> import torch, headscope
        >>> q, k = torch.randn(1, 8, 100_000, 64), torch.randn(1, 2, 100_000, 64)
        >>> P = headscope.AttentionMatrix(q, k, mask=headscope.masks.causal())
        >>> P[0, 3, 99_000:99_002, :5].shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        query: Float[Tensor, "B H L D"],
        key: Float[Tensor, "B G S D"],
        *,
        mask: Mask | Tensor | None = None,
        bias: Tensor | Alibi | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        self._init(make_scores(query, key, mask, bias, scale, softcap, sinks))

    @classmethod
    def _from_scores(cls, scores: Scores, logsumexp: Float[Tensor, "B H L"] | None = None) -> AttentionMatrix:
        """From checked scores and, where it is known, the log-sum-exp of each row; NaN marks rows to compute."""
        matrix = cls.__new__(cls)
        matrix._init(scores, logsumexp)
        return matrix

    def _init(self, scores: Scores, logsumexp: Tensor | None = None) -> None:
        self._scores = scores
        self._kernel_logsumexp = logsumexp  # not yet known to be exact enough
        self._normalizer: Normalizer | None = None
        self._reader: PartReader | None = None
        self._checked = False

    @property
    def shape(self) -> torch.Size:
        """(B, H, L, S)."""
        return torch.Size(self._scores.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self._scores.dtype

    @property
    def device(self) -> torch.device:
        """Device of the operands and of the answers."""
        return self._scores.query.device

    @property
    def operands(self) -> Scores:
        """The query, key, mask, bias, scale, softcap and sinks."""
        return self._scores

    def __matmul__(self, value: Tensor) -> Tensor:
        """P @ value → [B, H, L, N]; value is [S], [S, N], [B|1, 1|G|H, S, N]. Differentiable.

        A value is not rounded to the precision of a half-precision query, nor by autocast.
        """
        scores = self._scores.at_least(value.dtype)
        flat = value.dim() == 1
        value_4d = as_value(value[:, None] if flat else value, scores, "P @ value")
        with torch.autocast(self.device.type, enabled=False):
            if is_fused(scores) and self._kernel_logsumexp is None and not self._checked:
                output, self._kernel_logsumexp = fused_product_with_logsumexp(scores, value_4d)
            else:
                output = product(scores, value_4d)
        return output.squeeze(-1) if flat else output

    @property
    def T(self) -> _Transposed:
        """Pᵀ, for ``P.T @ x``."""
        return _Transposed(self)

    def __getitem__(self, index: Any) -> Tensor:
        """``P.dense()[index]``, computed for that part only.

        Raises:
            ValueError: bool masks and None. IndexError: positions that do not exist.
        """
        self._check()
        self._reader = self._reader or PartReader(self._scores, self._normalizer)
        return self._reader[index]

    @property
    def logsumexp(self) -> Float[Tensor, "B H L"]:
        """Log Σ_j exp(s_ij) of each row, with the bias and the sink; −inf where nothing is visible."""
        return self._get_normalizer().logsumexp

    @overload
    def reduce(self, *reductions: Reduction) -> tuple[Any, ...]: ...

    @overload
    def reduce(self, reductions: Mapping[str, Reduction], /) -> dict[str, Any]: ...

    def reduce(self, *reductions: Any) -> tuple[Any, ...] | dict[str, Any]:
        """The results of several reductions from one pass over the weights; see headscope.reductions.

        They come in order, or under the names of a mapping: ``P.reduce({"entropy": Entropy(), "max": Max()})``.
        """
        if len(reductions) == 1 and isinstance(reductions[0], Mapping):
            named = reductions[0]
            return dict(zip(named, self.reduce(*named.values()), strict=True))
        if not reductions:
            raise ValueError("reduce() got no reductions: pass some, such as Entropy(), Max().")
        check_reductions(reductions)
        self._check()
        results, self._normalizer = stream(self._scores, reductions, self._normalizer)
        return tuple(results)

    def entropy(self) -> Float[Tensor, "B H L"]:
        """−Σ_j P_ij ln P_ij in nats (arXiv 1906.04341). Differentiable, first order."""
        if not self._needs_grad():
            return self._one(Entropy())
        self._check()
        return torch.cat(list(by_rows(self._scores, _entropy_of_rows)), 2)

    def max(self) -> WeightsAt:
        """The largest weight of each row and its key: values and indices [B, H, L]; −1 for an empty row."""
        return self._one(Max())

    def topk(self, k: int) -> WeightsAt:
        """The k largest weights of each row and their keys: [B, H, L, k], largest first; −1 past the visible keys."""
        return self._one(TopK(k))

    def received(self, *, mean: bool = False) -> Float[Tensor, "B H S"]:
        """Σ_i P_ij, the weight that each key receives; ``mean``: ÷ the queries that may see it (arXiv 2306.14048)."""
        return self._one(Received(mean))

    def offsets(self, radius: int) -> Float[Tensor, "B H L O"]:
        """P[i, i+δ] for δ = −radius … radius; −1 is the previous token, 0 itself."""
        return self._one(Offsets(radius))

    def groups(self, ids: Int[Tensor, ...]) -> Float[Tensor, "B H L N"]:
        """The weight on groups of keys; ``ids`` [S] or [B, S] from 0, −1 for none."""
        return self._one(Groups(ids))

    def pool(
        self,
        rows: Tensor | int,
        cols: Tensor | int,
        how: Literal["mean", "max", "mass"] = "mean",
    ) -> Float[Tensor, "B H R C"]:
        """A smaller map; ``rows`` and ``cols`` are group ids (−1: left out) or a number of equal bins.

        "mass" sums over a group's keys and averages over its queries: from tokens to words (arXiv 1906.04341).
        """
        return self._one(Pool(rows, cols, how))

    def dense(self, *, limit: int | str = "1 GiB") -> Float[Tensor, "B H L S"]:
        """The matrix as a tensor. Raises ValueError above ``limit`` (bytes, or text such as "4 GiB")."""
        size = self._num_bytes()
        if size > parse_bytes(limit):
            raise ValueError(
                f"the dense matrix {tuple(self.shape)} would take {format_bytes(size)}, the limit is {limit}. "
                "Ask for a part, P[0, 8, 100:200, :50], for P.topk(k), or for a smaller map, P.pool(64, 64); "
                "or raise limit=."
            )
        return self[:]

    def __repr__(self) -> str:
        extras = [f"mask={self._scores.mask!r}"]
        extras += [name for name in ("bias", "softcap", "sinks") if getattr(self._scores, name) is not None]
        return (
            f"AttentionMatrix(shape={tuple(self.shape)}, {', '.join(extras)}; {self._product_kernel()} kernel; "
            f"{format_bytes(self._num_bytes())} if dense)"
        )

    def _product_kernel(self) -> str:
        """The kernel of P @ value; a softcap, sinks or a trained bias need one with rows of weights."""
        return "fused" if is_fused(self._scores) else "rowwise"

    def _one(self, reduction: Reduction) -> Any:
        return self.reduce(reduction)[0]

    def _get_normalizer(self) -> Normalizer:
        self._check()
        if self._normalizer is None:
            _, self._normalizer = stream(self._scores, [])
        return self._normalizer

    def _needs_grad(self) -> bool:
        operands = (self._scores.query, self._scores.key, self._scores.bias, self._scores.sinks)
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)

    def _check(self) -> None:
        """Check the operands, and use a kernel's log-sum-exp where it is as exact as our own: scores fit float32."""
        if self._checked:
            return
        self._scores, self._checked = self._scores.checked(), True
        if self._kernel_logsumexp is None or self._scores.wide:
            return
        normalizer, self._kernel_logsumexp = Normalizer.from_logsumexp(self._kernel_logsumexp), None
        if bool(normalizer.shift.isnan().any()):
            self._reader = PartReader(self._scores, normalizer)
        else:
            self._normalizer = normalizer

    def _num_bytes(self) -> int:
        return math.prod(self.shape) * (8 if self.dtype == torch.float64 else 4)


class _Transposed:
    """Pᵀ as an operator, [B, H, S, L]."""

    def __init__(self, matrix: AttentionMatrix) -> None:
        self._matrix = matrix

    @property
    def shape(self) -> torch.Size:
        """(B, H, S, L)."""
        batch, heads, queries, keys = self._matrix.shape
        return torch.Size((batch, heads, keys, queries))

    @property
    def T(self) -> AttentionMatrix:
        """P."""
        return self._matrix

    def __matmul__(self, x: Tensor) -> Tensor:
        """Pᵀ @ x → [B, H, S, N]; x is [L], [L, N] or [B|1, H|1, L, N]. Differentiable."""
        scores = self._matrix.operands
        flat = x.dim() == 1
        batch, heads, queries, _ = scores.shape
        x_4d = x[:, None] if flat else x
        x_4d = x_4d[None, None] if x_4d.dim() == 2 else x_4d
        if x_4d.dim() != 4 or x_4d.shape[0] not in (1, batch) or x_4d.shape[1] not in (1, heads):
            raise ValueError(f"P.T @ x: x has shape {tuple(x.shape)}, wanted [{queries}], [{queries}, N] or 4-D.")
        if x_4d.shape[2] != queries:
            raise ValueError(f"P.T @ x: x has {x_4d.shape[2]} rows, but P has {queries} queries.")
        if not x_4d.is_floating_point():
            raise ValueError(f"P.T @ x: x is {x.dtype}, wanted floating point: convert it with .float().")
        x_4d = x_4d.expand(batch, heads, -1, -1)
        if self._matrix._needs_grad() or (torch.is_grad_enabled() and x.requires_grad):
            output = self._differentiable(x_4d)
        else:
            output = self._matrix._one(TransposedProduct(x_4d)).to(x.dtype)
        return output.squeeze(-1) if flat else output

    def _differentiable(self, x: Tensor) -> Tensor:
        self._matrix._check()
        parts = by_rows(self._matrix.operands, _transposed_product_of_rows, x)
        total = next(parts)
        for part in parts:
            total = total + part
        return total.to(x.dtype)


def _entropy_of_rows(weights: Tensor, log_weights: Tensor, _: slice) -> Tensor:
    return -(weights * log_weights).sum(-1)


def _transposed_product_of_rows(weights: Tensor, _: Tensor, rows: slice, x: Tensor) -> Tensor:
    return weights.transpose(-1, -2) @ x[:, :, rows].to(weights.dtype)
