"""Scores, s = QKᵀ·scale, capped, plus a bias, hidden where the mask says so; and what normalizes them to weights.

Scores are computed block by block, never all at once.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headscope.ops.masks import Mask, dense
from headscope.ops.positions import Alibi

LOWEST = -1e30  # stands for the logarithm of a hidden weight, so that 0 · log 0 is 0
FLOAT32_BOUND = 256.0  # scores of at most this size are exact to about 1e-5 in float32, see docs/log.md


@dataclass(frozen=True, eq=False)
class Scores:
    """The operands of attention, and the scores of any block of them.

    B batch, H query heads, G key/value heads, L queries, S keys, D head size. ``origin`` is the start of
    this part within the whole: (batch row, head, absolute position of the first query).
    """

    query: Tensor  # [B, H, L, D]
    key: Tensor  # [B, G, S, D]
    mask: Mask | None
    bias: Tensor | Alibi | None  # 4-D, broadcastable to [B, H, L, S], added after the cap
    scale: float
    softcap: float | None
    sinks: Tensor | None  # [H], one logit per head, in the denominator only
    origin: tuple[int, int, int]
    wide: bool = False  # scores are too large for float32: they are float64 until their row's shift is taken off

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, L, S)."""
        batch, heads, queries, _ = self.query.shape
        return batch, heads, queries, self.key.shape[2]

    @property
    def per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Weights are float32, and float64 for float64 inputs."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32

    @property
    def score_dtype(self) -> torch.dtype:
        """Scores have the dtype of the weights, and are float64 if they are too large for float32."""
        return torch.float64 if self.wide else self.dtype

    def positions(self, rows: slice) -> slice:
        """Absolute positions of some query rows."""
        return slice(rows.start + self.origin[2], rows.stop + self.origin[2])

    def queries(self, b: slice, heads: slice, q: slice, out: Tensor | None = None) -> Tensor:
        """Scaled queries as [b·g, per_group·q, D]: the heads of a group share one product with its keys.

        ``heads`` are whole groups. ``out`` [b, heads, q, D] is memory for them.
        """
        part = torch.mul(self.query[b, heads, q].to(self.score_dtype), self.scale, out=out)
        return part.reshape(-1, self.per_group * part.shape[2], part.shape[3])

    def block(self, queries: Tensor, b: slice, heads: slice, q: slice, k: slice, out: Tensor | None = None) -> Tensor:
        """Scores [b, heads, q, k] of one block, not yet hidden; ``queries`` comes from :meth:`queries`.

        ``out`` [b·g, per_group·q, k] is memory for the product; the result may share it.
        """
        groups = slice(heads.start // self.per_group, heads.stop // self.per_group)
        keys = self.key[b, groups, k].to(self.score_dtype).flatten(0, 1)
        flat = torch.bmm(queries, keys.transpose(1, 2), out=out)
        shape = (b.stop - b.start, heads.stop - heads.start, q.stop - q.start, k.stop - k.start)
        scores = self.capped(flat.view(shape))
        if self.bias is not None:
            scores = scores + self.bias_block(b, heads, q, k)
        return scores

    def capped(self, products: Tensor) -> Tensor:
        """Scores of scaled products q·k: capped if there is a softcap (arXiv 2408.00118)."""
        return products if self.softcap is None else torch.tanh(products / self.softcap) * self.softcap

    def rows(self, b: int, q: Tensor) -> Tensor:
        """Scores [H, n, S] of some query rows [n] of one text against all keys, −inf where hidden."""
        _, heads, _, keys = self.shape
        q = q.to(self.query.device)
        query = self.query[b, :, q].to(self.dtype) * self.scale  # [H, n, D]
        grouped = query.reshape(self.key.shape[1], -1, query.shape[-1])
        scores = self.capped(grouped @ self.key[b].to(self.dtype).transpose(1, 2)).view(heads, len(q), keys)
        all_heads = torch.arange(heads, device=q.device)[:, None, None]
        positions, key_positions = (q + self.origin[2])[None, :, None], torch.arange(keys, device=q.device)[None, None]
        if isinstance(self.bias, Alibi):
            scores = scores + self.bias.points(all_heads, positions, key_positions, self.dtype)
        elif self.bias is not None:
            part = self.bias[b if len(self.bias) > 1 else 0]
            scores = scores + (part[:, q] if part.shape[1] > 1 else part).to(self.dtype)
        if self.mask is not None:
            text = torch.full((1, 1, 1), b + self.origin[0], device=q.device)
            visible = self.mask(text, all_heads + self.origin[1], positions, key_positions)
            scores = scores.masked_fill(~visible, -torch.inf)
        return scores

    @property
    def bias_tensor(self) -> Tensor | None:
        """The bias as a tensor. ALiBi is written out as L×S numbers: for small sizes only."""
        if not isinstance(self.bias, Alibi):
            return self.bias
        batch, heads, queries, keys = self.shape
        return self.bias_block(slice(0, batch), slice(0, heads), slice(0, queries), slice(0, keys))

    def bias_block(self, b: slice, heads: slice, q: slice, k: slice) -> Tensor:
        """The bias of a block, broadcastable to [b, heads, q, k]. There must be one."""
        if isinstance(self.bias, Alibi):
            return self.bias.tile(heads, self.positions(q), k, self.query.device, self.dtype)
        assert self.bias is not None
        return _slice_of(self.bias, b, heads, q, k).to(self.dtype)

    def visible(self, b: slice, heads: slice, q: slice, k: slice) -> Tensor:
        """The mask on a block as a bool tensor, broadcastable to [b, heads, q, k]. There must be a mask."""
        assert self.mask is not None
        first_b, first_h, _ = self.origin
        return self.mask.block(
            slice(b.start + first_b, b.stop + first_b),
            slice(heads.start + first_h, heads.stop + first_h),
            self.positions(q),
            k,
            self.query.device,
        )

    def block_key(self, q: slice, k: slice) -> Hashable:
        """Equal for blocks in which the mask shows the same cells, for every batch row and head; None: not known."""
        return None if self.mask is None else self.mask.block_key(self.positions(q), k)

    def spans(self, b: slice, q: slice) -> list[tuple[int, int, bool]]:
        """Keys that some of these queries may see, as (start, stop, mixed)."""
        num_keys = self.key.shape[2]
        if self.mask is None:
            return [(0, num_keys, False)]
        batch = slice(b.start + self.origin[0], b.stop + self.origin[0])
        return self.mask.spans(batch, self.positions(q), num_keys)

    def all_visible(self, b: slice, q: slice, k: slice) -> bool:
        """Whether the mask's rule alone says that these queries see all these keys; False: not known."""
        if self.mask is None:
            return True
        batch = slice(b.start + self.origin[0], b.stop + self.origin[0])
        return self.mask.classify(batch, self.positions(q), k) is True

    def at_least(self, dtype: torch.dtype) -> Scores:
        """The same attention, with half-precision operands as float32 where ``dtype`` is more precise than they are."""
        own = self.query.dtype
        if own in (torch.float32, torch.float64) or torch.promote_types(own, dtype) == own:
            return self
        return replace(self, query=self.query.float(), key=self.key.float())

    def narrow(self, b: slice, h: slice, q: slice) -> Scores:
        """The same attention for some batch rows, heads and queries only; every key stays."""
        n = self.per_group
        if h.start % n == 0 and h.stop % n == 0:
            key = self.key[b, h.start // n : h.stop // n]
        elif h.start // n == (h.stop - 1) // n:
            key = self.key[b, h.start // n : h.start // n + 1]
        else:
            key = self.key[b, torch.arange(h.start, h.stop, device=self.key.device) // n]
        all_keys = slice(0, self.key.shape[2])
        return replace(
            self,
            query=self.query[b, h, q],
            key=key,
            bias=self._narrow_bias(b, h, q, all_keys),
            sinks=None if self.sinks is None else self.sinks[h],
            origin=(
                self.origin[0] + b.start,
                self.origin[1] + h.start,
                self.origin[2] + q.start,
            ),
        )

    def _narrow_bias(self, b: slice, h: slice, q: slice, k: slice) -> Tensor | Alibi | None:
        if self.bias is None or isinstance(self.bias, Alibi):
            return None if self.bias is None else self.bias.of_heads(h)
        return _slice_of(self.bias, b, h, q, k)

    def checked(self) -> Scores:
        """The same scores, ``wide`` where float32 may be too coarse for them: ‖q‖·‖k‖·scale bounds their size.

        Raises:
            ValueError: an operand holds NaN or infinite values.
        """
        query_norms, key_norms = (_largest_norms(tensor) for tensor in (self.query, self.key))
        for name, tensor, norms in (("query", self.query, query_norms), ("key", self.key, key_norms)):
            if not bool(norms.isfinite().all()):  # a norm of finite numbers may overflow, too
                bad = ~torch.isfinite(tensor)
                if bool(bad.any()):
                    raise ValueError(_describe(name, tensor, bad))
        for name, added in (("bias", self.bias), ("sinks", self.sinks)):
            if isinstance(added, Tensor):
                bad = added.isnan() | (added == math.inf)
                if bool(bad.any()):
                    raise ValueError(_describe(name, added, bad))
        bound = float((query_norms.view(len(key_norms), -1) * key_norms[:, None]).amax()) * abs(self.scale)
        may_be_wide = self.dtype == torch.float32 and self.query.device.type != "mps"  # which has no float64
        return replace(self, wide=may_be_wide and not bound <= FLOAT32_BOUND)


@dataclass(frozen=True, eq=False)
class Normalizer:
    """Two numbers per row, [B, H, L] each, that turn scores into weights: P = exp((s − shift) − log_sum).

    Their sum is the log-sum-exp. One number would lose ``log_sum`` where scores are large, or where a mask added −3e38
    to a whole row.
    """

    shift: Tensor
    log_sum: Tensor

    @classmethod
    def from_logsumexp(cls, logsumexp: Tensor) -> Normalizer:
        """From a kernel's log-sum-exp [B, H, L], −inf where nothing is visible.

        NaN marks rows still to be computed: those of which it is NaN, or too large to be exact as one float32 number.
        """
        empty = logsumexp == -torch.inf
        with torch.inference_mode(False):  # written into later, perhaps outside of that mode
            shift = logsumexp.detach().masked_fill(empty, 0)
            if shift.dtype != torch.float64:
                shift = shift.masked_fill(shift.abs() > FLOAT32_BOUND, torch.nan)
            return cls(shift, torch.zeros_like(shift).masked_fill(empty, -torch.inf))

    @property
    def logsumexp(self) -> Tensor:
        """Log Σ_j exp(s_ij), [B, H, L]; −inf where nothing is visible."""
        return (self.shift + self.log_sum).to(self.log_sum.dtype)

    @property
    def offset(self) -> Tensor | None:
        """−log_sum, 0 for rows that see nothing; None if it is 0 for all rows, as for a kernel's log-sum-exp."""
        offset = -self.log_sum
        offset = torch.where(offset == torch.inf, 0.0, offset)
        return offset if bool(offset.any()) else None


def make_scores(
    query: Tensor,
    key: Tensor,
    mask: Mask | Tensor | None,
    bias: Tensor | Alibi | None,
    scale: float | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Scores:
    """Check the operands of attention against each other. Raises ValueError: both values, and how to correct it."""
    _check_operands(query, key)
    batch, heads, queries, width = query.shape
    shape = (batch, heads, queries, key.shape[2])
    mask = checked_mask(mask, shape)
    if isinstance(bias, Alibi) and len(bias.slopes) != heads:
        raise ValueError(f"alibi has {len(bias.slopes)} slopes, but there are {heads} heads: give one per head.")
    if isinstance(bias, Tensor):
        bias = _check_bias(bias, shape)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}: it must be above 0, or None for no cap.")
    if sinks is not None:
        if sinks.numel() != heads:
            raise ValueError(f"sinks has {sinks.numel()} values, but there are {heads} heads: give one per head.")
        sinks = sinks.reshape(heads)
    if scale is None:
        scale = 1 / math.sqrt(width)
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}: it must be a finite number; 1/√D is {1 / math.sqrt(width):.4g} here.")
    return Scores(query, key, mask, bias, float(scale), softcap, sinks, (0, 0, shape[3] - queries))


def checked_mask(mask: Mask | Tensor | None, shape: tuple[int, int, int, int]) -> Mask | None:
    """The mask; a bool tensor becomes ``masks.dense``. Raises ValueError if it is neither, or does not fit."""
    if isinstance(mask, Tensor):
        _check_unambiguous(mask, shape)
        mask = dense(mask)
    if mask is not None:
        if not isinstance(mask, Mask):
            raise ValueError(f"mask is a {type(mask).__name__}; wanted a headscope mask, a bool tensor or None.")
        mask.check(shape)
    return mask


def _check_unambiguous(mask: Tensor, shape: tuple[int, int, int, int]) -> None:
    """Raise ValueError for a tensor [B, S] that is not, or need not be, [L, S]."""
    batch, _, queries, keys = shape
    if mask.dim() == 2 and mask.shape == (batch, keys) and batch > 1:
        reading = "may be [L, S] or [B, S]" if batch == queries else "is [B, S] here, but a 2-D mask is read as [L, S]"
        raise ValueError(
            f"a mask of shape {tuple(mask.shape)} {reading}, the attention is {shape} as (B, H, L, S): write "
            "masks.keep(mask) for which keys of each text are kept, masks.dense(mask) for which query sees which key."
        )


def _check_operands(query: Tensor, key: Tensor) -> None:
    for name, tensor, letters in (("query", query, "[B, H, L, D]"), ("key", key, "[B, G, S, D]")):
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, wanted 4 axes {letters}: "
                "heads come before positions; see unflatten and transpose."
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, wanted floating point: convert it with .float().")
    if 0 in query.shape[1:] or 0 in key.shape[1:]:
        raise ValueError(
            f"query {tuple(query.shape)} or key {tuple(key.shape)} is empty: attention needs at least one of each "
            "but the batch."
        )
    if query.dtype != key.dtype or query.device != key.device:
        raise ValueError(
            f"query is {query.dtype} on {query.device}, key is {key.dtype} on {key.device}: "
            "they must agree; convert one with .to(other)."
        )
    if query.shape[0] != key.shape[0]:
        raise ValueError(
            f"query has batch {query.shape[0]}, key has {key.shape[0]}: give both the same, or expand one of them."
        )
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"query has head size {query.shape[3]}, key has {key.shape[3]}: a dot product needs the same.")
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"{query.shape[1]} query heads cannot share {key.shape[1]} key heads evenly: "
            "the first must be a multiple of the second."
        )


def _check_bias(bias: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    if not bias.is_floating_point():
        raise ValueError(
            f"bias is {bias.dtype}, wanted floating point: it is added to the scores. "
            "What may be seen goes in mask= (True: may attend)."
        )
    if bias.dim() == 2:
        bias = bias[None, None]
    fits = bias.dim() == 4 and all(n in (1, m) for n, m in zip(bias.shape, shape, strict=True))
    if not fits:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}, the scores are {shape} as (B, H, L, S): "
            "it must be [L, S], or 4-D with each axis 1 or equal."
        )
    return bias


