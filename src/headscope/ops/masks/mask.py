"""Mask: which query may see which key, as a function of positions, and its combinations with ``&``, ``|``, ``~``.

True means *may attend*. Positions are absolute: key j has position j, and the L queries have the last L of the S
positions, so that a causal mask is correct with a cache. A mask also classifies whole blocks as visible, hidden or
mixed, so that hidden blocks are skipped.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor


class Mask(ABC):
    """A rule that says whether the query at position ``q_idx`` may see the key at ``kv_idx``.

    Call it like FlexAttention's ``mask_mod``, with index tensors that broadcast. It returns a bool tensor.

    Example:
        >>> from headscope import masks
        >>> rule = masks.causal() & ~masks.prefix(1)
        >>> rule.tensor(3, 3)[0, 0].int()
        tensor([[0, 0, 0],
                [0, 1, 0],
                [0, 1, 1]], dtype=torch.int32)
    """

    is_causal = False  # whether this is causal() itself, which the fused kernel supports directly

    @abstractmethod
    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """True where (batch b, head h) lets position q_idx see position kv_idx; the indices broadcast."""

    def classify(self, b: slice, q: slice, k: slice) -> bool | None:
        """True: all of the block is visible; False: none of it; None: mixed, or not known."""
        return None

    def block_key(self, q: slice, k: slice) -> Hashable:
        """Equal for blocks in which the mask shows the same cells, for every batch row and head; None: not known."""
        return None

    def check(self, shape: tuple[int, int, int, int]) -> None:
        """Raise ValueError if this mask cannot belong to an attention of shape (B, H, L, S)."""
        return

    def block(self, b: slice, h: slice, q: slice, k: slice, device: torch.device) -> Tensor:
        """The rule on a block of positions, broadcastable to [b, h, q, k]."""
        return self(
            arange(b, device).view(-1, 1, 1, 1),
            arange(h, device).view(1, -1, 1, 1),
            arange(q, device).view(1, 1, -1, 1),
            arange(k, device).view(1, 1, 1, -1),
        )

    def tensor(
        self,
        num_queries: int,
        num_keys: int,
        batch: int = 1,
        heads: int = 1,
        device: str | torch.device = "cpu",
    ) -> Tensor:
        """The whole mask as bool [batch, heads, num_queries, num_keys], for small sizes."""
        self.check((batch, heads, num_queries, num_keys))
        rows = slice(num_keys - num_queries, num_keys)
        full = (batch, heads, num_queries, num_keys)
        part = self.block(slice(0, batch), slice(0, heads), rows, slice(0, num_keys), torch.device(device))
        return part.expand(full).clone()

    def spans(self, b: slice, q: slice, num_keys: int, step: int = 64) -> list[tuple[int, int, bool]]:
        """The keys that some query of the block may see, as (start, stop, mixed) in ascending order.

        ``mixed`` means that the mask must be applied inside the span. The keys are halved repeatedly, so that a causal
        or windowed mask needs few calls of classify at any length.
        """
        joined: list[tuple[int, int, bool]] = []
        for start, stop, mixed in self._split_keys(b, q, 0, num_keys, step):
            if joined and joined[-1][1] == start and joined[-1][2] == mixed:
                joined[-1] = (joined[-1][0], stop, mixed)
            else:
                joined.append((start, stop, mixed))
        return joined

    def _split_keys(self, b: slice, q: slice, lo: int, hi: int, step: int) -> Iterator[tuple[int, int, bool]]:
        verdict = self.classify(b, q, slice(lo, hi))
        if verdict is False or lo >= hi:
            return
        if verdict is True or hi - lo <= step:
            yield lo, hi, verdict is None
            return
        middle = (lo + hi) // 2
        yield from self._split_keys(b, q, lo, middle, step)
        yield from self._split_keys(b, q, middle, hi, step)

    def __and__(self, other: Mask) -> Mask:
        return _And(self, _checked(other, "&"))

    def __or__(self, other: Mask) -> Mask:
        return _Or(self, _checked(other, "|"))

    def __invert__(self) -> Mask:
        return _Not(self)


def _checked(other: object, sign: str) -> Mask:
    if isinstance(other, Mask):
        return other
    raise TypeError(
        f"mask {sign} {type(other).__name__}: wanted another mask; masks.dense(tensor) makes one from a bool tensor "
        "[L, S] (True: may attend), masks.keep(tensor) from [B, S] (True: text)."
    )


class _Pair(Mask):
    """Two masks combined cell by cell."""

    sign: str
    combine: Callable[[Tensor, Tensor], Tensor]

    def __init__(self, left: Mask, right: Mask) -> None:
        self.left, self.right = left, right

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.combine(self.left(b, h, q_idx, kv_idx), self.right(b, h, q_idx, kv_idx))

    def block(self, b: slice, h: slice, q: slice, k: slice, device: torch.device) -> Tensor:
        return self.combine(self.left.block(b, h, q, k, device), self.right.block(b, h, q, k, device))

    def check(self, shape: tuple[int, int, int, int]) -> None:
        self.left.check(shape)
        self.right.check(shape)

    def __repr__(self) -> str:
        return f"{_wrapped(self.left)} {self.sign} {_wrapped(self.right)}"


class _And(_Pair):
    sign, combine = "&", staticmethod(operator.and_)

    def classify(self, b: slice, q: slice, k: slice) -> bool | None:
        left = self.left.classify(b, q, k)
        right = False if left is False else self.right.classify(b, q, k)
        return False if right is False else (left and right)


class _Or(_Pair):
    sign, combine = "|", staticmethod(operator.or_)

    def classify(self, b: slice, q: slice, k: slice) -> bool | None:
        left = self.left.classify(b, q, k)
        right = True if left is True else self.right.classify(b, q, k)
        if left is True or right is True:
            return True
        return False if left is False and right is False else None


class _Not(Mask):
    def __init__(self, mask: Mask) -> None:
        self.mask = mask

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return ~self.mask(b, h, q_idx, kv_idx)

    def block(self, b: slice, h: slice, q: slice, k: slice, device: torch.device) -> Tensor:
        return ~self.mask.block(b, h, q, k, device)

    def classify(self, b: slice, q: slice, k: slice) -> bool | None:
        verdict = self.mask.classify(b, q, k)
        return None if verdict is None else not verdict

    def check(self, shape: tuple[int, int, int, int]) -> None:
        self.mask.check(shape)

    def __repr__(self) -> str:
        return f"~{_wrapped(self.mask)}"


def arange(part: slice, device: torch.device) -> Tensor:
    """The positions of a slice."""
    return torch.arange(part.start, part.stop, device=device)


def _wrapped(mask: Mask) -> str:
    return f"({mask})" if isinstance(mask, _Pair) else repr(mask)
