"""What a measure of a head is, and the attention of one call over a batch of texts, which it reads.

Every measure is a ratio of two sums over rows of text. Sums of texts, machines and days add up, and padding or other
texts in the batch don't change them. Means of ratios would not add up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from headscope.heads.corpus import TextBatch
from headscope.heads.measures.products import Product, ProductReduction, SharedProduct
from headscope.ops.masks import Mask
from headscope.ops.matrix import AttentionMatrix
from headscope.ops.reductions import Reduction, TransposedProduct

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ratio:
    """A measure's sums over one batch: ``numerator`` and ``denominator`` [B, H]; the value is Σ ÷ Σ."""

    numerator: Tensor
    denominator: Tensor


@dataclass(frozen=True)
class Column:
    """A column of the atlas.

    Attributes:
        name: Its name in the table.
        about: Its definition, in a sentence.
        unit: The unit of its values.
        source: Where the definition comes from (arXiv id), or "ours".
        evidence: Whether its sums have replicates, for intervals; roles need them.
        over_text: Whether sinks are left out (written ° in the documentation).
    """

    name: str
    about: str
    unit: str = "share"
    source: str = "ours"
    evidence: bool = False
    over_text: bool = False


@dataclass(frozen=True, eq=False)
class Visibility:
    """Which keys each query of a batch sees under one mask; shared by all layers with that mask."""

    batch: TextBatch
    mask: Mask | None
    heads: int
    cache: dict[str, Any] = field(default_factory=dict)

    def cached(self, name: str, compute: Callable[[], Value]) -> Value:
        """A value that depends on the batch and the mask alone, such as a reduction: computed once for all layers."""
        if name not in self.cache:
            self.cache[name] = compute()
        return self.cache[name]

    @cached_property
    def uniform(self) -> AttentionMatrix:
        """Uniform attention over all visible keys: the null of every measure."""
        rows, length = self.batch.ids.shape
        for count in (1, self.heads):  # a mask may differ between heads
            zeros = torch.zeros(rows, count, length, 8, device=self.batch.ids.device)
            try:
                return AttentionMatrix(zeros, zeros, mask=self.mask)
            except ValueError:
                if count == self.heads:
                    raise
        raise AssertionError("unreachable")

    @cached_property
    def text(self) -> Tensor:
        """Which positions are text, neither padding nor sinks: [B, S] bool."""
        return self.batch.valid & ~self.batch.sinks

    @cached_property
    def keys_per_query(self) -> Tensor:
        """How many keys each query sees, [B, L] float64."""
        return self.uniform.logsumexp[:, 0].double().exp().round()

    @cached_property
    def text_keys_per_query(self) -> Tensor:
        """How many text keys each query sees, [B, L] float64."""
        share = self.uniform.reduce(Product(self.text[:, None, :, None].float()))[0]
        return (share[:, 0, :, 0].double() * self.keys_per_query).round()

    @cached_property
    def queries_per_key(self) -> Tensor:
        """How many of the counted rows see each key, [B, S] float64."""
        counts = (self.rows * self.keys_per_query)[:, None, :, None].float()
        heads = self.uniform.shape[1]
        queries = self.uniform.reduce(TransposedProduct(counts.expand(-1, heads, -1, -1)))[0]
        return queries[:, 0, :, 0].double().round()

    @cached_property
    def rows(self) -> Tensor:
        """Which rows count: queries that are text and see at least two text keys. [B, L] bool."""
        return self.text & (self.text_keys_per_query >= 2)


