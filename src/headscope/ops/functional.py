"""attention(), the function: softmax(QKᵀ·scale + bias) V without building the matrix."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from headscope.ops.kernels.fused import product
from headscope.ops.masks import Mask
from headscope.ops.positions import Alibi
from headscope.ops.scores import as_value, make_scores


def attention(
    query: Float[Tensor, "B H L D"],
    key: Float[Tensor, "B G S D"],
    value: Float[Tensor, "B G S Dv"],
    *,
    mask: Mask | Tensor | None = None,
    bias: Tensor | Alibi | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Float[Tensor, "B H L Dv"]:
    """Scaled dot-product attention (arXiv 1706.03762), softmax(QKᵀ·scale + bias) V, without building the matrix.

    Args:
        query: one query for each of the last L positions, H heads of size D.
        key: S keys, G heads; H is a multiple of G (grouped-query attention, arXiv 2305.13245).
        value: S values of any width, G heads.
        mask: who may see whom, see :mod:`headscope.masks`; a bool tensor means ``masks.dense`` (True: may
            attend). A query that may attend to nothing gives zeros, with zero gradient.
        bias: added to the scores, [L, S] or 4-D broadcastable to [B, H, L, S], or ``positions.alibi(slopes)``.
        scale: 1/√D by default.
        dropout_p: share of the weights that are dropped, from 0 to below 1.

    Raises:
        ValueError: operands that do not fit each other.

    Example:
        >>> import torch, headscope
        >>> q, k, v = (
        ...     torch.randn(1, 8, 16, 64),
        ...     torch.randn(1, 2, 16, 64),
        ...     torch.randn(1, 2, 16, 64),
        ... )
        >>> headscope.attention(q, k, v, mask=headscope.masks.causal()).shape
        torch.Size([1, 8, 16, 64])
    """
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is {dropout_p}: a share of the weights, from 0 to below 1.")
    scores = make_scores(query, key, mask, bias, scale)
    return product(scores, as_value(value, scores, "value"), dropout_p)
