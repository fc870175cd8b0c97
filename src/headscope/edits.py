"""edit(model): ablate a head, knock out a link, patch a pattern; everything is as before after the block.

An edit acts where the attention function returns: the model's own function runs first, unchanged; then the rows
and heads that an edit names are computed again as edited, by the same kernels, and nothing L×S is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from headscope import kernels, masks
from headscope.errors import EditError
from headscope.masks import Mask
from headscope.recording import Place, Recording, Tracker
from headscope.scores import Scores, make_scores
from headscope.seam import AttentionCall, Forward, watch, with_output

__all__ = ["Ablate", "Edit", "KnockOut", "Patch", "ablate", "edit", "knock_out", "patch"]

Layers = int | str | Iterable[int | str] | None


@dataclass(frozen=True)
class Edit:
    """One change to some attention sites; ``layers`` by number in the order of calls, or by module name."""

    layers: tuple[int | str, ...] | None

    def applies(self, index: int, call: AttentionCall) -> bool:
        """Whether this call is meant."""
        return self.layers is None or index in self.layers or call.name in self.layers

    def apply(self, call: AttentionCall, place: Place) -> AttentionCall:
        """The call as edited, or itself; ``place`` says where its rows and keys stand in the whole text."""
        raise EditError(f"{type(self).__name__} does not say what it changes: subclass Edit and write apply().")


@dataclass(frozen=True)
class Ablate(Edit):
    """The output of some heads is zero: what they would have written is not written."""

    heads: tuple[int, ...]

    def apply(self, call: AttentionCall, place: Place) -> AttentionCall:
        """Zero the heads' outputs; the weights stay what they were."""
        _check_heads(self.heads, call)
        outputs = call.head_outputs()
        kept = torch.ones(outputs.shape[1], dtype=outputs.dtype, device=outputs.device)
        kept[list(self.heads)] = 0
        return with_output(call, outputs * kept.view(1, -1, 1, 1))


