"""What the heads of a model do while it trains, looked at every so many steps; a warning that names the head."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from headscope.errors import HeadscopeError, NothingSeen
from headscope.reductions import Block, Entropy, Groups, Max, Reduction
from headscope.reductions.reduction import Shape
from headscope.seam import AttentionCall, Forward, invisible, watch

__all__ = ["HeadStats", "HeadWarning", "Monitor", "monitor"]

Log = Callable[[str, float, int], object]  # told a name, a value, a step

_DEAD = 1e-3  # of the layer's median head
_FELL = 10.0  # an entropy share that fell so many times within the looks remembered
_LOOKS = 5
_RESTS = 0.5  # a head with more than this on the first key rests there: low entropy is its way, not a fault


class HeadWarning(UserWarning):
    """A head that needs a look: its entropy collapsed, its logits exploded, or its numbers are no longer finite."""


@dataclass(frozen=True, eq=False)
class HeadStats:
    """What the heads did at one step; tensors are [layers, heads], NaN where a layer has fewer heads.

    Attributes:
        step: Which step, from 0.
        sites: The attention modules, in the order of their calls: row i of the tensors is ``sites[i]``.
        entropy: Mean over the queries that see at least two keys, in nats (arXiv 1906.04341).
        entropy_share: The same as a share of what even attention over the visible keys would have, 0 to 1.
        largest_logit: The largest score before the softmax, after scale, cap and bias.
        sink_mass: Mean weight on the first key that may be seen (arXiv 2410.10781).
        dead: Whether the head's output is below a thousandth of its layer's median head.
    """

    step: int
    sites: tuple[str, ...]
    entropy: Tensor
    entropy_share: Tensor
    largest_logit: Tensor
    sink_mass: Tensor
    dead: Tensor


class Monitor(AbstractContextManager["Monitor"]):
    """Made by :func:`monitor`. ``with`` it around a forward; ``history`` holds a `HeadStats` a look."""

    def __init__(self, model: nn.Module, every: int, log: Log | None, logit_limit: float, low_entropy: float) -> None:
        self.model, self.every, self.log = model, every, log
        self.logit_limit, self.low_entropy = logit_limit, low_entropy
        self.step = 0
        self.history: list[HeadStats] = []
        self._running: ExitStack | None = None
        self._sums: dict[tuple[str, int], _Sums] = {}
        self._warned: set[tuple[str, int, int]] = set()

    def __enter__(self) -> Monitor:
        """Look at this step, if it is one to be looked at."""
        if self._running is not None:
            raise HeadscopeError("this monitor is watching already: one `with` at a time, around one step.")
        self._running, self._sums = ExitStack(), {}
        if self.step % self.every == 0:
            try:
                self._running.enter_context(watch(self.model, self._saw))
            except BaseException:
                self._running = None
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Keep what was seen, and warn; nothing is kept of a step that failed."""
        assert self._running is not None
        running, self._running = self._running, None
        running.__exit__(kind, error, trace)
        step, self.step = self.step, self.step + 1
        sums, self._sums = self._sums, {}
        if error is not None or step % self.every:
            return
        if not sums:
            raise NothingSeen(
                "no attention was seen inside the `with`: put the model's forward there. What can be seen: modules of "
                "headscope, torch.nn and transformers, and scaled_dot_product_attention."
            )
        stats = _stats(step, sums)
        self.history.append(stats)
        self._tell(stats)
        self._warn(stats)

    def table(self) -> list[dict[str, Any]]:
        """The last look, a row a head: layer, head, site, entropy, entropy_share, largest_logit, sink_mass, dead."""
        return [] if not self.history else list(_rows(self.history[-1]))

    def _saw(self, call: AttentionCall, forward: Forward) -> None:
        key = (call.name, call.occurrence)
        with invisible():
            self._sums.setdefault(key, _Sums()).add(call, forward.valid)

    def _tell(self, stats: HeadStats) -> None:
        if self.log is None:
            return
        for row in _rows(stats):
            for name in ("entropy", "largest_logit", "sink_mass", "dead"):
                self.log(f"heads/{row['layer']}.{row['head']}/{name}", float(row[name]), stats.step)

    def _warn(self, stats: HeadStats) -> None:
        before = self.history[-1 - _LOOKS : -1]
        for row in _rows(stats):
            layer, head = row["layer"], row["head"]
            where = f"head {layer}.{head} ({row['site']}) at step {stats.step}"
            logit, share = row["largest_logit"], row["entropy_share"]
            bad = not torch.isfinite(torch.tensor([logit, row["entropy"]])).all()
            self._once(
                ("nonfinite", layer, head),
                bad,
                f"{where}: its queries or keys are NaN or infinite. Go back to a checkpoint; lower the learning rate, "
                "clip gradients.",
            )
            self._once(
                ("logit", layer, head),
                logit > self.logit_limit,
                f"{where}: its largest logit is {logit:.3g}, above {self.logit_limit:g}: logits explode. Lower the "
                "learning rate, decay the query and key weights, or use qk_norm=True.",
            )
            was = max((_at(s.entropy_share, layer, head) for s in before), default=0.0)
            fell = share < self.low_entropy and was > _FELL * share and was > self.low_entropy
            self._once(
                ("entropy", layer, head),
                fell and row["sink_mass"] < _RESTS,
                f"{where}: its entropy fell from {was:.1%} to {share:.1%} of even attention's: it collapses onto "
                "single keys. Lower the learning rate, warm up longer, or use qk_norm=True.",
                recovered=share > self.low_entropy,
            )

    def _once(self, key: tuple[str, int, int], now: bool, text: str, recovered: bool | None = None) -> None:
        """Warn when it begins, and again only after it has ended."""
        if now and key not in self._warned:
            self._warned.add(key)
            warnings.warn(text, HeadWarning, stacklevel=5)
        elif (not now) if recovered is None else recovered:
            self._warned.discard(key)


