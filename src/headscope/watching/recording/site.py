"""One attention site of a run: its calls, joined into one matrix whose rows grow as text is generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from headscope.errors import RecordingError
from headscope.ops.masks import Mask, StackedStep, causal, compact, stacked
from headscope.ops.matrix import AttentionMatrix
from headscope.ops.positions import Alibi
from headscope.ops.scores import Scores
from headscope.watching.hooks import AttentionCall
from headscope.watching.recording.continuation import (
    Continuation,
    at_own_positions,
    continuation,
    same,
    without_unused_slots,
)


@dataclass(frozen=True, eq=False)
class CallRows:
    """The rows of one call, and which rows and keys of its site's joined matrix they are."""

    query: Tensor  # [B, H, rows, D]
    first_row: int
    first_key: int
    num_keys: int
    mask: Mask | None = None
    bias: Tensor | Alibi | None = None
    proof: float | None = None
    rounded_proof: float | None = None
    output: Tensor | None = None
    logsumexp: Tensor | None = None  # [B, H, rows], NaN where it is not known
    query_version: int | None = None
    weights: Tensor | None = None  # [B, H, rows, keys], of record(dense=True)

    @property
    def num_rows(self) -> int:
        """How many queries the call had."""
        return self.query.shape[2]

    @property
    def position(self) -> int:
        """The position of the first query among the call's own keys: queries are the last of them."""
        return self.num_keys - self.num_rows


