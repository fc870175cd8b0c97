"""Functions of positions: ALiBi, a bias that grows with distance; rotary; sinusoidal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Alibi:
    """−slope·|i − j| for each head, computed block by block: pass it as ``bias=`` (arXiv 2108.12409)."""

    slopes: Tensor  # [H], float32

    requires_grad = False

    def tile(self, heads: slice, queries: slice, keys: slice, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The bias of some heads at some absolute positions, [1, h, q, k]."""
        rows = torch.arange(queries.start, queries.stop, device=device)[:, None]
        columns = torch.arange(keys.start, keys.stop, device=device)
        distance = (rows - columns).abs().to(dtype)
        return -self.slopes[heads].to(device, dtype).view(1, -1, 1, 1) * distance

    def points(self, heads: Tensor, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
        """The bias of single cells named by head and absolute positions."""
        return -self.slopes.to(heads.device, dtype)[heads] * (queries - keys).abs().to(dtype)

    def of_heads(self, heads: slice) -> Alibi:
        """The bias of some heads only."""
        return replace(self, slopes=self.slopes[heads])


def alibi(slopes: Sequence[float] | Tensor | None = None) -> Alibi:
    """ALiBi from its slopes, one per head, as ``bias=``; see :func:`alibi_slopes` for the usual ones.

    Raises:
        ValueError: no slopes, or slopes that are not a row of finite numbers.

    Example:
        >>> import torch, headscope
        >>> x = torch.randn(1, 4, 9, 8)
        >>> bias = headscope.positions.alibi(headscope.positions.alibi_slopes(4))
        >>> headscope.attention(x, x, x, mask=headscope.masks.causal(), bias=bias).shape
        torch.Size([1, 4, 9, 8])
    """
    write = "for the usual ones write positions.alibi(positions.alibi_slopes(num_heads))"
    if slopes is None:
        raise ValueError(f"alibi() got no slopes, wanted one for each head: {write}.")
    slopes = torch.as_tensor(slopes, dtype=torch.float32).detach()
    if slopes.dim() != 1 or not slopes.numel() or not bool(slopes.isfinite().all()):
        raise ValueError(
            f"alibi() got slopes of shape {tuple(slopes.shape)}, wanted one finite number for each head: {write}."
        )
    return Alibi(slopes)


def alibi_slopes(num_heads: int) -> Tensor:
    """The usual slopes [num_heads], 2^(−8/n), 2^(−16/n) … (arXiv 2108.12409).

    If n is not a power of two, the others are every second slope of twice the power below n.

    Example:
        >>> alibi_slopes(4)
        tensor([0.2500, 0.0625, 0.0156, 0.0039])
    """
    if num_heads < 1:
        raise ValueError(f"alibi_slopes() got {num_heads} heads: at least 1.")
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return torch.tensor(slopes)


Scaling = Callable[[Tensor], Tensor]  # from frequencies [D/2] to scaled ones


class Rotary:
    """Rotates each pair of a query's and a key's numbers by an angle that grows with their position (arXiv 2104.09864).

    A score then depends on the distance of the two positions only. Made by :func:`rotary`; ``rotate(x, first)``
    turns x [B, H, L, D], whose rows stand at positions first, first + 1 …
    """

    def __init__(self, base: float, interleaved: bool, scaling: Scaling | None) -> None:
        self.base, self.interleaved, self.scaling = base, interleaved, scaling
        self._tables: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def frequencies(self, size: int) -> Tensor:
        """Radians per position for each pair, [size / 2]: base^(−2i/size), then scaled. Raises ValueError if odd."""
        if size % 2:
            raise ValueError(f"rotary() rotates pairs of numbers, but the head size is {size}: it must be even.")
        plain = self.base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        return plain if self.scaling is None else self.scaling(plain)

    def rotate(self, x: Tensor, first: int = 0) -> Tensor:
        """The rows of x [B, H, L, D], rotated for positions first … first + L − 1; same shape and dtype."""
        cos, sin = self._table(first + x.shape[2], x)
        cos, sin = cos[first : first + x.shape[2]], sin[first : first + x.shape[2]]
        if self.interleaved:
            a, b = x[..., 0::2], x[..., 1::2]
            return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def _table(self, length: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [≥ length, D/2] in x's dtype, kept between calls."""
        kind = (x.shape[-1], x.device, x.dtype)
        table = self._tables.get(kind)
        if table is None or len(table[0]) < length:
            with torch.inference_mode(False):  # a training step may use the table later
                positions = torch.arange(2 ** math.ceil(math.log2(max(length, 64))), dtype=torch.float64)
                angles = torch.outer(positions, self.frequencies(x.shape[-1]))
                table = angles.cos().to(x.device, x.dtype), angles.sin().to(x.device, x.dtype)
            if type(table[0]) is Tensor:  # not a FakeTensor, while a graph is exported
                self._tables[kind] = table
        return table

    def __deepcopy__(self, memo: object) -> Rotary:
        return self  # its only state is a cache

    def __repr__(self) -> str:
        pairs = "interleaved" if self.interleaved else "half-split"
        return f"rotary(base={self.base:g}, {pairs}{', scaled' if self.scaling else ''})"


def rotary(base: float = 10_000.0, *, interleaved: bool = False, scaling: Scaling | None = None) -> Rotary:
    """Rotary position embedding (arXiv 2104.09864), as ``position=`` of a module.

    Args:
        base: the wavelengths run from 2π to 2π·base positions.
        interleaved: which numbers form a pair: i and i + D/2 (half-split, as in Llama), or if True 2i and 2i + 1 (as
            in the paper and in GPT-J).
        scaling: changes the frequencies for longer texts: :func:`linear_scaling`, :func:`llama3_scaling`, or your own.

    Raises:
        ValueError: a base that is not above 1, or a scaling that is not a function.

    Example:
        >>> import torch
        >>> rotated = rotary().rotate(torch.ones(1, 1, 3, 4))
        >>> rotated[0, 0, 0]
        tensor([1., 1., 1., 1.])
        >>> torch.allclose(rotated.norm(dim=-1), torch.full((1, 1, 3), 2.0))
        True
    """
    if not base > 1:
        raise ValueError(f"rotary() got base={base}: it must be above 1; 10000 is usual.")
    if scaling is not None and not callable(scaling):
        raise ValueError(f"rotary() got scaling={scaling!r}: wanted a function, such as linear_scaling({scaling!r}).")
    return Rotary(float(base), interleaved, scaling)


def linear_scaling(factor: float) -> Scaling:
    """Positions divided by ``factor`` (arXiv 2306.15595). Raises ValueError unless it is above 0."""
    if not factor > 0:
        raise ValueError(f"linear_scaling() got factor={factor}: it must be above 0.")
    return _Linear(factor)


@dataclass(frozen=True)
class _Linear:
    """Positions divided by ``factor``; a class, so that a module that holds it can be pickled."""

    factor: float

    def __call__(self, frequencies: Tensor) -> Tensor:
        return frequencies / self.factor


def llama3_scaling(factor: float, low: float = 1.0, high: float = 4.0, original: int = 8192) -> Scaling:
    """Llama 3.1's: long wavelengths divided by ``factor``, short ones unchanged, the others between (arXiv 2407.21783).

    Args:
        factor: how many times longer texts become.
        low: wavelengths above original / low are divided by ``factor``.
        high: wavelengths below original / high are unchanged.
        original: the length the model was first trained on, in tokens.

    Raises:
        ValueError: a factor, low or original that is not above 0, or a high that is not above low.
    """
    if not (factor > 0 and original > 0 and high > low > 0):
        raise ValueError(
            f"llama3_scaling() got factor={factor}, low={low}, high={high}, original={original}: all must be above 0, "
            "and high above low."
        )
    return _Llama3(factor, low, high, original)


@dataclass(frozen=True)
class _Llama3:
    """See llama3_scaling."""

    factor: float
    low: float
    high: float
    original: int

    def __call__(self, frequencies: Tensor) -> Tensor:
        turns = self.original * frequencies / (2 * math.pi)  # turns within the original length
        share = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return frequencies * (share + (1 - share) / self.factor)


def sinusoidal(length: int, embed_dim: int, first: int = 0) -> Tensor:
    """The position vectors of arXiv 1706.03762, [length, embed_dim]: sines at even indices, cosines at odd ones.

    Raises:
        ValueError: an odd embed_dim.

    Example:
        >>> sinusoidal(2, 4)
        tensor([[0.0000, 1.0000, 0.0000, 1.0000],
                [0.8415, 0.5403, 0.0100, 0.9999]])
    """
    if embed_dim % 2:
        raise ValueError(f"sinusoidal() got embed_dim={embed_dim}: sines and cosines come in pairs, so it is even.")
    positions = torch.arange(first, first + length, dtype=torch.float64)
    angles = torch.outer(positions, 10_000.0 ** (-torch.arange(0, embed_dim, 2, dtype=torch.float64) / embed_dim))
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2).float()