def monitor(
    model: nn.Module,
    every: int = 50,
    *,
    log: Log | None = None,
    logit_limit: float = 100.0,
    low_entropy: float = 0.02,
) -> Monitor:
    """Watch what the heads do in a training loop of your own: a ``with`` around the forward.

    Looks at every ``every``-th step, the first included, and does nothing in the others. A look reads each layer's
    queries and keys as they come; outputs, gradients and random numbers stay the same to the bit. Several forwards
    inside one ``with`` count together.

    Args:
        model: any model that :func:`headscope.record` can see.
        every: steps between looks.
        log: told (name, value, step) for each head, such as TensorBoard's ``SummaryWriter.add_scalar``.
        logit_limit: a head whose largest score is above is warned of. Numbers of bfloat16 lie 0.5 apart at 100, so
            that a weight is off by a quarter; runs that diverged had thousands (arXiv 2302.05442).
        low_entropy: a head is warned of whose entropy share falls below this, to a tenth of what it was within the
            last 5 looks (entropy collapse, arXiv 2303.06296), unless it rests on the first key.

    Raises:
        ValueError: every below 1. Leaving the ``with`` raises NothingSeen if no attention ran inside.

    Example:
        >>> import torch, headscope
        >>> layer = headscope.MultiHeadAttention(16, 4)
        >>> watch = headscope.monitor(layer, every=2)
        >>> for x in torch.randn(5, 3, 7, 16):
        ...     with watch:
        ...         loss = layer(x).square().mean()
        >>> [stats.step for stats in watch.history]
        [0, 2, 4]
        >>> watch.history[-1].entropy.shape
        torch.Size([1, 4])
    """
    if every < 1:
        raise ValueError(f"every is {every}: a look at least at every step, 1.")
    return Monitor(model, every, log, logit_limit, low_entropy)


class _Visible(Reduction):
    """How many keys each query may see: [B, H, L]."""

    def start(self, shape: Shape, like: Tensor) -> Tensor:
        """Zeros."""
        return like.new_zeros(shape[:3])

    def update(self, state: Tensor, block: Block) -> None:
        """Count."""
        seen, width = block.visible, block.weights.shape[-1]
        state[block.at] += width if seen is None else seen.sum(-1)