@dataclass(eq=False, repr=False)
class Site:
    """An attention site: the n-th call of a module within one forward, over all the forwards of its run."""

    name: str
    occurrence: int
    way: str
    scale: float
    softcap: float | None
    sinks: Tensor | None
    last_key: Tensor  # of the last call, which brings those before it along
    last_value: Tensor | None
    calls: list[CallRows]
    dropout_p: float = 0.0
    edited: bool = False
    is_cross: bool = False
    dropped_keys: list[Tensor] = field(default_factory=list)  # by a sliding cache, before the last call
    dropped_values: list[Tensor] = field(default_factory=list)
    versions: tuple[int | None, int | None] = (None, None)  # of the last key and value
    exact_keys: list[tuple[int, Tensor]] = field(default_factory=list)  # before a cache rounded them; up to which row

    @property
    def shape(self) -> torch.Size:
        """(B, H, L, S) of the joined matrix."""
        batch, heads = self.calls[0].query.shape[:2]
        last = self.calls[-1]
        return torch.Size((batch, heads, last.first_row + last.num_rows, self.num_dropped + self.last_key.shape[2]))

    @property
    def num_dropped(self) -> int:
        """How many keys a sliding cache has dropped."""
        return sum(key.shape[2] for key in self.dropped_keys)

    @property
    def proof(self) -> float | None:
        """How far P @ V, rebuilt, was from what the model returned, at most; None: some call is unproved."""
        differences = [call.proof for call in self.calls if call.proof is not None]
        return max(differences) if len(differences) == len(self.calls) else None

    @property
    def rounded_proof(self) -> float | None:
        """The same with scores rounded to half precision, as eager attention has them; None: not in half precision."""
        differences = [call.rounded_proof for call in self.calls if call.rounded_proof is not None]
        return max(differences) if len(differences) == len(self.calls) else None

    def __repr__(self) -> str:
        return f"Site({self.name!r}, occurrence={self.occurrence}, way={self.way!r}, shape={tuple(self.shape)})"

    def continues(self, other: Site) -> Continuation | None:
        """How the only call of ``other`` continues this site; None: it does not."""
        call = other.calls[0]
        if call.query.shape[1] != self.shape[1]:
            return None
        how = continuation(self.last_key, other.last_key, call.num_rows)
        if how is None:
            return None
        again = how.is_cross and same(call.query, self.calls[-1].query)  # a forward of its own
        nothing_left = how.rejected >= self.shape[2]  # another text after one prefix
        return None if again or nothing_left else how

    def add(self, other: Site, how: Continuation, rejected: int = 0) -> None:
        """Join the only call of ``other``; in cross-attention the last ``rejected`` rows are dropped first."""
        rejected = rejected if how.is_cross else how.rejected
        if rejected:
            self._cut(self.shape[2] - rejected, how.is_cross)
        first_row = self.calls[-1].first_row + self.calls[-1].num_rows
        if how.dropped:
            self.dropped_keys.append(self.last_key[:, :, : how.dropped].clone())
            if self.last_value is not None:
                self.dropped_values.append(self.last_value[:, :, : how.dropped].clone())
        if how.rounded:
            self.exact_keys.append((first_row, self.last_key.clone()))
        if not how.is_cross:
            self.last_key, self.last_value, self.versions = other.last_key, other.last_value, other.versions
        first_key = 0 if how.is_cross else self.num_dropped
        self.calls.append(replace(other.calls[0], first_row=first_row, first_key=first_key))
        self.dropout_p = max(self.dropout_p, other.dropout_p)
        self.edited = self.edited or other.edited

    def _cut(self, rows: int, cross: bool) -> None:
        """Keep the first rows: the tokens of the others were rejected."""
        counts = ((call, min(call.num_rows, rows - call.first_row)) for call in self.calls)
        self.calls = [_shortened(call, count, cross) for call, count in counts if count > 0]

    def check_unchanged(self) -> None:
        """Raises RecordingError when a recorded tensor was written into since."""
        versions = [(call.query, call.query_version) for call in self.calls]
        for tensor, version in (*versions, *zip((self.last_key, self.last_value), self.versions, strict=True)):
            if version is not None and tensor is not None and tensor._version != version:
                raise RecordingError(
                    f"the model wrote in place into recorded queries, keys or values of {self.name!r} after their "
                    "call: its weights can no longer be rebuilt. Ask while it runs: record(reduce=…)."
                )

    def scores(self) -> Scores:
        """The joined operands."""
        self.check_unchanged()
        call = self.calls[0]
        if len(self.calls) == 1 and call.num_keys == self.shape[3]:
            return self._scores(call.query, self.key(), call.mask, call.bias)
        query = torch.cat([self._joined_query(call) for call in self.calls], 2)
        return self._scores(query, self._joined_key(), self._joined_mask(), self._joined_bias())

    def matrix(self) -> AttentionMatrix:
        """All calls of the site as one matrix."""
        return AttentionMatrix._from_scores(self.scores(), self.logsumexp())

    def call_scores(self, call: CallRows) -> Scores:
        """The operands of one of its calls alone."""
        self.check_unchanged()
        exact = next((key for stop, key in self.exact_keys if call.first_row < stop), self.key())
        key = exact[:, :, call.first_key : call.first_key + call.num_keys]
        return self._scores(call.query, key, call.mask, call.bias)

    def _scores(self, query: Tensor, key: Tensor, mask: Mask | None, bias: Tensor | Alibi | None) -> Scores:
        origin = (0, 0, key.shape[2] - query.shape[2])
        return Scores(query, key, mask, bias, self.scale, self.softcap, self.sinks, origin)

    def _joined_key(self) -> Tensor:
        """All keys; where a cache rounded them, the exact ones stand beside them, in features of their own."""
        key = self.key()
        exact = [F.pad(keys, (0, 0, 0, key.shape[2] - keys.shape[2])) for _, keys in self.exact_keys]
        return torch.cat([key, *exact], 3) if exact else key

    def _joined_query(self, call: CallRows) -> Tensor:
        """The queries of a call, in the features of the keys that they attended to."""
        stops = [stop for stop, _ in self.exact_keys]
        number = next((i for i, stop in enumerate(stops, 1) if call.first_row < stop), 0)
        width = call.query.shape[3]
        return F.pad(call.query, (width * number, width * (len(stops) - number)))

    def _joined_mask(self) -> Mask | None:
        _, _, rows, keys = self.shape
        first = keys - rows
        if all(_is_causal(call, first + call.first_row) for call in self.calls):
            return causal()
        steps = []
        for call in self.calls:
            start = first + call.first_row
            own = slice(start, start + call.num_rows)
            steps.append(StackedStep(call.mask, own, start - call.position, call.first_key, call.num_keys))
        return stacked(steps)

    def _joined_bias(self) -> Tensor | Alibi | None:
        first = self.calls[0].bias
        if isinstance(first, Alibi) and all(self._has_alibi(call, first) for call in self.calls):
            return first
        biases = [_bias_tensor(call) for call in self.calls]
        present = [bias for bias in biases if bias is not None]
        if not present:
            return None
        keys = self.shape[3]
        heads, batch = max(b.shape[1] for b in present), max(b.shape[0] for b in present)
        rows = []
        for call, bias in zip(self.calls, biases, strict=True):
            whole = present[0].new_zeros((batch, heads, call.num_rows, keys))
            if bias is not None:
                whole[..., call.first_key : call.first_key + call.num_keys] = bias
            rows.append(whole)
        return torch.cat(rows, 2)

    def _has_alibi(self, call: CallRows, bias: Alibi) -> bool:
        """Whether a call has this bias, and its positions are as far apart in the joined matrix as in the call."""
        _, _, rows, keys = self.shape
        apart = keys - rows + call.first_row - call.first_key == call.position
        return apart and isinstance(call.bias, Alibi) and torch.equal(call.bias.slopes, bias.slopes)

    def key(self) -> Tensor:
        """All keys, [B, G, S, D]."""
        return torch.cat([*self.dropped_keys, self.last_key], 2) if self.dropped_keys else self.last_key

    def value(self) -> Tensor | None:
        """All values, [B, G, S, Dv], if they were kept."""
        if self.last_value is None or not self.dropped_values:
            return self.last_value
        return torch.cat([*self.dropped_values, self.last_value], 2)

    def output(self) -> Tensor | None:
        """P @ V of all calls, [B, H, L, Dv], if it was kept."""
        outputs = [call.output for call in self.calls if call.output is not None]
        return torch.cat(outputs, 2) if outputs else None

    def weights(self) -> Tensor | None:
        """The maps of all calls as one, [B, H, L, S], if they were kept."""
        parts = [call.weights for call in self.calls if call.weights is not None]
        if len(parts) < len(self.calls):
            return None
        if parts[0].shape == self.shape:
            return parts[0]
        whole = parts[0].new_zeros(self.shape)
        for call, part in zip(self.calls, parts, strict=True):
            rows = slice(call.first_row, call.first_row + call.num_rows)
            whole[:, :, rows, call.first_key : call.first_key + call.num_keys] = part
        return whole

    def logsumexp(self) -> Tensor | None:
        """The log-sum-exp of all rows, [B, H, L], NaN where it is not known; None if it is known of no row."""
        some = next((call.logsumexp for call in self.calls if call.logsumexp is not None), None)
        if some is None or len(self.calls) == 1:
            return some
        unknown = (some.new_full((*self.shape[:2], call.num_rows), torch.nan) for call in self.calls)
        parts = zip(self.calls, unknown, strict=True)
        return torch.cat([nan if call.logsumexp is None else call.logsumexp for call, nan in parts], 2)


