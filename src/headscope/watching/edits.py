"""edit(model): ablate heads, knock out links, patch or freeze weights; the model is unchanged after the block.

An edit acts where the attention function returns: the model's own function runs first, unchanged. Then the rows and
heads that an edit names are computed again as edited, by the same kernels; no L×S matrix is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from operator import index as as_index

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headscope.errors import EditError
from headscope.ops import masks
from headscope.ops.kernels.fused import product
from headscope.ops.masks import Mask
from headscope.ops.positions import Alibi
from headscope.ops.scores import Scores, make_scores
from headscope.watching.hooks import OTHER_THREADS, AttentionCall, Forward, Threads, watch, with_output
from headscope.watching.recording import Layers, Position, Recording, Tracker, layers_of


@dataclass(frozen=True)
class Edit:
    """One change to some attention sites; ``layers`` by number in the order of first calls, or by module name."""

    layers: tuple[int | str, ...] | None

    def applies(self, index: int, call: AttentionCall) -> bool:
        """Whether the edit names this call."""
        return self.layers is None or index in self.layers or call.name in self.layers

    def at(self, index: int) -> Edit:
        """The edit for the site of this number: itself, unless it holds something for each site."""
        return self

    def apply(self, call: AttentionCall, position: Position) -> AttentionCall:
        """The call as edited, or itself; ``position`` is that of its first row and first key in the whole text."""
        raise EditError(f"{type(self).__name__} does not say what it changes: subclass Edit and write apply().")


@dataclass(frozen=True)
class Ablate(Edit):
    """The output of some heads becomes zero, or one vector at every position."""

    heads: tuple[int, ...]
    to: Tensor | None = field(default=None, compare=False, repr=False)  # [H, Dv] or [layers, H, Dv]

    def at(self, index: int) -> Ablate:
        """With the vectors of this site."""
        if self.to is None or self.to.dim() != 3:
            return self
        if index >= self.to.shape[0]:
            raise EditError(
                f"ablate: `to` is {tuple(self.to.shape)}, [layers, H, Dv], and has no site {index}: wanted one "
                "[H, Dv] for each attention call of a forward, as head_means() of this model gives."
            )
        return replace(self, to=self.to[index])

    def apply(self, call: AttentionCall, position: Position) -> AttentionCall:
        """Replace the heads' outputs; the weights stay what they were."""
        _check_heads(self.heads, call)
        outputs = call.head_outputs()
        chosen = torch.zeros(outputs.shape[1], dtype=torch.bool, device=outputs.device)
        chosen[list(self.heads)] = True
        chosen = chosen.view(1, -1, 1, 1)
        if self.to is None:
            return with_output(call, outputs.masked_fill(chosen, 0))
        wanted = (outputs.shape[1], outputs.shape[3])
        if tuple(self.to.shape) != wanted:
            raise EditError(
                f"ablate: `to` is {tuple(self.to.shape)} at {call.name}, whose heads write {wanted}, [H, Dv]: give "
                "that, or [layers, H, Dv] for every site, as head_means() of this model gives."
            )
        return with_output(call, torch.where(chosen, self.to.to(outputs)[None, :, None], outputs))