@dataclass(eq=False)
class _Sums:
    """One site's sums over the calls of a step; each [H]."""

    parts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, call: AttentionCall, valid: Tensor | None) -> None:
        """Add a call: one pass, reduced at once."""
        heads = call.shape[1]
        finite = call.query.isfinite().all() & call.key.isfinite().all()
        if not finite:
            self._put({name: torch.full((heads,), torch.nan) for name in ("entropy", "even", "sink", "rows", "square")})
            self._top(torch.full((heads,), torch.nan))
            return
        matrix, first = call.matrix(), _first_key(call)
        entropy, best, sink, seen = matrix.reduce(Entropy(), Max(), Groups(first, 1), _Visible())
        rows = (seen > 1) & _valid_rows(valid, seen)
        outputs = call.head_outputs().float().square().sum(-1)
        keep = rows.to(entropy.dtype)
        values = {
            "entropy": entropy * keep,
            "even": seen.clamp(min=1).log() * keep,
            "sink": sink.squeeze(-1) * keep,
            "rows": keep,
            "square": outputs * keep,
        }
        self._put({name: value.double().sum((0, 2)).cpu() for name, value in values.items()})
        logits = (best.values.log() + matrix.logsumexp).masked_fill(seen == 0, -torch.inf)
        self._top(logits.amax((0, 2)).double().cpu())

    def _put(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.parts[name] = self.parts.get(name, 0) + value

    def _top(self, logits: Tensor) -> None:
        held = self.parts.get("logit")
        self.parts["logit"] = logits if held is None else torch.maximum(held, logits)


def _first_key(call: AttentionCall) -> Tensor:
    """[B, S] ids: 0 for the first key that the last query may see, −1 elsewhere."""
    scores = call.scores
    batch, heads, queries, keys = scores.shape
    ids = torch.full((batch, keys), -1)
    first = torch.zeros(batch, dtype=torch.int64)
    if scores.mask is not None:
        last = slice(queries - 1, queries)
        seen = scores.visible(slice(0, batch), slice(0, heads), last, slice(0, keys))
        first = seen.any(1)[:, 0].int().argmax(-1).expand(batch).cpu()
    return ids.scatter_(1, first[:, None], 0)


def _valid_rows(valid: Tensor | None, like: Tensor) -> Tensor:
    """[B, 1, L]: rows that are text, where the model was told which are."""
    batch, _, queries = like.shape
    if valid is None or valid.shape[0] != batch or valid.shape[1] < queries:
        return torch.ones((1, 1, 1), dtype=torch.bool, device=like.device)
    return valid[:, None, -queries:].to(like.device)


def _stats(step: int, sums: dict[tuple[str, int], _Sums]) -> HeadStats:
    names = tuple(name if not occurrence else f"{name} ({occurrence + 1})" for name, occurrence in sums)
    width = max(len(s.parts["rows"]) for s in sums.values())

    def table(of: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        rows = []
        for part in (s.parts for s in sums.values()):
            row = torch.full((width,), torch.nan, dtype=torch.float64)
            row[: len(part["rows"])] = of(part)
            rows.append(row)
        return torch.stack(rows)

    root = table(lambda p: (p["square"] / p["rows"]).sqrt())
    return HeadStats(
        step,
        names,
        table(lambda p: p["entropy"] / p["rows"]),
        table(lambda p: p["entropy"] / p["even"]),
        table(lambda p: p["logit"]),
        table(lambda p: p["sink"] / p["rows"]),
        root <= _DEAD * root.nanmedian(1, keepdim=True).values,
    )


def _rows(stats: HeadStats) -> Iterator[dict[str, Any]]:
    for layer, site in enumerate(stats.sites):
        for head in range(stats.entropy.shape[1]):
            names = ("entropy", "entropy_share", "largest_logit", "sink_mass")
            values = {name: float(getattr(stats, name)[layer, head]) for name in names}
            dead = bool(stats.dead[layer, head])
            yield {"layer": layer, "head": head, "site": site, **values, "dead": dead}


def _at(table: Tensor, layer: int, head: int) -> float:
    """A number of an earlier look; 0 where that had fewer layers."""
    inside = layer < table.shape[0] and head < table.shape[1]
    return float(table[layer, head].nan_to_num(0)) if inside else 0.0
