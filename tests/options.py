"""Masks and biases of every kind, for any sizes: as headscope takes them, and as cells by brute force; fixtures."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jaxtyping
import pytest
import torch
from torch import Tensor

from headscope import masks
from headscope.ops.masks import Mask
from tests.reference import FINFO_MIN, all_in, visible_where


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For modules that import it: on tensors this small, threads cost more time than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def unchecked() -> Iterator[None]:
    """Without the shape checks of tests, which would raise before our own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


Sizes = tuple[int, int, int, int]  # (B, H, L, S)
Rule = Callable[[int, int, int, int], bool]


def _lengths(sizes: Sizes) -> list[int]:
    """Falling lengths: the last batch row has the shortest text."""
    return [max(1, sizes[3] - 3 * b) for b in range(sizes[0])]


def _ids(sizes: Sizes) -> list[int]:
    return [min(j // 4, 2) for j in range(sizes[3])]


def _random(sizes: Sizes) -> Tensor:
    """Two cells of three, and one query row that sees nothing."""
    visible = torch.rand(sizes, generator=torch.Generator().manual_seed(5)) < 0.67
    visible[-1, :, -1] = False
    return visible


def _left(sizes: Sizes) -> tuple[Mask, Rule]:
    lengths = _lengths(sizes)
    mask = masks.causal() & masks.padding(lengths, "left", sizes[3])
    return mask, lambda b, h, i, j: sizes[3] - lengths[b] <= j <= i


def _documents(sizes: Sizes) -> tuple[Mask, Rule]:
    ids = _ids(sizes)
    return masks.causal() & masks.documents(ids), lambda b, h, i, j: j <= i and ids[i] == ids[j]


def _dense(sizes: Sizes) -> tuple[Mask | Tensor, Rule]:
    visible, first = _random(sizes), sizes[3] - sizes[2]
    return visible, lambda b, h, i, j: bool(visible[b, h, i - first, j])


def _keep(sizes: Sizes) -> tuple[Mask, Rule]:
    is_text = torch.rand(sizes[0], sizes[3], generator=torch.Generator().manual_seed(6)) < 0.67
    return masks.keep(is_text), lambda b, h, i, j: bool(is_text[b, j])


def _packed(sizes: Sizes) -> tuple[Mask, Rule]:
    visible, first = _random(sizes)[:, :1], sizes[3] - sizes[2]
    return masks.packed(visible), lambda b, h, i, j: bool(visible[b, 0, i - first, j])


MASKS: dict[str, Callable[[Sizes], tuple[Mask | Tensor | None, Rule]]] = {
    "none": lambda sizes: (None, lambda b, h, i, j: True),
    "causal": lambda sizes: (masks.causal(), lambda b, h, i, j: j <= i),
    "window": lambda sizes: (masks.sliding_window(2, 1), lambda b, h, i, j: i - 2 <= j <= i + 1),
    "prefix": lambda sizes: (masks.causal() | masks.prefix(2), lambda b, h, i, j: j <= i or j < 2),
    "padding": lambda sizes: (masks.padding(_lengths(sizes)), all_in(_lengths(sizes))),
    "left padding": _left,
    "documents": _documents,
    "dense": _dense,
    "keep": _keep,
    "packed": _packed,
    "function": lambda sizes: (
        masks.function(lambda b, h, i, j: (i + j + h) % 3 > 0),
        lambda b, h, i, j: (i + j + h) % 3 > 0,
    ),
    "nothing": lambda sizes: (masks.prefix(0), lambda b, h, i, j: False),
}


def masked(name: str, sizes: Sizes) -> tuple[Mask | Tensor | None, Tensor]:
    """The mask, and its cells."""
    mask, rule = MASKS[name](sizes)
    return mask, visible_where(rule, *sizes)


def _with(value: float, where: Rule, sizes: Sizes) -> Tensor:
    bias = torch.randn(1, *sizes[1:])
    return bias.masked_fill(visible_where(where, 1, *sizes[1:], origin=0), value)


BIASES: dict[str, Callable[[Sizes], Tensor | None]] = {
    "none": lambda sizes: None,
    "[L, S]": lambda sizes: torch.randn(sizes[2:]),
    "[B, 1, L, S]": lambda sizes: torch.randn(sizes[0], 1, *sizes[2:]),
    "key only": lambda sizes: torch.randn(1, sizes[1], 1, sizes[3]),
    "query only": lambda sizes: torch.randn(1, sizes[1], sizes[2], 1),
    "-inf": lambda sizes: _with(-torch.inf, lambda b, h, i, j: (i + j) % 3 == 0 or i == 1, sizes),
    "finfo.min": lambda sizes: _with(FINFO_MIN, lambda b, h, i, j: (i + j) % 3 == 0 or i == 1, sizes),
}