@dataclass(frozen=True)
class KnockOut(Edit):
    """Some queries may not look at some keys: hidden before the softmax, so that the rest of the row grows."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    heads: tuple[int, ...] | None

    def apply(self, call: AttentionCall, place: Place) -> AttentionCall:
        """Hide the links, and compute the rows that had them again."""
        _refuse_dropout(self, call)
        batch, num_heads, rows, num_keys = call.shape
        chosen = tuple(range(num_heads)) if self.heads is None else self.heads
        _check_heads(chosen, call)
        here = [q - place.first_row for q in self.queries if 0 <= q - place.first_row < rows]
        keys = [k - place.first_key for k in self.keys if 0 <= k - place.first_key < num_keys]
        if not here or not keys:
            return call
        first = call.scores.origin[2]
        rule = masks.queries(row + first for row in here) & masks.keys(keys)
        if self.heads is not None:
            rule = rule & masks.heads(self.heads)
        allowed = ~rule if call.scores.mask is None else call.scores.mask & ~rule
        edited = replace(call.scores, mask=allowed)
        outputs = call.head_outputs().clone()
        for row in here:
            part = edited.narrow(slice(0, batch), slice(0, num_heads), slice(row, row + 1))
            new = kernels.product(part, call.value)
            outputs[:, list(chosen), row] = new[:, list(chosen), 0].to(outputs.dtype)
        return with_output(call, outputs, edited)


@dataclass(frozen=True)
class Patch(Edit):
    """Some heads attend as they did in a recording: its queries and keys make the pattern, ours are the values."""

    heads: tuple[int, ...]
    source: Callable[[AttentionCall, Place], Scores]

    def apply(self, call: AttentionCall, place: Place) -> AttentionCall:
        """Take the recorded pattern over the values of now."""
        _refuse_dropout(self, call)
        _check_heads(self.heads, call)
        given = self.source(call, place)
        if tuple(given.shape) != tuple(call.shape):
            raise EditError(
                f"patch: {call.name} attends as {tuple(call.shape)} (B, H, L, S) here, but as {tuple(given.shape)} in "
                "the recording: record a text at least as long, with the same batch."
            )
        outputs = call.head_outputs().clone()
        chosen = list(self.heads)
        new = kernels.product(given, _per_head(call.value, call.shape[1]))
        outputs[:, chosen] = new[:, chosen].to(outputs.dtype)
        return with_output(call, outputs, _mixed(call.scores, given, self.heads))


def ablate(layer: Layers, head: int | Iterable[int]) -> Ablate:
    """Zero the output of a head before the output projection: ``ablate(13, 8)``; several: ``ablate(13, [2, 8])``."""
    return Ablate(_layers(layer), _positions("head", head))


def knock_out(
    query: int | Iterable[int],
    key: int | Iterable[int],
    *,
    layers: Layers = None,
    heads: int | Iterable[int] | None = None,
) -> KnockOut:
    """Forbid a link from query position(s) to key position(s), counted from 0 in the whole text, in all batch rows.

    A word is its tokens: ``knock_out(tokens.find("it").tokens, tokens.find("animal").tokens)``. A query that is left
    with nothing to look at writes zeros.

    Args:
        query: positions that may not look.
        key: positions that they may not look at.
        layers: None means every attention site.
        heads: None means all heads.
    """
    chosen = None if heads is None else _positions("heads", heads)
    return KnockOut(_layers(layers), _positions("query", query), _positions("key", key), chosen)


def patch(layer: Layers, head: int | Iterable[int], *, from_: Recording) -> Patch:
    """Let a head attend as it did in ``from_``: another text, at least as long, or another model of the same shape.

    Raises:
        EditError: inside the block, where the recording does not have this site or its shape.
    """

    def source(call: AttentionCall, place: Place) -> Scores:
        found = [s for s in from_.run.calls_of_sites if (s.name, s.occurrence) == (call.name, call.occurrence)]
        if not found:
            raise EditError(f"patch: the recording has no site {call.name!r}: record the same model with these layers.")
        whole = found[0].scores()
        first, rows, keys = place.first_row, call.shape[2], place.first_key + call.shape[3]
        if whole.shape == tuple(call.shape) or first + rows > whole.shape[2] or keys > whole.shape[3]:
            return whole
        part = whole.narrow(slice(0, whole.shape[0]), slice(0, whole.shape[1]), slice(first, first + rows))
        bias = part.bias_tensor
        bias = bias if bias is None or bias.shape[3] == 1 else bias[..., :keys]
        return replace(part, key=part.key[:, :, :keys], bias=bias)

    return Patch(_layers(layer), _positions("head", head), source)


@contextmanager
def edit(model: nn.Module, *edits: Edit) -> Iterator[None]:
    """Run ``model`` with changed attention while the block lasts; ``record`` inside shows the edited weights.

    Args:
        model: as for record().
        edits: applied in this order at each attention call that they name.

    Raises:
        EditError: an edit that did not apply anywhere, a head that is not there, gradient checkpointing with
            gradients on, dropout where a pattern is changed.

    Example:
        >>> import torch
        >>> layer = torch.nn.MultiheadAttention(16, 4)
        >>> with edit(layer, ablate(0, [0, 1, 2, 3])), torch.no_grad():
        ...     output, _ = layer(*[torch.randn(7, 2, 16)] * 3)
        >>> bool((output == layer.out_proj.bias).all())
        True
    """
    for given in edits:
        if not isinstance(given, Edit):
            raise EditError(f"edit() got {type(given).__name__}; wanted edits: ablate(…), knock_out(…), patch(…).")
    used: set[int] = set()
    forwards: list[Forward] = []
    tracker = Tracker()

    def change(call: AttentionCall, forward: Forward) -> AttentionCall:
        place = tracker.place(call)
        for number, given in enumerate(edits):
            if given.applies(forward.calls, call):
                edited = given.apply(call, place)
                if edited is not call:
                    used.add(number)
                call = edited
        return call

    with watch(model, edit=change, on_end=forwards.append):
        yield
    unused = [given for number, given in enumerate(edits) if number not in used]
    if unused and forwards:
        raise EditError(
            f"{unused[0]} changed nothing: no attention call had such a layer, query or key. Layers count from 0 "
            "in the order of calls, or are module names as record() lists them; positions count from 0 in the text."
        )


def _per_head(value: Tensor, heads: int) -> Tensor:
    return value if value.shape[1] == heads else value.repeat_interleave(heads // value.shape[1], 1)


def _mixed(own: Scores, given: Scores, chosen: tuple[int, ...]) -> Scores:
    """Operands of which some heads are another's."""
    heads = own.shape[1]
    query, key = own.query.clone(), _per_head(own.key, heads).clone()
    index = list(chosen)
    query[:, index] = (given.query * (given.scale / own.scale))[:, index].to(query.dtype)
    key[:, index] = _per_head(given.key, heads)[:, index].to(key.dtype)
    mask = _either(own.mask, given.mask, masks.heads(chosen))
    bias = own.bias_tensor
    if own.bias is not None or given.bias is not None:
        zero = query.new_zeros((1, 1, 1, 1))
        ours, theirs = (zero if b is None else b for b in (own.bias_tensor, given.bias_tensor))
        theirs_here = torch.zeros(heads, dtype=torch.bool, device=query.device)
        theirs_here[index] = True
        bias = torch.where(theirs_here.view(1, -1, 1, 1), theirs, ours)
    return make_scores(query, key, mask, bias, own.scale, own.softcap, own.sinks)


def _either(own: Mask | None, given: Mask | None, chosen: Mask) -> Mask | None:
    if own is None and given is None:
        return None
    ours = chosen if own is None else own | chosen
    theirs = ~chosen if given is None else given | ~chosen
    return ours & theirs


def _check_heads(heads: tuple[int, ...], call: AttentionCall) -> None:
    if max(heads) >= call.shape[1]:
        raise EditError(f"{call.name} has {call.shape[1]} heads, counted from 0; there is no head {max(heads)}.")


def _refuse_dropout(edit: Edit, call: AttentionCall) -> None:
    if call.dropout_p:
        raise EditError(
            f"{type(edit).__name__} changes a pattern, but {call.name} drops {call.dropout_p:.0%} of its weights "
            "at random: call model.eval() first."
        )


def _layers(layers: Layers) -> tuple[int | str, ...] | None:
    if layers is None or isinstance(layers, (int, str)):
        return None if layers is None else (layers,)
    return tuple(layers)


def _positions(name: str, given: int | Iterable[int]) -> tuple[int, ...]:
    found = (given,) if isinstance(given, int) else tuple(int(i) for i in given)
    if not found or min(found) < 0:
        raise EditError(f"{name} is {given!r}: wanted positions counted from 0.")
    return found
