"""Which query may see which key, as a function of positions: never an L×S tensor unless it came as one.

True means *may attend*. Positions are absolute: key j stands at j, and the L queries are the last L of
the S positions, so that a causal mask is right with a cache. Masks combine with ``&``, ``|`` and ``~``,
and can say of a whole block whether it is visible, hidden, or mixed, which is how hidden blocks are skipped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator

import torch
from torch import Tensor


class Mask(ABC):
    """A rule that says whether the query at position ``q_idx`` may see the key at ``kv_idx``.

    Call it like FlexAttention's ``mask_mod``: index tensors that broadcast come in, a bool tensor comes out.

    Example:
        >>> from headscope import masks
        >>> rule = masks.causal() & ~masks.prefix(1)
        >>> rule.tensor(3, 3)[0, 0].int()
        tensor([[0, 0, 0],
                [0, 1, 0],
                [0, 1, 1]], dtype=torch.int32)
    """

    is_causal = False  # whether this is causal() itself, which kernels have a way of their own for

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
        """The whole mask as bool [batch, heads, num_queries, num_keys]: for small sizes and for looking at."""
        self.check((batch, heads, num_queries, num_keys))
        rows = slice(num_keys - num_queries, num_keys)
        full = (batch, heads, num_queries, num_keys)
        part = self.block(slice(0, batch), slice(0, heads), rows, slice(0, num_keys), torch.device(device))
        return part.expand(full).clone()

    def spans(self, b: slice, q: slice, num_keys: int, step: int = 64) -> list[tuple[int, int, bool]]:
        """The keys that some query of the block may see, as (start, stop, mixed) in ascending order.

        ``mixed`` says that the mask must still be applied inside the span. Found by halving, so that a causal
        or windowed mask costs a few looks, whatever the length.
        """
        joined: list[tuple[int, int, bool]] = []
        for start, stop, mixed in self._halve(b, q, 0, num_keys, step):
            if joined and joined[-1][1] == start and joined[-1][2] == mixed:
                joined[-1] = (joined[-1][0], stop, mixed)
            else:
                joined.append((start, stop, mixed))
        return joined

    def _halve(self, b: slice, q: slice, lo: int, hi: int, step: int) -> Iterator[tuple[int, int, bool]]:
        verdict = self.classify(b, q, slice(lo, hi))
        if verdict is False or lo >= hi:
            return
        if verdict is True or hi - lo <= step:
            yield lo, hi, verdict is None
            return
        middle = (lo + hi) // 2
        yield from self._halve(b, q, lo, middle, step)
        yield from self._halve(b, q, middle, hi, step)

    def __and__(self, other: Mask) -> Mask:
        return _Both(self, _a_mask(other, "&"))

    def __or__(self, other: Mask) -> Mask:
        return _Either(self, _a_mask(other, "|"))

    def __invert__(self) -> Mask:
        return _Not(self)


def _a_mask(other: object, sign: str) -> Mask:
    if isinstance(other, Mask):
        return other
    what = type(other).__name__
    raise TypeError(
        f"mask {sign} {what}: wanted another mask; masks.dense(tensor) makes one of a bool tensor, True: see."
    )


class _Both(Mask):
    def __init__(self, left: Mask, right: Mask) -> None:
        self.left, self.right = left, right

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.left(b, h, q_idx, kv_idx) & self.right(b, h, q_idx, kv_idx)

    def block(self, b: slice, h: slice, q: slice, k: slice, device: torch.device) -> Tensor:
        return self.left.block(b, h, q, k, device) & self.right.block(b, h, q, k, device)

    def classify(self, b: slice, q: slice, k: slice) -> bool | None:
        left = self.left.classify(b, q, k)
        right = False if left is False else self.right.classify(b, q, k)
        return False if right is False else (left and right)

    def check(self, shape: tuple[int, int, int, int]) -> None:
        self.left.check(shape)
        self.right.check(shape)

    def __repr__(self) -> str:
        return f"{_wrapped(self.left)} & {_wrapped(self.right)}"


class _Either(Mask):
    def __init__(self, left: Mask, right: Mask) -> None:
        self.left, self.right = left, right

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.left(b, h, q_idx, kv_idx) | self.right(b, h, q_idx, kv_idx)

    def block(self, b: slice, h: slice, q: slice, k: slice, device: torch.device) -> Tensor:
        return self.left.block(b, h, q, k, device) | self.right.block(b, h, q, k, device)

    def classify(self, b: slice, q: slice, k: slice) -> bool | None:
        left = self.left.classify(b, q, k)
        right = True if left is True else self.right.classify(b, q, k)
        if left is True or right is True:
            return True
        return False if left is False and right is False else None

    def check(self, shape: tuple[int, int, int, int]) -> None:
        self.left.check(shape)
        self.right.check(shape)

    def __repr__(self) -> str:
        return f"{_wrapped(self.left)} | {_wrapped(self.right)}"


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
    return f"({mask})" if isinstance(mask, (_Both, _Either)) else repr(mask)