@dataclass(frozen=True, eq=False)
class AttentionBatch:
    """The attention of one call over a batch of texts.

    Attributes:
        matrix: The weights, [B, H, L, S].
        visibility: The texts, and which keys each query sees.
        value: [B, G, S, Dv], or None for uniform attention.
        out_weight: The output projection's weight, [E, H·Dv], or None where it is unknown.
        results: The results of the measures' reductions, by name.
    """

    matrix: AttentionMatrix
    visibility: Visibility
    value: Tensor | None = None
    out_weight: Tensor | None = None
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def texts(self) -> TextBatch:
        """The texts."""
        return self.visibility.batch

    @property
    def text(self) -> Tensor:
        """Which positions are text, neither padding nor sinks: [B, S] bool."""
        return self.visibility.text

    @property
    def rows(self) -> Tensor:
        """Which rows count: queries that are text and see at least two text keys. [B, L] bool."""
        return self.visibility.rows

    @cached_property
    def norms(self) -> Tensor | None:
        """‖v_j W_O‖ of every head and key, [B, H, S]: how much a key's value writes (arXiv 2004.10102)."""
        if self.value is None or self.out_weight is None:
            return None
        heads, size = self.matrix.shape[1], self.value.shape[-1]
        if self.out_weight.shape[1] != heads * size:
            return None
        weight = self.out_weight.float().unflatten(1, (heads, size)).transpose(0, 1)  # [H, E, Dv]
        gram = (weight.transpose(1, 2) @ weight).unflatten(0, (self.value.shape[1], -1))  # [G, H/G, Dv, Dv]
        value = self.value.float()
        product = (value @ gram.transpose(1, 2).flatten(2)).unflatten(-1, (-1, size))  # [B, G, S, H/G, Dv]
        squares = product.mul_(value.unsqueeze(3)).sum(-1)
        return squares.clamp_(min=0).sqrt_().transpose(2, 3).flatten(1, 2)

    def over_rows(self, values: Tensor) -> Tensor:
        """Sum of [B, H, L, …] over the rows that count: [B, H, …], as float64.

        Float32 is summed in float32: torch sums in a tree, which is as exact and takes half of the time.
        """
        values = values if values.dtype in (torch.float32, torch.float64) else values.double()
        rows = self.rows.to(values.dtype).view(len(values), 1, -1, *[1] * (values.dim() - 3))
        return (values * rows).sum(2).double()

    @cached_property
    def row_count(self) -> Tensor:
        """How many rows count, [B, H]."""
        return self.rows.sum(-1).double().unsqueeze(1).expand(-1, self.matrix.shape[1])


class Measure(ABC):
    """A score of heads. For your own, write its columns, the reductions of the weights that it needs, and its sums.

    Example:
        >>> from headscope.heads.measures import Column, Measure, Ratio
        >>> from headscope.ops.reductions import Reduction
        >>> class Far(Measure):
        ...     columns = (Column("far", "weight on keys more than 20 tokens back"),)
        ...
        ...     def reductions(self, batch):
        ...         return {"far": FarMass()}
        ...
        ...     def sums(self, batch):
        ...         return {"far": Ratio(batch.over_rows(batch.results["far"]), batch.row_count)}
        >>> class FarMass(Reduction):
        ...     def start(self, shape, like):
        ...         return like.new_zeros(shape[:3])
        ...
        ...     def update(self, state, block):
        ...         state[block.at] += (block.weights * (block.q_idx - block.kv_idx > 20)).sum(-1)
    """

    columns: tuple[Column, ...] = ()

    def reads(self, texts: TextBatch) -> bool:
        """Whether this measure is for such texts: by default for all but repeated random tokens."""
        return not any(piece.period for piece in texts.pieces)

    @abstractmethod
    def reductions(self, batch: AttentionBatch) -> dict[str, Reduction]:
        """The reductions that the sums need, by name; measures that use the same name share a reduction."""

    @abstractmethod
    def sums(self, batch: AttentionBatch) -> dict[str, Ratio]:
        """The sums of each column, from ``batch.results``."""


def take(measures: Iterable[Measure], batch: AttentionBatch) -> dict[str, Ratio]:
    """The sums of all measures, by one pass over the weights.

    Args:
        measures: The measures; reductions of the same name are computed once.
        batch: One attention call; its ``results`` are filled here.
    """
    measures = tuple(measures)
    reductions: dict[str, Reduction] = {}
    for measure in measures:
        for name, reduction in measure.reductions(batch).items():
            reductions.setdefault(name, reduction)
    batch.results.update(_reduce(batch.matrix, reductions))
    return {name: ratio for measure in measures for name, ratio in measure.sums(batch).items()}


def _reduce(matrix: AttentionMatrix, reductions: dict[str, Reduction]) -> dict[str, Any]:
    """The results of all reductions, by one pass in which those that are products share one product."""
    products = {name: reduction for name, reduction in reductions.items() if isinstance(reduction, ProductReduction)}
    others = {name: reduction for name, reduction in reductions.items() if name not in products}
    if not products:
        return dict(zip(others, matrix.reduce(*others.values()), strict=True)) if others else {}
    *results, shared = matrix.reduce(*others.values(), SharedProduct(list(products.values())))
    return dict(zip([*others, *products], [*results, *shared], strict=True))