def _slice_of(tensor: Tensor, *parts: slice) -> Tensor:
    index = tuple(p if n > 1 else slice(None) for p, n in zip(parts, tensor.shape, strict=True))
    return tensor[index]


def _largest_norms(tensor: Tensor) -> Tensor:
    """The largest norm of a row, per head, of queries or keys [B, H, L, D]."""
    if not len(tensor):
        return tensor.new_zeros(tensor.shape[1])
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    heads = 2 if tensor.stride(1) < tensor.stride(2) else 1  # rows in the order of memory: 7 times as fast
    rows = tensor.detach().transpose(1, heads)
    return torch.linalg.vector_norm(rows, dim=-1, dtype=dtype).amax((0, 3 - heads))


def _describe(name: str, tensor: Tensor, bad: Tensor) -> str:
    first = [int(i) for i in bad.nonzero()[0]]
    return (
        f"{name} holds {int(bad.sum())} values that are NaN or infinite, the first {tensor[tuple(first)].item()} "
        f"at {first}: weights computed from them would mean nothing. Check what computed them."
    )


def as_value(value: Tensor, scores: Scores, name: str) -> Tensor:
    """A value for P @ value as [B, G or H, S, N], expanded and in the dtype of the query; ``name`` is for errors.

    Raises:
        ValueError: a shape or dtype that does not fit the scores.
    """
    batch, heads, _, keys = scores.shape
    groups = scores.key.shape[1]
    value_4d = value[None, None] if value.dim() == 2 else value
    if value_4d.dim() != 4:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, wanted [S, N] or [B, G, S, N].")
    if value_4d.shape[2] != keys:
        raise ValueError(f"{name}: got {value_4d.shape[2]} rows, but there are {keys} keys: give one row per key.")
    if value_4d.shape[0] not in (1, batch) or value_4d.shape[1] not in (1, groups, heads):
        raise ValueError(
            f"{name}: got batch {value_4d.shape[0]} and {value_4d.shape[1]} heads, "
            f"wanted batch 1 or {batch} and heads 1, {groups} or {heads}."
        )
    if not value_4d.is_floating_point():
        raise ValueError(f"{name}: got {value_4d.dtype}, wanted floating point: convert it with .float().")
    if value_4d.shape[3] == 0:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}: it has no columns.")
    return value_4d.expand(batch, groups if value_4d.shape[1] == 1 else -1, -1, -1).to(scores.query.dtype)
