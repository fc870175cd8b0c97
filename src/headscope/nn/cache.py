"""Caches of keys and values, so that the next token need not compute those of earlier positions again."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn


class KVCache:
    """The keys and values of one attention module; it belongs to the caller.

    B batch, G key/value heads, D head size. Pass it to :meth:`MultiHeadAttention.forward`, under
    ``torch.no_grad()``; the first call binds it to that module. In self-attention each call adds its positions. In
    cross-attention the first call stores the keys and values of the source, of any length, and later calls use them.
    A copy, also one that was pickled, is bound by its own first call.

    Args:
        max_length: the number of positions that fit into it; its memory is allocated once. None: any number; the
            memory is doubled when it is full.

    Raises:
        ValueError: max_length below 1; on use: a full cache, another batch size, another module, gradients required.

    Example:
        >>> import torch, headscope
        >>> layer = headscope.MultiHeadAttention(16, 4)
        >>> cache = headscope.KVCache(max_length=32)
        >>> with torch.no_grad():
        ...     for token in torch.randn(5, 1, 1, 16):
        ...         out = layer(token, mask=headscope.masks.causal(), cache=cache)
        >>> cache.length
        5
    """

    window: int | None = None  # positions that a query may attend to, itself included; None: all

    def __init__(self, max_length: int | None = None) -> None:
        if max_length is not None and max_length < 1:
            raise ValueError(f"{type(self).__name__} got room for {max_length} positions: at least 1.")
        self.max_length = max_length
        self.length = 0  # positions read so far
        self.is_cross = False
        self._owner: weakref.ref[nn.Module] | None = None
        self._store: tuple[Tensor, Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """The size of its memory."""
        return sum(tensor.nbytes for tensor in self._store or ())

    def append(self, owner: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values [B, G, L, D]; returns all stored ones, [B, G, length, D], as views.

        Raises:
            ValueError: see the class.
        """
        self._check(owner, key, value, cross=False)
        added = key.shape[2]
        if self.max_length is not None and self.length + added > self.max_length:
            raise ValueError(
                f"the cache has room for {self.max_length} positions; {self.length} are used and {added} come: make "
                "it larger, truncate() or reset() it, or use a SlidingWindowCache."
            )
        keys, values = self._allocated(owner, key, value, self.max_length or self.length + added)
        slots = slice(self.length, self.length + added)
        keys[:, :, slots], values[:, :, slots] = key, value
        self.length += added
        return keys[:, :, : self.length], values[:, :, : self.length]

    def source(self, owner: nn.Module, source: Tensor) -> tuple[Tensor, Tensor] | None:
        """The stored keys and values of a ``source`` [B, S, width], of which only the shape is read; None if empty.

        Raises:
            ValueError: it belongs to another module, or to a source of another shape, or to self-attention.
        """
        self._check_owner(owner)
        if self._store is None:
            return None
        batch, _, length, _ = self._store[0].shape
        if not self.is_cross or (batch, length) != source.shape[:2]:
            content = f"{length} positions of a source, batch {batch}" if self.is_cross else "the text itself"
            raise ValueError(
                f"the cache holds {content}, but the source has {source.shape[1]}, batch {source.shape[0]}: reset() "
                "it or use another."
            )
        self._owner = weakref.ref(owner)
        return self._store

    def store_source(self, owner: nn.Module, key: Tensor, value: Tensor) -> None:
        """Store a source's keys and values [B, G, S, D]."""
        self._check(owner, key, value, cross=True)
        self._owner = weakref.ref(owner)
        self._store, self.is_cross = (key.detach(), value.detach()), True

    def truncate(self, length: int) -> None:
        """Drop all but the first ``length`` positions. Raises ValueError if there are fewer."""
        if not 0 <= length <= self.length:
            raise ValueError(f"truncate({length}): the cache has {self.length} positions.")
        self.length = length

    def reset(self) -> None:
        """Drop all positions, the memory, and the bond to the module."""
        self.length, self.is_cross, self._owner, self._store = 0, False, None, None

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the module that it is bound to, which may be copied or loaded with it."""
        return {**self.__dict__, "_owner": None}

    def _allocated(self, owner: nn.Module, key: Tensor, value: Tensor, length: int) -> tuple[Tensor, Tensor]:
        self._owner = weakref.ref(owner)
        old = self._store
        if old is None or old[0].shape[2] < length:
            slots = length if old is None else max(length, 2 * old[0].shape[2])
            with torch.inference_mode(False):  # later calls may write outside of that mode
                new_key, new_value = (x.new_empty((*x.shape[:2], slots, x.shape[3])) for x in (key, value))
                self._store = new_key, new_value
                for new, stored in zip(self._store, old or (), strict=False):
                    new[:, :, : self.length] = stored[:, :, : self.length]
        assert self._store is not None
        return self._store

    def _check_owner(self, owner: nn.Module) -> None:
        if self._owner is not None and self._owner() is not owner:
            raise ValueError("the cache belongs to another attention module: make one for each, or reset() it.")

    def _check(self, owner: nn.Module, key: Tensor, value: Tensor, cross: bool) -> None:
        self._check_owner(owner)
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise ValueError("a cache keeps no gradients: call the module under torch.no_grad().")
        if self._store is None:
            return
        if self.is_cross != cross:
            raise ValueError("the cache holds a source (cross-attention), so it cannot take positions of the text.")
        stored = self._store[0]
        if stored.shape[:2] != key.shape[:2] or stored.shape[3] != key.shape[3] or stored.dtype != key.dtype:
            raise ValueError(
                f"the cache holds batch {stored.shape[0]}, {stored.shape[1]} heads of {stored.shape[3]}, "
                f"{stored.dtype}; what comes is batch {key.shape[0]}, {key.shape[1]} heads of {key.shape[3]}, "
                f"{key.dtype}: reset() it first."
            )


class SlidingWindowCache(KVCache):
    """A cache of the last positions only: a query attends to itself and the ``window`` − 1 positions before it.

    The module masks farther positions, so that chunks of any size give the same output as one forward pass with
    ``masks.sliding_window(window − 1)``. Texts may have any length. The memory has slots for two windows, so that most
    steps move nothing.

    Args:
        window: the number of positions that a query may attend to, itself included.

    Example:
        >>> import torch, headscope
        >>> layer, cache = headscope.MultiHeadAttention(16, 4), headscope.SlidingWindowCache(8)
        >>> with torch.no_grad():
        ...     for chunk in torch.randn(20, 1, 5, 16):
        ...         out = layer(chunk, mask=headscope.masks.causal(), cache=cache)
        >>> cache.length, cache.nbytes
        (100, 2048)
    """

    max_length: int
    window: int

    def __init__(self, window: int) -> None:
        super().__init__(window)
        self.window = window
        self._start = self._count = 0  # the first slot of the window, and the number of its positions

    def append(self, owner: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values [B, G, L, D]; returns those in the windows of the L new queries, in order."""
        self._check(owner, key, value, cross=False)
        added, before = key.shape[2], self.max_length - 1
        keys, values = self._allocated(owner, key, value, 2 * self.max_length)
        self.length += added
        old = slice(self._start + max(0, self._count - before), self._start + self._count)
        if old.stop + added <= keys.shape[2]:
            new = slice(old.stop, old.stop + added)
            keys[:, :, new], values[:, :, new] = key, value
            self._start, self._count = old.start, new.stop - old.start
            return keys[:, :, old.start : new.stop], values[:, :, old.start : new.stop]
        joined = torch.cat((keys[:, :, old], key), 2), torch.cat((values[:, :, old], value), 2)
        count = min(joined[0].shape[2], self.max_length)
        keys[:, :, :count], values[:, :, :count] = joined[0][:, :, -count:], joined[1][:, :, -count:]
        self._start, self._count = 0, count
        return joined

    def truncate(self, length: int) -> None:
        """Drop the last positions. Raises ValueError if positions of the window before them are no longer stored."""
        dropped = self.length - length
        if length and dropped and (dropped > self._count or self._count - dropped < min(length, self.max_length - 1)):
            raise ValueError(f"truncate({length}): of {self.length} positions only the last {self._count} are stored.")
        super().truncate(length)
        self._count = self._count - dropped if length else 0

    def reset(self) -> None:
        """Drop everything."""
        super().reset()
        self._start = self._count = 0
