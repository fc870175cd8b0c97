"""What a measure of a head is, and the page that it reads: one attention call over a batch of texts.

Every measure is a ratio of two sums over text rows. Sums add up over texts, machines and days, and a text's padding
or neighbours don't change them; means of ratios would do neither.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from headscope.heads.corpus import Batch
from headscope.heads.measures.products import Linear, Product, Together
from headscope.ops.masks import Mask
from headscope.ops.matrix import AttentionMatrix
from headscope.ops.reductions import Reduction, TransposedProduct

__all__ = ["Column", "Measure", "Page", "Ratio", "Visibility", "take"]

Made = TypeVar("Made")


@dataclass(frozen=True)
class Ratio:
    """A measure's sums over one batch: ``numerator`` and ``denominator`` [B, H]; the value is Σ ÷ Σ."""

    numerator: Tensor
    denominator: Tensor


@dataclass(frozen=True)
class Column:
    """What a column of the atlas means.

    Attributes:
        name: Its name in the table.
        about: Its definition, in a sentence.
        unit: Of its values.
        source: Where the definition comes from (arXiv id), or "ours".
        evidence: Whether intervals are kept for it: roles rest on it.
        over_text: Whether sinks are left out of it (written ° in the documentation).
    """

    name: str
    about: str
    unit: str = "share"
    source: str = "ours"
    evidence: bool = False
    over_text: bool = False


@dataclass(frozen=True, eq=False)
class Visibility:
    """What may be seen in a batch under one mask; shared by all layers that have it."""

    batch: Batch
    mask: Mask | None
    heads: int
    made: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], Made]) -> Made:
        """What follows from the batch and the mask alone, such as a question: made once for all layers."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    @cached_property
    def uniform(self) -> AttentionMatrix:
        """A head that is even over all that it may see: what a measure gives when a head does nothing."""
        rows, length = self.batch.ids.shape
        for count in (1, self.heads):  # a mask may tell heads apart
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
    def keys(self) -> Tensor:
        """How many keys each query may see, [B, L] float64."""
        return self.uniform.logsumexp[:, 0].double().exp().round()

    @cached_property
    def text_keys(self) -> Tensor:
        """How many of these are text, [B, L] float64."""
        share = self.uniform.reduce(Product(self.text[:, None, :, None].float()))[0]
        return (share[:, 0, :, 0].double() * self.keys).round()

    @cached_property
    def lookers(self) -> Tensor:
        """How many of the rows that count may see each key, [B, S] float64."""
        counted = (self.rows * self.keys)[:, None, :, None].float()
        heads = self.uniform.shape[1]
        seen = self.uniform.reduce(TransposedProduct(counted.expand(-1, heads, -1, -1)))[0]
        return seen[:, 0, :, 0].double().round()

    @cached_property
    def rows(self) -> Tensor:
        """Which queries count: text that may see at least two keys that are text. [B, L] bool."""
        return self.text & (self.text_keys >= 2)


@dataclass(frozen=True, eq=False)
class Page:
    """One attention call over a batch: its weights, and what is known of its positions.

    Attributes:
        matrix: The weights, [B, H, L, S].
        seen: The batch, and what its mask lets be seen.
        value: [B, G, S, Dv], or None for the uniform head.
        out_weight: The output projection's weight, [E, H·Dv], or None where it is not known.
        answers: What was asked of the weights, by the names that ``questions`` gave.
    """

    matrix: AttentionMatrix
    seen: Visibility
    value: Tensor | None = None
    out_weight: Tensor | None = None
    answers: dict[str, Any] = field(default_factory=dict)

    @property
    def batch(self) -> Batch:
        """The texts."""
        return self.seen.batch

    @property
    def text(self) -> Tensor:
        """Which positions are text, neither padding nor sinks: [B, S] bool."""
        return self.seen.text

    @property
    def rows(self) -> Tensor:
        """Which queries count: text that may see at least two keys that are text. [B, L] bool."""
        return self.seen.rows

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

        Float32 is added up as such: torch does so in a tree, which is as good and takes half of the time.
        """
        values = values if values.dtype in (torch.float32, torch.float64) else values.double()
        rows = self.seen.rows.to(values.dtype).view(len(values), 1, -1, *[1] * (values.dim() - 3))
        return (values * rows).sum(2).double()

    @cached_property
    def count(self) -> Tensor:
        """How many rows count, [B, H]."""
        return self.rows.sum(-1).double().unsqueeze(1).expand(-1, self.matrix.shape[1])


class Measure(ABC):
    """A score of heads. Write your own by giving its columns, what it asks of the weights, and its sums.

    Example:
        >>> from headscope.heads.measures import Column, Measure, Ratio
        >>> from headscope.ops.reductions import Reduction
        >>> class Far(Measure):
        ...     columns = (Column("far", "weight on keys more than 20 tokens back"),)
        ...
        ...     def questions(self, page):
        ...         return {"far": FarMass()}
        ...
        ...     def sums(self, page):
        ...         return {"far": Ratio(page.over_rows(page.answers["far"]), page.count)}
        >>> class FarMass(Reduction):
        ...     def start(self, shape, like):
        ...         return like.new_zeros(shape[:3])
        ...
        ...     def update(self, state, block):
        ...         state[block.at] += (block.weights * (block.q_idx - block.kv_idx > 20)).sum(-1)
    """

    columns: tuple[Column, ...] = ()

    def reads(self, batch: Batch) -> bool:
        """Whether this measure is for such texts: most are for all that are not made of repeats."""
        return not any(piece.period for piece in batch.pieces)

    @abstractmethod
    def questions(self, page: Page) -> dict[str, Reduction]:
        """What to ask of the weights, by name; measures that use the same name share the question and its answer."""

    @abstractmethod
    def sums(self, page: Page) -> dict[str, Ratio]:
        """The sums of each column, from ``page.answers``."""


def take(measures: Iterable[Measure], page: Page) -> dict[str, Ratio]:
    """All measures of one page, by one pass over its weights.

    Args:
        measures: What to take; questions of the same name are asked once.
        page: One attention call; its ``answers`` are filled here.
    """
    asked = tuple(measures)
    questions: dict[str, Reduction] = {}
    for taken in asked:
        for name, question in taken.questions(page).items():
            questions.setdefault(name, question)
    page.answers.update(_answers(page.matrix, questions))
    return {name: ratio for taken in asked for name, ratio in taken.sums(page).items()}


def _answers(matrix: AttentionMatrix, questions: dict[str, Reduction]) -> dict[str, Any]:
    """What the weights say to all questions, by one pass in which all that a product answers share one."""
    linear = {name: question for name, question in questions.items() if isinstance(question, Linear)}
    others = [name for name in questions if name not in linear]
    asked = [questions[name] for name in others]
    if linear:
        asked.append(Together(list(linear.values())))
    if not asked:
        return {}
    found = matrix.reduce(*asked)
    if linear:
        others, found = [*others, *linear], (*found[:-1], *found[-1])
    return dict(zip(others, found, strict=True))