def capture(
    call: AttentionCall, keep: Sequence[str], detach: bool, earlier: Tensor | None = None, dense: bool = False
) -> Site:
    """A site of this one call, with the tensors to keep; tensors that may be written into later are copied.

    ``earlier`` are the keys of the call before, if the site has one; ``dense``: its map is computed and kept.
    """
    scores = at_own_positions(without_unused_slots(call, earlier))
    query, key = (_kept(tensor, detach) for tensor in (scores.query, scores.key))
    value = _kept(call.value[:, :, : scores.shape[3]], detach) if "value" in keep else None
    output = None
    if "output" in keep:  # the model may go on with it in place
        output = call.head_outputs().detach().clone() if detach else call.head_outputs()
    bias, sinks = scores.bias, scores.sinks
    if detach:
        bias = bias.detach() if isinstance(bias, Tensor) else bias
        sinks = None if sinks is None else sinks.detach()
    rows = CallRows(
        query,
        0,
        0,
        scores.shape[3],
        scores.mask,
        bias,
        call.proof,
        call.rounded_proof,
        output,
        call.logsumexp,
        _version(query),
        AttentionMatrix._from_scores(scores, call.logsumexp)[:] if dense else None,
    )
    return Site(
        call.name,
        call.occurrence,
        call.way,
        scores.scale,
        scores.softcap,
        sinks,
        key,
        value,
        [rows],
        call.dropout_p,
        call.edited,
        call.is_cross,
        versions=(_version(key), _version(value)),
    )


def _kept(tensor: Tensor, detach: bool) -> Tensor:
    """Detached; copied if it was written in place before (a cache's own storage will be again)."""
    if not detach:
        return tensor
    tensor = tensor.detach()
    reused = tensor.is_inference() or tensor._version > 0
    return tensor.clone() if reused else tensor


def _version(tensor: Tensor | None) -> int | None:
    """How often a tensor was written into; None in inference mode, where tensors don't count and are copied."""
    return None if tensor is None or tensor.is_inference() else tensor._version


def _bias_tensor(call: CallRows) -> Tensor | None:
    """A call's bias as a tensor."""
    if not isinstance(call.bias, Alibi):
        return call.bias
    rows, keys = slice(call.position, call.position + call.num_rows), slice(0, call.num_keys)
    slopes = call.bias.slopes
    return call.bias.tile(slice(0, len(slopes)), rows, keys, slopes.device, torch.float32)


def _is_causal(call: CallRows, position: int) -> bool:
    """Whether the rows of a call, from this position in the joined matrix, see just what lies before them."""
    if call.bias is not None or call.first_key != 0 or call.num_keys != position + call.num_rows:
        return False
    return call.num_rows == 1 if call.mask is None else call.mask.is_causal


def _shortened(call: CallRows, rows: int, cross: bool) -> CallRows:
    """A call without its last rows, and in self-attention without the keys of these rows."""
    if rows == call.num_rows:
        return call
    batch, heads = call.query.shape[:2]
    keys = call.num_keys - (0 if cross else call.num_rows - rows)
    mask, bias = call.mask, call.bias
    if mask is not None and not mask.is_causal:
        own = slice(call.position, call.position + rows)
        visible = mask.block(slice(0, batch), slice(0, heads), own, slice(0, keys), torch.device("cpu"))
        mask = compact(visible.expand(-1, -1, rows, -1), batch)
    if isinstance(bias, Tensor):
        bias = bias[:, :, :rows] if bias.shape[2] > 1 else bias
        bias = bias[..., :keys] if bias.shape[3] > 1 else bias
    kept = (call.output, call.logsumexp, call.weights)
    output, logsumexp, weights = (None if tensor is None else tensor[:, :, :rows] for tensor in kept)
    return replace(
        call,
        query=call.query[:, :, :rows],
        num_keys=keys,
        mask=mask,
        bias=bias,
        output=output,
        logsumexp=logsumexp,
        weights=None if weights is None else weights[..., :keys],
    )
