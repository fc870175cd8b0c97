"""Keys and values of what was read before, so that the next token need not compute them again."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

__all__ = ["KVCache", "SlidingWindowCache"]


class KVCache:
    """The keys and values of one attention module, in memory taken once; it belongs to the caller.

    B batch, G key/value heads, D head size. Pass it to :meth:`MultiHeadAttention.forward`, under
    ``torch.no_grad()``; the first call binds it to that module. In self-attention each call adds its positions; in
    cross-attention the first call keeps the source's keys and values, of whatever length, and later ones compute none.

    Args:
        max_length: how many positions there is room for.

    Raises:
        ValueError: max_length below 1; on use: a full cache, another batch size, another module, gradients wanted.

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

    window: int | None = None  # how far back a query sees through this cache; None: to the beginning

    def __init__(self, max_length: int) -> None:
        if max_length < 1:
            raise ValueError(f"{type(self).__name__} got room for {max_length} positions: at least 1.")
        self.max_length = max_length
        self.length = 0  # positions read so far
        self.is_cross = False
        self._owner: weakref.ref[nn.Module] | None = None
        self._store: tuple[Tensor, Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """The memory it holds."""
        return sum(part.nbytes for part in self._store or ())

    def append(self, owner: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values [B, G, L, D]; gives all that are held, [B, G, length, D], as views.

        Raises:
            ValueError: see the class.
        """
        self._check(owner, key, value, cross=False)
        added = key.shape[2]
        if self.length + added > self.max_length:
            raise ValueError(
                f"the cache has room for {self.max_length} positions; {self.length} are taken and {added} come: make "
                "it larger, truncate() or reset() it, or use a SlidingWindowCache."
            )
        keys, values = self._room(owner, key, value, self.max_length)
        now = slice(self.length, self.length + added)
        keys[:, :, now], values[:, :, now] = key, value
        self.length += added
        return keys[:, :, : self.length], values[:, :, : self.length]

    def source(self, owner: nn.Module, source: Tensor) -> tuple[Tensor, Tensor] | None:
        """What was kept of a ``source`` [B, S, width], whose numbers are not looked at; None if nothing was yet.

        Raises:
            ValueError: it belongs to another module, or to a source of another shape, or to self-attention.
        """
        self._check_owner(owner)
        if self._store is None:
            return None
        batch, _, length, _ = self._store[0].shape
        if not self.is_cross or (batch, length) != source.shape[:2]:
            held = f"{length} positions of a source, batch {batch}" if self.is_cross else "the text itself"
            raise ValueError(
                f"the cache holds {held}, but the source has {source.shape[1]}, batch {source.shape[0]}: reset() it or "
                "use another."
            )
        return self._store

    def keep_source(self, owner: nn.Module, key: Tensor, value: Tensor) -> None:
        """Keep a source's keys and values [B, G, S, D]."""
        self._check(owner, key, value, cross=True)
        self._owner = weakref.ref(owner)
        self._store, self.is_cross = (key.detach(), value.detach()), True

    def truncate(self, length: int) -> None:
        """Forget what came after the first ``length`` positions. Raises ValueError if there are not so many."""
        if not 0 <= length <= self.length:
            raise ValueError(f"truncate({length}): the cache has read {self.length} positions.")
        self.length = length

    def reset(self) -> None:
        """Forget everything, the module and the memory too."""
        self.length, self.is_cross, self._owner, self._store = 0, False, None, None

    def _room(self, owner: nn.Module, key: Tensor, value: Tensor, length: int) -> tuple[Tensor, Tensor]:
        if self._store is None:
            self._owner = weakref.ref(owner)
            with torch.inference_mode(False):  # it is written into later, perhaps outside of that mode
                self._store = tuple(x.new_empty((*x.shape[:2], length, x.shape[3])) for x in (key, value))  # type: ignore
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
        held = self._store[0]
        if held.shape[:2] != key.shape[:2] or held.shape[3] != key.shape[3] or held.dtype != key.dtype:
            raise ValueError(
                f"the cache holds batch {held.shape[0]}, {held.shape[1]} heads of {held.shape[3]}, {held.dtype}; what "
                f"comes is batch {key.shape[0]}, {key.shape[1]} heads of {key.shape[3]}, {key.dtype}: reset() it first."
            )


class SlidingWindowCache(KVCache):
    """A cache that holds only what a window still needs: a query sees itself and the ``window`` − 1 before it.

    The module hides what is farther back, so that chunks of any size give what one forward pass with
    ``masks.sliding_window(window − 1)`` gives. Texts may be of any length. There is room for two windows, so that most
    steps need not move what is held.

    Args:
        window: how many positions a query sees, itself included.

    Example:
        >>> import torch, headscope
        >>> layer, cache = headscope.MultiHeadAttention(16, 4), headscope.SlidingWindowCache(8)
        >>> with torch.no_grad():
        ...     for chunk in torch.randn(20, 1, 5, 16):
        ...         out = layer(chunk, mask=headscope.masks.causal(), cache=cache)
        >>> cache.length, cache.nbytes
        (100, 2048)
    """

    def __init__(self, window: int) -> None:
        super().__init__(window)
        self.window = window
        self._first = self._held = 0  # where in the memory the window begins, and how much it holds

    def append(self, owner: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values [B, G, L, D]; gives those that some of the L new queries may see, the last at the end."""
        self._check(owner, key, value, cross=False)
        added, before = key.shape[2], self.max_length - 1
        keys, values = self._room(owner, key, value, 2 * self.max_length)
        self.length += added
        old = slice(self._first + max(0, self._held - before), self._first + self._held)
        if old.stop + added <= keys.shape[2]:
            now = slice(old.stop, old.stop + added)
            keys[:, :, now], values[:, :, now] = key, value
            self._first, self._held = old.start, now.stop - old.start
            return keys[:, :, old.start : now.stop], values[:, :, old.start : now.stop]
        whole = torch.cat((keys[:, :, old], key), 2), torch.cat((values[:, :, old], value), 2)
        kept = min(whole[0].shape[2], self.max_length)
        keys[:, :, :kept], values[:, :, :kept] = whole[0][:, :, -kept:], whole[1][:, :, -kept:]
        self._first, self._held = 0, kept
        return whole

    def truncate(self, length: int) -> None:
        """Forget the last positions. Raises ValueError where those that would be needed again are gone."""
        gone = self.length - length
        if length and gone and (gone > self._held or self._held - gone < min(length, self.max_length - 1)):
            raise ValueError(f"truncate({length}): of {self.length} positions only the last {self._held} are held.")
        super().truncate(length)
        self._held = self._held - gone if length else 0

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._first = self._held = 0