@dataclass(frozen=True)
class KnockOut(Edit):
    """Some keys are hidden from some queries before the softmax, so that the other weights of the row grow."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    heads: tuple[int, ...] | None

    def apply(self, call: AttentionCall, position: Position) -> AttentionCall:
        """Hide the links, and compute the rows that had them again."""
        _refuse_dropout(self, call)
        _check_known(self, call, position)
        batch, num_heads, rows, num_keys = call.shape
        chosen = tuple(range(num_heads)) if self.heads is None else self.heads
        _check_heads(chosen, call)
        rows_here = [q - position.first_row for q in self.queries if 0 <= q - position.first_row < rows]
        keys = [k - position.first_key for k in self.keys if 0 <= k - position.first_key < num_keys]
        if not rows_here or not keys:
            return call
        first = call.scores.origin[2]
        rule = masks.queries(row + first for row in rows_here) & masks.keys(keys)
        if self.heads is not None:
            rule = rule & masks.heads(self.heads)
        allowed = ~rule if call.scores.mask is None else call.scores.mask & ~rule
        edited = replace(call.scores, mask=allowed)
        value = _per_head(call.value, edited.key.shape[1])  # a patched head has keys of its own
        outputs = call.head_outputs().clone()
        for row in rows_here:
            part = edited.narrow(slice(0, batch), slice(0, num_heads), slice(row, row + 1))
            new = product(part, value)
            outputs[:, list(chosen), row] = new[:, list(chosen), 0].to(outputs.dtype)
        return with_output(call, outputs, edited)


@dataclass(frozen=True)
class Patch(Edit):
    """Some heads attend as in a recording: with its queries and keys, and the values of this forward."""

    heads: tuple[int, ...]
    source: Callable[[AttentionCall, Position], Scores]

    def apply(self, call: AttentionCall, position: Position) -> AttentionCall:
        """Apply the recorded weights to the values of this forward."""
        _refuse_dropout(self, call)
        _check_heads(self.heads, call)
        recorded = _same_shape("patch", self.source(call, position), call)
        outputs = call.head_outputs().clone()
        chosen = list(self.heads)
        new = product(recorded, _per_head(call.value, call.shape[1]))
        outputs[:, chosen] = new[:, chosen].to(outputs.dtype)
        return with_output(call, outputs, _mixed(call.scores, recorded, self.heads))


@dataclass(frozen=True)
class Freeze(Edit):
    """All heads attend as in a recording, to the values of this forward: other edits do not change their weights."""

    source: Callable[[AttentionCall, Position], Scores]

    def apply(self, call: AttentionCall, position: Position) -> AttentionCall:
        """Attend with the recorded queries and keys to the values of this forward."""
        _refuse_dropout(self, call)
        recorded = _same_shape("freeze", self.source(call, position), call)
        new = product(recorded, _per_head(call.value, recorded.key.shape[1]))
        return with_output(call, new.to(call.value.dtype), recorded)


def ablate(layer: Layers, head: int | Iterable[int], *, to: Tensor | None = None) -> Ablate:
    """Replace the output of a head before the output projection: ``ablate(13, 8)``; several: ``ablate(13, [2, 8])``.

    Args:
        layer: number in the order of first calls (that of ``recording[i]``), module name, several, or None for all.
        head: which heads, counted from 0.
        to: None writes zeros. A tensor of mean head outputs, [H, Dv] for this site or [layers, H, Dv] for all of
            them (``head_means``), writes the head's own row at every position: mean ablation, which removes what
            depends on this text and leaves the constant part (Wang et al. 2022, arXiv 2211.00593).

    Raises:
        EditError: heads that are no numbers from 0; inside the block, heads that don't exist, ``to`` of another shape.
    """
    if to is not None and to.dim() not in (2, 3):
        raise EditError(f"ablate: `to` is {tuple(to.shape)}; wanted means [H, Dv], or [layers, H, Dv].")
    return Ablate(layers_of(layer), _positions("head", head), to)


def knock_out(
    query: int | Iterable[int],
    key: int | Iterable[int],
    *,
    layers: Layers = None,
    heads: int | Iterable[int] | None = None,
) -> KnockOut:
    """Hide key position(s) from query position(s), counted from 0 in the whole text, in all batch rows.

    A word is its tokens: ``knock_out(tokens.find("it").tokens, tokens.find("animal").tokens)``. A query without
    any visible key has zeros as output.

    Args:
        query: positions of the queries.
        key: positions that are hidden from them.
        layers: None means every attention site.
        heads: None means all heads.
    """
    chosen = None if heads is None else _positions("heads", heads)
    return KnockOut(layers_of(layers), _positions("query", query), _positions("key", key), chosen)


def patch(layer: Layers, head: int | Iterable[int], *, from_: Recording) -> Patch:
    """Let a head attend as in ``from_``: another text, at least as long, or another model of the same shape.

    Raises:
        EditError: inside the block, where the recording does not have this site or its shape.
    """
    return Patch(layers_of(layer), _positions("head", head), _patterns("patch", from_))


def freeze(*, from_: Recording, layers: Layers = None) -> Freeze:
    """Keep the weights of every head as they are in ``from_``, while values change.

    ``edit(model, ablate(3, 1), freeze(from_=clean))`` removes what head 3.1 adds to the values that later layers
    read, and leaves what they attend to: pattern-preserving ablation (Olsson et al. 2022, arXiv 2209.11895). The heads
    attend again with the recorded queries and keys; no L×S matrix is built. Of several edits ``freeze`` acts
    first, whatever its position in the list, and ablations last: other edits compute outputs again.

    Args:
        from_: a recording of the same text (or one at least as long) by the same model.
        layers: None means every attention site, all of which must then be in the recording.

    Raises:
        EditError: inside the block, where the recording does not have this site or its shape, or under dropout.

    Example:
        >>> import torch
        >>> from headscope import record
        >>> layer, x = torch.nn.MultiheadAttention(16, 4), torch.randn(7, 2, 16)
        >>> with record(layer) as clean:
        ...     before, _ = layer(x, x, x)
        >>> with edit(layer, freeze(from_=clean)):
        ...     after, _ = layer(x, x, x)
        >>> torch.allclose(before, after, atol=1e-5)
        True
    """
    return Freeze(layers_of(layers), _patterns("freeze", from_))


@contextmanager
def edit(model: nn.Module, *edits: Edit, threads: Threads = "own") -> Iterator[None]:
    """Run ``model`` with changed attention inside the block; ``record`` inside shows the edited weights.

    Args:
        model: as for record().
        edits: applied in this order at each attention call that they name, freeze() before all others.
        threads: "own": forwards in other threads run unchanged; "all": they are edited, too, for data-parallel code.

    Raises:
        EditError: an edit that applied nowhere, a head that does not exist, gradient checkpointing with
            gradients on, dropout where a pattern is changed. It is raised when the block ends: from the error on, the
            model runs unchanged.

    Example:
        >>> import torch
        >>> layer = torch.nn.MultiheadAttention(16, 4)
        >>> with edit(layer, ablate(0, [0, 1, 2, 3])), torch.no_grad():
        ...     output, _ = layer(*[torch.randn(7, 2, 16)] * 3)
        >>> bool((output == layer.out_proj.bias).all())
        True
    """
    for item in edits:
        if not isinstance(item, Edit):
            raise EditError(
                f"edit() got {type(item).__name__}; wanted edits: ablate(…), knock_out(…), patch(…), freeze(…)."
            )
    used: set[int] = set()
    called: set[tuple[int, int | str]] = set()  # numbers of edits, and those of their layers that were called
    forwards: list[Forward] = []
    tracker = Tracker()
    order = sorted(range(len(edits)), key=lambda number: _precedence(edits[number]))

    def change(call: AttentionCall, forward: Forward) -> AttentionCall:
        position = tracker.position(call, forward)
        for number in order:
            if edits[number].applies(forward.number, call):
                called.update((number, layer) for layer in (forward.number, call.name))
                edited = edits[number].at(forward.number).apply(call, position)
                if edited is not call:
                    used.add(number)
                call = edited
        return call

    with watch(model, edit=change, on_end=forwards.append, threads=threads) as watcher:
        yield
    if watcher.ran_in_other_threads and not called:
        raise EditError(f'{OTHER_THREADS} edit(model, …, threads="all") edits these, too.')
    unused = [item for number, item in enumerate(edits) if number not in used]
    if unused and forwards:
        raise EditError(
            f"{unused[0]} changed nothing: no attention call had such a layer, query or key. Layers count from 0 "
            "in the order of calls, or are module names as record() lists them; positions count from 0 in the text."
        )
    for number, item in enumerate(edits):
        missing = [layer for layer in item.layers or () if (number, layer) not in called]
        if missing and forwards:
            raise EditError(f"{item} names the layer {missing[0]!r}, and no attention call had it.")


def _precedence(edit: Edit) -> int:
    """Freezing first, ablations last: outputs computed from other weights would undo an ablation."""
    return 0 if isinstance(edit, Freeze) else 2 if isinstance(edit, Ablate) else 1


def _patterns(edit_name: str, recording: Recording) -> Callable[[AttentionCall, Position], Scores]:
    """Gives the recorded operands for the rows and keys of a call."""

    def source(call: AttentionCall, position: Position) -> Scores:
        sites = [s for s in recording.sites if (s.name, s.occurrence) == (call.name, call.occurrence)]
        if not sites:
            raise EditError(
                f"{edit_name}: the recording has no site {call.name!r}: record the same model with these layers."
            )
        whole = sites[0].scores()
        first, rows = position.first_row + position.num_virtual, call.shape[2]
        first -= 0 if call.is_cross else whole.origin[2]
        keys = position.first_key + position.num_virtual + call.shape[3]
        beyond = first < 0 or first + rows > whole.shape[2] or keys > whole.shape[3]
        if whole.shape == tuple(call.shape) or beyond:
            return whole
        if not position.known:
            raise EditError(f"{edit_name}: nothing says at which positions of the text {call.name} attends.")
        part = whole.narrow(slice(0, whole.shape[0]), slice(0, whole.shape[1]), slice(first, first + rows))
        bias = part.bias
        bias = bias[..., :keys] if isinstance(bias, Tensor) and bias.shape[3] > 1 else bias
        return replace(part, key=part.key[:, :, :keys], bias=bias)

    return source


def _same_shape(edit_name: str, recorded: Scores, call: AttentionCall) -> Scores:
    if tuple(recorded.shape) != tuple(call.shape):
        raise EditError(
            f"{edit_name}: {call.name} attends as {tuple(call.shape)} (B, H, L, S), but as {tuple(recorded.shape)} "
            "in the recording: record a text at least as long, with the same batch."
        )
    return recorded


def _per_head(value: Tensor, heads: int) -> Tensor:
    return value if value.shape[1] == heads else value.repeat_interleave(heads // value.shape[1], 1)


def _mixed(own: Scores, other: Scores, chosen: tuple[int, ...]) -> Scores:
    """Operands of which the chosen heads are those of ``other``."""
    heads = own.shape[1]
    operands = (own.query, _per_head(own.key, heads), other.query, _per_head(other.key, heads))
    size = max(x.shape[3] for x in operands)  # not equal where a cache had rounded recorded keys
    query, key, *others = (F.pad(x, (0, size - x.shape[3])).clone() for x in operands)
    index = list(chosen)
    query[:, index] = (others[0] * (other.scale / own.scale))[:, index].to(query.dtype)
    key[:, index] = others[1][:, index].to(key.dtype)
    mask = _either(own.mask, other.mask, masks.heads(chosen))
    return make_scores(query, key, mask, _mixed_bias(own, other, index), own.scale, own.softcap, own.sinks)


def _mixed_bias(own: Scores, other: Scores, index: list[int]) -> Tensor | Alibi | None:
    if own.bias is None and other.bias is None:
        return None
    aligned = own.origin == other.origin == (0, 0, own.shape[3] - own.shape[2])
    if isinstance(own.bias, Alibi) and isinstance(other.bias, Alibi) and aligned:
        slopes = own.bias.slopes.clone()
        slopes[index] = other.bias.slopes[index]
        return Alibi(slopes)
    zero = own.query.new_zeros((1, 1, 1, 1))
    first, second = (zero if b is None else b for b in (own.bias_tensor, other.bias_tensor))
    is_other = torch.zeros(own.shape[1], dtype=torch.bool, device=own.query.device)
    is_other[index] = True
    return torch.where(is_other.view(1, -1, 1, 1), second, first)


def _either(own: Mask | None, other: Mask | None, chosen: Mask) -> Mask | None:
    """The mask ``other`` for the chosen heads, ``own`` for the rest."""
    if own is None and other is None:
        return None
    unchosen_part = chosen if own is None else own | chosen
    chosen_part = ~chosen if other is None else other | ~chosen
    return unchosen_part & chosen_part


def _check_heads(heads: tuple[int, ...], call: AttentionCall) -> None:
    if max(heads) >= call.shape[1]:
        raise EditError(f"{call.name} has {call.shape[1]} heads, counted from 0; there is no head {max(heads)}.")


def _check_known(edit: Edit, call: AttentionCall, position: Position) -> None:
    if not position.known:
        raise EditError(
            f"{type(edit).__name__}: nothing says which positions of the text the queries of {call.name} have, "
            f"{tuple(call.shape)} (B, H, L, S): open edit() before the text begins, with an empty cache and a causal "
            "mask. A ring buffer cannot be edited by position, nor a batch with texts at different positions."
        )


def _refuse_dropout(edit: Edit, call: AttentionCall) -> None:
    if call.dropout_p:
        raise EditError(
            f"{type(edit).__name__} changes weights, but {call.name} drops {100 * call.dropout_p:.0f} % of its weights "
            "at random: call model.eval() first."
        )


def _positions(name: str, value: int | Iterable[int]) -> tuple[int, ...]:
    items = tuple(value) if isinstance(value, Iterable) else (value,)
    try:
        positions = tuple(as_index(item) for item in items)
    except TypeError:
        positions = ()
    if not positions or min(positions) < 0 or any(isinstance(item, bool) for item in items):
        raise EditError(f"{name} is {value!r}: wanted positions counted from 0.")
    return positions
