"""Many changed forwards as rows of one batch, which grows from layer to layer.

Row 0 is the unchanged text. Before the layer with an attention site, a copy of row 0 is appended for each change at
that site; the change is applied to its own row. So a layer runs only for the changes in it or before it, and each
weight is read once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headscope.errors import EditError, HeadscopeError, is_out_of_memory
from headscope.heads.effects.metrics import forward_options, run_model
from headscope.watching.hooks import AttentionCall, Forward, unwatched, watch, with_output

Change = Callable[[AttentionCall, int], Tensor]
"""A call and the number of its site → the new outputs of changed heads, [B, H, L, Dv]."""

_CLOSE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class ChangedRow:
    """A row in which these heads of this attention site are changed."""

    layer: int
    heads: tuple[int, ...]


@dataclass(frozen=True)
class SiteShape:
    """The name and the shape of an attention site in an unchanged forward."""

    name: str
    occurrence: int
    heads: int
    head_dim: int
    sees_ahead: bool  # whether the first position of the text sees the last


@dataclass(frozen=True, eq=False)
class CleanForward:
    """An unchanged forward of one row: its output, its sites, and how much memory a row needs."""

    output: Tensor  # [1, T, V] or [1, T, E]
    sites: tuple[SiteShape, ...]
    row_bytes: int


def clean_forward(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, extra: dict[str, Any]
) -> CleanForward:
    """Run the unchanged model on one row [1, T].

    Raises:
        EditError: the model made no attention call.
    """
    sites: list[SiteShape] = []
    largest = [0]

    def on_call(call: AttentionCall, forward: Forward) -> None:
        _, heads, queries, keys = call.shape
        size = call.value.shape[3]
        sites.append(SiteShape(call.name, call.occurrence, heads, size, _sees_ahead(call, forward)))
        weights, states = heads * queries * keys, 8 * heads * queries * size
        largest[0] = max(largest[0], (weights + states) * call.value.element_size())

    with torch.no_grad(), watch(model, on_call):
        output = run_model(model, input_ids, attention_mask, extra)
    if not sites:
        raise EditError(
            f"{type(model).__name__} ran and no attention call was seen, so there are no heads to change: see record()."
        )
    return CleanForward(output, tuple(sites), largest[0] + output[0].numel() * output.element_size())


def _sees_ahead(call: AttentionCall, forward: Forward) -> bool:
    """Whether the first position of the text sees the last."""
    _, heads, queries, keys = call.shape
    if call.is_cross or queries != keys or queries < 2:
        return False
    if call.scores.mask is None:
        return True
    text = list(range(queries))
    if forward.valid is not None and forward.valid.shape[1] == queries:
        text = forward.valid[0].nonzero().flatten().tolist() or text
    with unwatched():
        first, last = slice(text[0], text[0] + 1), slice(text[-1], text[-1] + 1)
        visible = call.scores.visible(slice(0, 1), slice(0, heads), first, last)
    return text[0] < text[-1] and bool(visible.any())


@dataclass(eq=False)
class BatchedForwards:
    """Runs changed rows in groups that fit the memory; remembers for the next text what did not work.

    Attributes:
        model: whose forwards are run.
        change: the new outputs of changed heads.
        extra: arguments of every forward.
        batch_bytes: memory for the rows of one forward.
        notes: what was done in another way than usual, and why.
    """

    model: nn.Module
    change: Change
    batch_bytes: int = 1 << 30
    extra: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _limit: int | None = None
    _grows: bool = True

    def __post_init__(self) -> None:
        self.extra = {**forward_options(self.model, use_cache=False), **self.extra}

    def run(
        self, clean: CleanForward, input_ids: Tensor, attention_mask: Tensor | None, rows: Sequence[ChangedRow]
    ) -> Iterator[tuple[list[ChangedRow], Tensor]]:
        """Groups of rows, each with the outputs [1 + N, …] of the unchanged row 0 and of its rows."""
        layers = self._layers(clean) if self._grows else None
        waiting = sorted(rows, key=lambda row: row.layer)
        while waiting:
            limit = max(1, self.batch_bytes // clean.row_bytes - 1)
            group = waiting[: min(limit, self._limit or limit)]
            try:
                outputs = self._forward(input_ids, attention_mask, group, layers if self._grows else None)
            except _NotGrown as error:
                self._replicate(str(error))
                continue
            except (RuntimeError, MemoryError) as error:
                if is_out_of_memory(error):
                    if len(group) == 1:
                        raise
                    self._limit = len(group) // 2
                    self.notes.append(f"out of memory with {len(group)} heads at a time: went on with {self._limit}")
                elif layers is None or not self._grows:
                    raise
                else:
                    self._replicate(f"{type(error).__name__}: {str(error)[:100]}")
                continue
            except (ValueError, TypeError, HeadscopeError) as error:
                if layers is None or not self._grows:
                    raise
                self._replicate(f"{type(error).__name__}: {str(error)[:100]}")
                continue
            if layers is not None and self._grows and not _same(outputs[:1], clean.output):
                self._replicate("the unchanged row came out differently")
                continue
            yield group, outputs
            del outputs
            waiting = waiting[len(group) :]

    def _replicate(self, why: str) -> None:
        self._grows = False
        self.notes.append(f"each changed row ran from the first layer on, not from its own ({why})")

    def _layers(self, clean: CleanForward) -> list[nn.Module] | None:
        layers = layer_modules(self.model, clean.sites)
        if isinstance(layers, str):
            self._replicate(layers)
            return None
        return layers

    def _forward(
        self, input_ids: Tensor, attention_mask: Tensor | None, group: list[ChangedRow], layers: list[nn.Module] | None
    ) -> Tensor:
        changed: dict[int, list[tuple[int, int]]] = {}  # site → (row, head)
        added: dict[int, int] = {}  # site → rows appended before it
        for number, row in enumerate(group, start=1):
            changed.setdefault(row.layer, []).extend((number, head) for head in row.heads)
            added[row.layer] = added.get(row.layer, 0) + 1

        def change(call: AttentionCall, forward: Forward) -> AttentionCall:
            if forward.number not in changed:
                return call
            rows, heads = (list(part) for part in zip(*changed[forward.number], strict=True))
            new = self.change(call, forward.number)
            outputs = call.head_outputs().clone()
            outputs[rows, heads] = new[rows, heads].to(outputs.dtype)
            return with_output(call, outputs)

        if layers is None:
            rows = len(group) + 1
            input_ids = input_ids.expand(rows, -1)
            attention_mask = None if attention_mask is None else attention_mask.expand(rows, -1)
            with torch.no_grad(), watch(self.model, edit=change):
                return run_model(self.model, input_ids, attention_mask, self.extra)
        with torch.no_grad(), growing(layers, added), watch(self.model, edit=change):
            outputs = run_model(self.model, input_ids, attention_mask, self.extra)
        if outputs.shape[0] != len(group) + 1:
            raise _NotGrown(f"{outputs.shape[0]} rows came out of {len(group) + 1}")
        return outputs


class _NotGrown(Exception):
    """The batch did not grow as it should."""


def layer_modules(model: nn.Module, sites: Sequence[SiteShape]) -> list[nn.Module] | str:
    """The layer of each site, a direct child of one ModuleList; or a string that says why there is none."""
    if any(site.occurrence for site in sites):
        return "an attention module is called more than once in a forward"
    names = [site.name.split(".") for site in sites]
    for innermost in (False, True):
        pairs = [_layer(model, name, innermost) for name in names]
        lists = {parent for parent, _ in pairs}
        if None not in lists and len(lists) == 1 and len({layer for _, layer in pairs}) == len(sites):
            return [model.get_submodule(layer) for _, layer in pairs]
    return "its attention sites are not one in each layer of one ModuleList"


def _layer(model: nn.Module, name: list[str], innermost: bool) -> tuple[str | None, str]:
    """The name of a ModuleList above a module, and of the child of that list which contains the module."""
    lists = [i for i in range(len(name)) if isinstance(model.get_submodule(".".join(name[:i])), nn.ModuleList)]
    if not lists:
        return None, ""
    cut = lists[-1] if innermost else lists[0]
    return ".".join(name[:cut]), ".".join(name[: cut + 1])


@contextmanager
def growing(layers: Sequence[nn.Module], added: dict[int, int]) -> Iterator[None]:
    """Append copies of row 0 to the hidden states before the layer of each site that has changes."""
    handles = []
    rows = 1
    try:
        for index in sorted(added):
            hook = _append(rows, added[index])
            handles.append(layers[index].register_forward_pre_hook(hook, with_kwargs=True))
            rows += added[index]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _append(rows: int, more: int) -> Callable[[nn.Module, Any, dict[str, Any]], Any]:
    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        in_place = bool(args) and isinstance(args[0], Tensor)
        hidden = args[0] if in_place else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor) or hidden.shape[0] != rows:
            received = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise _NotGrown(f"a layer received {received} where {rows} rows of hidden states were wanted")
        grown = torch.cat([hidden, hidden[:1].expand(more, *hidden.shape[1:])])
        if in_place:
            return (grown, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": grown}

    return before


def _same(row: Tensor, plain: Tensor) -> bool:
    """Whether the unchanged row in the batch is what the model gives alone, up to rounding."""
    if row.shape != plain.shape:
        return False
    size = plain.float().abs().max().clamp(min=1e-12)
    return bool((row.float() - plain.float()).abs().max() <= _CLOSE.get(plain.dtype, 1e-4) * size)
