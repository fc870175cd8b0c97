"""One attention site of a run: its calls, joined into one matrix whose rows grow as text is generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headscope.errors import RecordingError
from headscope.ops.masks import Mask, Step, causal, compact, stacked
from headscope.ops.matrix import AttentionMatrix
from headscope.ops.positions import Alibi
from headscope.ops.scores import Scores, make_scores
from headscope.watching.hooks import AttentionCall, matrix_of
from headscope.watching.recording.continuation import follows, same, without_blank_cache

__all__ = ["Captured", "Part", "SiteCalls", "capture"]


@dataclass(frozen=True, eq=False)
class Captured:
    """What is kept of one call."""

    name: str
    occurrence: int
    way: str
    scores: Scores
    value: Tensor | None
    output: Tensor | None
    proof: float | None
    dropout_p: float
    edited: bool
    is_cross: bool
    versions: tuple[int | None, ...]  # of query, key and value, as they were
    sums: Tensor | None


@dataclass(frozen=True, eq=False)
class Part:
    """One call inside a site: which rows and keys of the joined matrix are its own."""

    first_row: int
    num_rows: int
    first_key: int
    num_keys: int
    mask: Mask | None
    bias: Tensor | Alibi | None
    proof: float | None
    output: Tensor | None
    sums: Tensor | None  # [B, H, rows], the log-sum-exp of its rows where it is known


def capture(call: AttentionCall, keep: Sequence[str], detach: bool) -> Captured:
    """Keep what is wanted of a call; tensors that somebody writes into later are copied."""
    scores = without_blank_cache(call.scores)
    hold = _held if detach else _as_it_is
    scores = Scores(
        hold(scores.query),
        hold(scores.key),
        scores.mask,
        scores.bias.detach() if detach and isinstance(scores.bias, Tensor) else scores.bias,
        scores.scale,
        scores.softcap,
        scores.sinks.detach() if detach and scores.sinks is not None else scores.sinks,
        scores.origin,
    )
    value = hold(call.value[:, :, : scores.shape[3]]) if "value" in keep else None
    output = None
    if "output" in keep:  # what the model does with it next may be done in place
        output = call.head_outputs().detach().clone() if detach else call.head_outputs()
    return Captured(
        call.name,
        call.occurrence,
        call.way,
        scores,
        value,
        output,
        call.proof,
        call.dropout_p,
        call.edited,
        call.is_cross,
        tuple(_version(tensor) for tensor in (scores.query, scores.key, value)),
        call.sums,
    )


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _version(tensor: Tensor | None) -> int | None:
    """How often a tensor was written into; what was made in inference mode does not say, and was copied."""
    return None if tensor is None or tensor.is_inference() else tensor._version


def _held(tensor: Tensor) -> Tensor:
    """Detached; copied if it was written in place before (a cache's own storage will be again)."""
    tensor = tensor.detach()
    reused = tensor.is_inference() or tensor._version > 0
    return tensor.clone() if reused else tensor


@dataclass(eq=False)
class SiteCalls:
    """A site: module, occurrence, and its calls. ``matrix()`` is all of them as one attention matrix."""

    name: str
    occurrence: int
    way: str
    scale: float
    softcap: float | None
    sinks: Tensor | None
    queries: list[Tensor]
    key: Tensor
    values: Tensor | None
    parts: list[Part]
    dropout_p: float = 0.0
    edited: bool = False
    gone: list[Tensor] = field(default_factory=list)  # keys that a sliding cache has dropped
    gone_values: list[Tensor] = field(default_factory=list)
    versions: list[int | None] = field(default_factory=list)  # of the queries, then the key, then the values

    @classmethod
    def of(cls, call: Captured) -> SiteCalls:
        """A site that begins with this call."""
        scores = call.scores
        _, _, rows, keys = scores.shape
        part = Part(0, rows, 0, keys, scores.mask, scores.bias, call.proof, call.output, call.sums)
        return cls(
            call.name,
            call.occurrence,
            call.way,
            scores.scale,
            scores.softcap,
            scores.sinks,
            [scores.query],
            scores.key,
            call.value,
            [part],
            call.dropout_p,
            call.edited,
            versions=list(call.versions),
        )

    @property
    def num_gone(self) -> int:
        """Keys that left a sliding cache."""
        return sum(part.shape[2] for part in self.gone)

    @property
    def shape(self) -> torch.Size:
        """(B, H, L, S) of the joined matrix."""
        batch, heads = self.queries[0].shape[:2]
        rows = sum(part.num_rows for part in self.parts)
        return torch.Size((batch, heads, rows, self.num_gone + self.key.shape[2]))

    @property
    def proof(self) -> float | None:
        """The largest difference found in any of its calls; None if one of them is unproved."""
        found = [part.proof for part in self.parts]
        known = [proof for proof in found if proof is not None]
        return max(known) if len(known) == len(found) else None

    def continues(self, call: Captured) -> tuple[str, int] | None:
        """How a later call continues this site, by content: which keys it shares. None: it does not.

        ("grow", n): the first n keys are ours, in a sliding cache the last n that we hold; ("cut", n): only our
        first n keys were kept (rejected drafts); ("cross", S): the same keys, more queries.
        """
        if call.scores.query.shape[1] != self.shape[1]:
            return None
        how = follows(self.key, bool(self.gone), call.scores)
        if how is None:
            return None
        again = how[0] == "cross" and same(call.scores.query, self.queries[-1])  # a forward of its own
        nothing_left = how[0] == "cut" and self.rejected(how[1]) >= self.shape[2]  # another text after one prefix
        return None if again or nothing_left else how

    def rejected(self, keep: int) -> int:
        """How many rows are forgotten when only the first ``keep`` keys are kept: those of rejected drafts."""
        return self.shape[3] - keep

    def add(self, call: Captured, how: str, shared: int, rejected: int = 0) -> None:
        """Join a call that continues this site; of a cross-attention the last ``rejected`` rows are forgotten."""
        scores = call.scores
        _, _, rows, keys = scores.shape
        if how == "cut":
            self._cut(self.shape[2] - self.rejected(shared))
            self.key = self.key[:, :, :shared]
            self.values = None if self.values is None else self.values[:, :, :shared]
        elif how == "cross" and rejected:
            self._cut(self.shape[2] - rejected, cross=True)
        first_row = self.shape[2]
        if how == "grow" and shared < self.key.shape[2]:
            dropped = self.key.shape[2] - shared
            self.gone.append(self.key[:, :, :dropped].clone())
            if self.values is not None:
                self.gone_values.append(self.values[:, :, :dropped].clone())
        if how != "cross":
            self.key = scores.key
            self.values = call.value if self.values is not None else None
            self.versions[-2:] = call.versions[1:]
        first_key = 0 if how == "cross" else self.num_gone
        self.versions.insert(len(self.queries), call.versions[0])
        self.queries.append(scores.query)
        kept = (call.proof, call.output, call.sums)
        self.parts.append(Part(first_row, rows, first_key, keys, scores.mask, scores.bias, *kept))
        self.dropout_p = max(self.dropout_p, call.dropout_p)
        self.edited = self.edited or call.edited

    def _cut(self, rows: int, cross: bool = False) -> None:
        """Keep the first rows: the tokens of the others were rejected."""
        query = torch.cat(self.queries, 2)[:, :, :rows]
        batch, heads = self.shape[:2]
        parts = []
        for part in self.parts:
            left = min(part.num_rows, rows - part.first_row)
            if left > 0:
                parts.append(_shortened(part, left, batch, heads, cross))
        self.queries, self.parts = [query], parts
        self.versions[:-2] = [None]

    def check_unchanged(self) -> None:
        """Raises RecordingError when somebody wrote into what was recorded: what it was is gone."""
        held = [*self.queries, self.key, self.values]
        for tensor, version in zip(held, self.versions, strict=False):  # of what was read from a file none is known
            if version is not None and tensor is not None and tensor._version != version:
                raise RecordingError(
                    f"the model wrote in place into recorded queries, keys or values of {self.name!r} after their "
                    "call: its weights can no longer be rebuilt. Ask while it runs: record(reduce=…)."
                )

    def scores(self) -> Scores:
        """The joined operands."""
        self.check_unchanged()
        key = torch.cat([*self.gone, self.key], 2) if self.gone else self.key
        query = self.queries[0] if len(self.queries) == 1 else torch.cat(self.queries, 2)
        first = self.parts[0]
        mask, bias = first.mask, first.bias
        if len(self.parts) > 1 or first.num_keys != key.shape[2]:
            mask, bias = self._joined_mask(), self._joined_bias()
        return make_scores(query, key, mask, bias, self.scale, self.softcap, self.sinks)

    def matrix(self) -> AttentionMatrix:
        """All calls of the site as one matrix."""
        return matrix_of(self.scores(), self.sums())

    def call_matrix(self, index: int) -> AttentionMatrix:
        """One of its calls alone."""
        self.check_unchanged()
        part = self.parts[index]
        query = self._rows(part.first_row, part.num_rows)
        key = torch.cat([*self.gone, self.key], 2) if self.gone else self.key
        key = key[:, :, part.first_key : part.first_key + part.num_keys]
        scores = make_scores(query, key, part.mask, part.bias, self.scale, self.softcap, self.sinks)
        return matrix_of(scores, part.sums)

    def _rows(self, first: int, count: int) -> Tensor:
        """Some queries, without joining all."""
        at = 0
        for query in self.queries:
            if at <= first and first + count <= at + query.shape[2]:
                return query[:, :, first - at : first - at + count]
            at += query.shape[2]
        return torch.cat(self.queries, 2)[:, :, first : first + count]

    def _joined_mask(self) -> Mask | None:
        _, _, rows, keys = self.shape
        first = keys - rows
        if all(_is_causal_part(part, first) for part in self.parts):
            return causal()
        steps = []
        for part in self.parts:
            start = first + part.first_row
            own = part.num_keys - part.num_rows
            steps.append(
                Step(part.mask, slice(start, start + part.num_rows), start - own, part.first_key, part.num_keys)
            )
        return stacked(steps)

    def _joined_bias(self) -> Tensor | Alibi | None:
        first = self.parts[0].bias
        if isinstance(first, Alibi) and all(self._is_alibi_part(part, first) for part in self.parts):
            return first
        biases = [_written(part, self.shape[1]) for part in self.parts]
        known = [bias for bias in biases if bias is not None]
        if not known:
            return None
        keys = self.shape[3]
        heads, batch = max(b.shape[1] for b in known), max(b.shape[0] for b in known)
        rows = []
        for part, bias in zip(self.parts, biases, strict=True):
            whole = known[0].new_zeros((batch, heads, part.num_rows, keys))
            if bias is not None:
                whole[..., part.first_key : part.first_key + part.num_keys] = bias
            rows.append(whole)
        return torch.cat(rows, 2)

    def _is_alibi_part(self, part: Part, bias: Alibi) -> bool:
        """Whether a call has this bias, and its positions stand in the joined matrix as far apart as in the call."""
        _, _, rows, keys = self.shape
        apart = keys - rows + part.first_row - part.first_key == part.num_keys - part.num_rows
        return apart and isinstance(part.bias, Alibi) and torch.equal(part.bias.slopes, bias.slopes)

    def sums(self) -> Tensor | None:
        """The log-sum-exp of all rows, [B, H, L], NaN where it is not known; None if none is."""
        told = next((part.sums for part in self.parts if part.sums is not None), None)
        if told is None:
            return None
        shape = self.shape
        blank = (told.new_full((*shape[:2], part.num_rows), torch.nan) for part in self.parts)
        return torch.cat([b if part.sums is None else part.sums for part, b in zip(self.parts, blank, strict=True)], 2)

    def output(self) -> Tensor | None:
        """P @ V of all calls, [B, H, L, Dv], if it was kept."""
        kept = [part.output for part in self.parts if part.output is not None]
        return torch.cat(kept, 2) if kept else None

    def value(self) -> Tensor | None:
        """The values, [B, G, S, Dv], if they were kept."""
        if self.values is None or not self.gone_values:
            return self.values
        return torch.cat([*self.gone_values, self.values], 2)


def _written(part: Part, heads: int) -> Tensor | None:
    """A call's bias as a tensor."""
    if not isinstance(part.bias, Alibi):
        return part.bias
    rows, keys = slice(part.num_keys - part.num_rows, part.num_keys), slice(0, part.num_keys)
    return part.bias.tile(slice(0, heads), rows, keys, part.bias.slopes.device, torch.float32)


def _is_causal_part(part: Part, first: int) -> bool:
    if part.bias is not None or part.first_key != 0 or part.num_keys != first + part.first_row + part.num_rows:
        return False
    return (part.mask is None and part.num_rows == 1) or (part.mask is not None and part.mask.is_causal)


def _shortened(part: Part, rows: int, batch: int, heads: int, cross: bool) -> Part:
    """A call without its last rows, and without the keys that only they brought; a cross-attention's are not theirs."""
    if rows == part.num_rows:
        return part
    keys = part.num_keys - (0 if cross else part.num_rows - rows)
    seen = None
    if part.mask is not None and not part.mask.is_causal:
        own = slice(part.num_keys - part.num_rows, part.num_keys - part.num_rows + rows)
        device = torch.device("cpu")
        seen = part.mask.block(slice(0, batch), slice(0, heads), own, slice(0, keys), device)
    mask = part.mask if seen is None else compact(seen.expand(-1, -1, rows, -1), batch)
    bias = part.bias
    if isinstance(bias, Tensor):
        bias = bias[:, :, :rows] if bias.shape[2] > 1 else bias
        bias = bias[..., :keys] if bias.shape[3] > 1 else bias
    output, sums = (None if kept is None else kept[:, :, :rows] for kept in (part.output, part.sums))
    return Part(part.first_row, rows, part.first_key, keys, mask, bias, part.proof, output, sums)
