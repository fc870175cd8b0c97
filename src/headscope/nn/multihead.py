"""MultiHeadAttention: project → position → cache → attend → project (arXiv 1706.03762)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headscope.nn import weights as layouts
from headscope.nn.cache import KVCache
from headscope.ops.kernels.fused import product
from headscope.ops.masks import Mask, shifted, sliding_window
from headscope.ops.matrix import AttentionMatrix
from headscope.ops.positions import Alibi, Rotary
from headscope.ops.scores import Scores, checked_mask

_NORM_EPS = 1e-6  # as in the models whose weights may be loaded
_LONG = 2048  # positions from which a copy with each head contiguous is faster, see docs/log.md


class MultiHeadAttention(nn.Module):
    """Multi-head attention: input projections, :func:`headscope.attention` per head, output projection.

    ``query`` attends to itself (self-attention), or to ``key`` and ``value`` (cross-attention). A query that may attend
    to no key has the head output zero.

    Args:
        embed_dim: E, the width of the input and the output.
        num_heads: H, query heads.
        num_kv_heads: G, key/value heads, each shared by H / G query heads (arXiv 2305.13245); H by default.
        head_dim: D; E / H by default.
        kdim: the width of ``key``; E by default.
        vdim: the width of ``value``; E by default.
        bias: whether the four projections have a bias.
        dropout_p: the share of attention weights that are dropped in training.
        position: ``positions.rotary()``, ``positions.alibi(slopes)`` or None. Sinusoidal positions are added to the
            input instead.
        qk_norm: whether queries and keys are RMS-normalised per head (arXiv 2302.05442).
        packed: whether one map, ``in_proj``, gives queries, keys and values: faster in self-attention. It is called
            whole for each different input, so that cross-attention is cheaper with False: three maps ``q_proj``,
            ``k_proj``, ``v_proj``, which inputs of different widths have anyway.

    Raises:
        ValueError: sizes that do not fit each other.

    Example:
        >>> import torch, headscope
        >>> layer = MultiHeadAttention(512, 8)
        >>> x = torch.randn(2, 10, 512)
        >>> layer(x, mask=headscope.masks.causal()).shape
        torch.Size([2, 10, 512])
        >>> layer.matrix(x).entropy().shape  # of each of the 8 heads' rows
        torch.Size([2, 8, 10])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        kdim: int | None = None,
        vdim: int | None = None,
        bias: bool = True,
        dropout_p: float = 0.0,
        position: Rotary | Alibi | None = None,
        qk_norm: bool = False,
        packed: bool = True,
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = embed_dim // max(num_heads, 1) if head_dim is None else head_dim
        self.kdim, self.vdim = kdim or embed_dim, vdim or embed_dim
        self.dropout_p, self.position = dropout_p, position
        self.is_cross = False  # whether the last call was cross-attention; hooks read it
        _check_sizes(self, divides=head_dim is None)
        wide, narrow = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.packed = packed and self.kdim == self.vdim == embed_dim
        if self.packed:
            self.in_proj = nn.Linear(embed_dim, wide + 2 * narrow, bias)  # queries, keys and values in one product
        else:
            self.q_proj = nn.Linear(embed_dim, wide, bias)
            self.k_proj, self.v_proj = nn.Linear(self.kdim, narrow, bias), nn.Linear(self.vdim, narrow, bias)
        self.out_proj = nn.Linear(wide, embed_dim, bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=_NORM_EPS) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=_NORM_EPS) if qk_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise each projection with Xavier's uniform distribution for its size, biases with 0, norms with 1."""
        weights = layouts.projection_weights(self)
        for name, tensor in weights.items():
            weights[name] = tensor.new_zeros(tensor.shape)
            if name.endswith("weight"):
                nn.init.xavier_uniform_(weights[name])
        layouts.set_weights(self, weights)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()

    def forward(
        self,
        query: Float[Tensor, "B L E"],
        key: Float[Tensor, "B S K"] | None = None,
        value: Float[Tensor, "B S V"] | None = None,
        *,
        mask: Mask | Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "B L E"]:
        """The attention output for each position of ``query``.

        Args:
            query: [B, L, E]
            key: [B, S, kdim], of another sequence; None (or the query itself) for self-attention.
            value: [B, S, vdim]; the key by default.
            mask: which query may attend to which key (True), see :mod:`headscope.masks`. Queries are the last L
                positions. Keys count from the first position of the text, also where a cache has dropped it.
            cache: keys and values of earlier positions.

        Raises:
            ValueError: shapes that do not fit; see :class:`headscope.KVCache` for the cache's.
        """
        if key is query and (value is None or value is query):
            key = value = None  # torch's way to write self-attention
        _check_inputs(self, query, key, value)
        cached = 0 if cache is None else cache.length
        keys = cached + query.shape[1] if key is None else key.shape[1]
        visible = checked_mask(mask, (query.shape[0], self.num_heads, query.shape[1], keys))
        q, k, v = self._heads(query, key, value, cache)
        if key is None and cache is not None and cache.window is not None:
            window = sliding_window(cache.window - 1)
            visible = window if visible is None else window & shifted(visible, keys, k.shape[2])
        head_outputs = product(self._scores(q, k, visible), v, self.dropout_p if self.training else 0.0)
        return self.out_proj(head_outputs.transpose(1, 2).flatten(2))

    def matrix(
        self,
        query: Float[Tensor, "B L E"],
        key: Float[Tensor, "B S K"] | None = None,
        *,
        mask: Mask | Tensor | None = None,
    ) -> AttentionMatrix:
        """The attention matrix [B, H, L, S] of :meth:`forward`, before dropout; computed when you ask, never stored.

        Raises:
            ValueError: shapes that do not fit.
        """
        key = None if key is query else key
        _check_inputs(self, query, key, None if self.vdim != self.kdim else key, matrix=True)
        q, k = self._project(query, query if key is None else key)
        q, k = self._positioned(q, self.q_norm), self._positioned(k, self.k_norm)
        bias = self.position if isinstance(self.position, Alibi) else None
        return AttentionMatrix(q, k, mask=mask, bias=bias)

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention) -> MultiHeadAttention:
        """A module with a copy of the weights of torch's module; always batch first.

        Raises:
            ValueError: add_bias_kv or add_zero_attn, which add keys without a position.
        """
        return layouts.from_torch(cls, module)

    def to_torch(self) -> nn.MultiheadAttention:
        """Torch's module with a copy of the weights (batch_first=True).

        Raises:
            ValueError: grouped heads, another head size, positions or norms, which torch's module does not have.
        """
        return layouts.to_torch(self)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy weights under another library's names: torch's, the article's ``linears.0…3``, ``q_proj … o_proj``.

        With ``qk_norm`` they must contain ``q_norm`` and ``k_norm`` as well.

        Raises:
            ValueError: names of an unknown layout, shapes that do not fit, or weights that this module does not have.
        """
        layouts.load_weights(self, weights)

    def weights_as(self, layout: str) -> dict[str, Tensor]:
        """The weights under the names of ``layout``: "torch", "linears" or "huggingface".

        Raises:
            ValueError: an unknown layout, or one without names for this module's weights.
        """
        return layouts.weights_as(self, layout)

    def extra_repr(self) -> str:
        """Sizes for print(module)."""
        shared = f" sharing {self.num_kv_heads}" if self.num_kv_heads != self.num_heads else ""
        extras = f", {self.position!r}" if isinstance(self.position, Rotary) else ""
        extras += ", alibi" if isinstance(self.position, Alibi) else ""
        return f"{self.num_heads} heads of {self.head_dim}{shared}{extras}, dropout_p={self.dropout_p}"

    def _heads(
        self, query: Tensor, key: Tensor | None, value: Tensor | None, cache: KVCache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, L, D], keys and values [B, G, S, D], with positions and the cached keys and values."""
        across = key is not None and key is not query
        if across is not self.is_cross:
            self.is_cross = across
        if key is not None:
            return self._cross_heads(query, key, key if value is None else value, cache)
        q, k, v = self._project(query, query, query)
        first = 0 if cache is None else cache.length
        q, k = self._positioned(q, self.q_norm, first), self._positioned(k, self.k_norm, first)
        return (q, k, v) if cache is None else (q, *cache.append(self, k, v))

    def _cross_heads(
        self, query: Tensor, key: Tensor, value: Tensor, cache: KVCache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        cached = None if cache is None else cache.source(self, key)
        if cached is not None:
            (q,) = self._project(query)
            return self._positioned(q, self.q_norm), *cached
        q, k, v = self._project(query, key, value)
        q, k = self._positioned(q, self.q_norm), self._positioned(k, self.k_norm)
        if cache is not None:
            cache.store_source(self, k, v)
        return q, k, v

    def _positioned(self, x: Tensor, norm: nn.Module | None, first: int = 0) -> Tensor:
        """Queries or keys, normalised, and rotated for positions from ``first`` on."""
        x = x if norm is None else norm(x)
        return self.position.rotate(x, first) if isinstance(self.position, Rotary) else x

    def _project(self, *inputs: Tensor) -> list[Tensor]:
        """Queries [B, H, L, D] of the first input, keys [B, G, S, D] of the second, values of the third.

        A map's weights are used only by calling it, so that adapters, hooks and quantised layers see every use. The
        packed one is called once for each different input.
        """
        if not self.packed:
            maps = (self.q_proj, self.k_proj, self.v_proj)
            return [self._split(linear(x)) for linear, x in zip(maps, inputs, strict=False)]
        parts: list[tuple[Tensor, ...]] = []
        for i, x in enumerate(inputs):
            same = next((j for j in range(i) if inputs[j] is x), None)
            parts.append(self._packed_heads(x) if same is None else parts[same])
        return [part[i] for i, part in enumerate(parts)]

    def _packed_heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of one input."""
        heads = self._split(self.in_proj(x))
        if heads.shape[2] >= _LONG:
            heads = heads.contiguous()  # the kernel reads a head's keys many times
        return torch.split_with_sizes(heads, (self.num_heads, self.num_kv_heads, self.num_kv_heads), 1)

    def _split(self, x: Tensor) -> Tensor:
        """[B, L, n·D] as [B, n, L, D]."""
        return x.view(*x.shape[:2], x.shape[2] // self.head_dim, self.head_dim).transpose(1, 2)

    def _scores(self, q: Tensor, k: Tensor, visible: Mask | None) -> Scores:
        """Scores as in :func:`headscope.attention`, without its checks: the shapes fit."""
        bias = self.position if isinstance(self.position, Alibi) else None
        return Scores(q, k, visible, bias, self.head_dim**-0.5, None, None, (0, 0, k.shape[2] - q.shape[2]))


def _check_sizes(module: MultiHeadAttention, divides: bool) -> None:
    m = module
    if m.embed_dim < 1 or m.num_heads < 1 or m.head_dim < 1:
        swapped = f"MultiHeadAttention({m.num_heads}, {m.embed_dim})"
        reason = f"were they swapped? {swapped}" if m.num_heads > m.embed_dim > 0 else "all are at least 1"
        raise ValueError(f"embed_dim {m.embed_dim}, num_heads {m.num_heads}, head_dim {m.head_dim}: {reason}.")
    if divides and m.embed_dim % m.num_heads:
        raise ValueError(
            f"embed_dim {m.embed_dim} cannot be cut into {m.num_heads} heads: make it a multiple, or give head_dim."
        )
    if m.num_kv_heads < 1 or m.num_heads % m.num_kv_heads:
        raise ValueError(
            f"{m.num_heads} query heads cannot share {m.num_kv_heads} key/value heads evenly: "
            "num_heads must be a multiple of num_kv_heads."
        )
    if not 0 <= m.dropout_p < 1:
        raise ValueError(f"dropout_p is {m.dropout_p}: the share of dropped weights must be at least 0 and below 1.")
    if isinstance(m.position, Rotary):
        m.position.frequencies(m.head_dim)
    elif isinstance(m.position, Alibi):
        if len(m.position.slopes) != m.num_heads:
            raise ValueError(f"alibi has {len(m.position.slopes)} slopes, but there are {m.num_heads} heads.")
    elif m.position is not None:
        raise ValueError(f"position is {m.position!r}: give positions.rotary(), positions.alibi(slopes) or None.")


def _check_inputs(
    module: MultiHeadAttention, query: Tensor, key: Tensor | None, value: Tensor | None, matrix: bool = False
) -> None:
    for name, x, width in (
        ("query", query, module.embed_dim),
        ("key", key, module.kdim),
        ("value", value, module.vdim),
    ):
        if x is None:
            continue
        if x.dim() != 3 or x.shape[-1] != width:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, wanted [batch, length, {width}].")
        if x.shape[1] == 0:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: attention needs at least one position.")
        if x.shape[0] != query.shape[0]:
            raise ValueError(f"{name} has batch {x.shape[0]}, query has {query.shape[0]}: give both the same.")
    if key is not None and module.position is not None:
        kind = "rotary" if isinstance(module.position, Rotary) else "alibi"
        raise ValueError(f"{kind} positions are of one sequence: give no key, or make the module without them.")
    if key is None and value is not None:
        raise ValueError("value was given without a key: values belong to keys; give both, or the key alone.")
    if key is None and not module.kdim == module.vdim == module.embed_dim:
        raise ValueError(
            f"keys are {module.kdim} wide and queries {module.embed_dim}: this module needs a key of its own."
        )
    if key is not None and value is None and module.kdim != module.vdim and not matrix:
        raise ValueError(f"keys are {module.kdim} wide and values {module.vdim}: give a value too.")
    if key is not None and value is not None and key.shape[1] != value.shape[1]:
        raise ValueError(f"key has {key.shape[1]} positions, value {value.shape[1]}: one value for each key.")
