"""What the heads of a model do while it trains, measured every N steps, with warnings that name the head."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from headscope.errors import HeadscopeError, NothingSeen
from headscope.watching.head_totals import SiteTotals, totals_of
from headscope.watching.hooks import OTHER_THREADS, AttentionCall, Forward, Threads, Watch, unwatched, watch

Log = Callable[[str, float, int], object]  # name, value, step
Warn = Callable[[str], object]

_FELL = 10.0  # the entropy share fell by this factor within the last measurements
_REMEMBERED = 5  # measurements
_SINK = 0.5  # more weight than this on the first key is a sink, whose low entropy is no fault


class HeadWarning(UserWarning):
    """A head's entropy collapsed, its logits exploded, or its numbers are no longer finite."""


@dataclass(frozen=True, eq=False)
class HeadStats:
    """What the heads did at one step; tensors are [layers, heads], NaN where a layer has fewer heads.

    Attributes:
        step: Which step, from 0.
        sites: The attention modules, in the order of their calls: row i of the tensors is ``sites[i]``.
        entropy: Mean over the queries that see at least two keys, in nats (arXiv 1906.04341).
        entropy_share: The same as a share of the entropy of uniform attention over the visible keys, 0 to 1.
        largest_logit: The largest score before the softmax, after scale, cap and bias.
        sink_mass: Mean weight on the first visible key (arXiv 2410.10781).
        dead: Whether the head's output is below a thousandth of its layer's median head.
        finite: Whether its queries, keys, mask and output hold only finite numbers.
        num_heads: How many heads each site has.

    Queries without visible keys are left out, and so are those at positions that no query may see: padding.
    """

    step: int
    sites: tuple[str, ...]
    entropy: Tensor
    entropy_share: Tensor
    largest_logit: Tensor
    sink_mass: Tensor
    dead: Tensor
    finite: Tensor
    num_heads: tuple[int, ...]

    def table(self) -> list[dict[str, Any]]:
        """One row per head: layer, head, site, entropy, entropy_share, largest_logit, sink_mass, dead, finite."""
        return list(_rows(self))


class Monitor(AbstractContextManager["Monitor"]):
    """Made by :func:`monitor`: a ``with`` around a forward; ``history`` holds a `HeadStats` per measurement.

    ``step`` is the number of the next step; a resumed run sets it to the steps done.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int,
        log: Log | None,
        warn: Warn | None,
        logit_limit: float,
        low_entropy: float,
        threads: Threads,
    ) -> None:
        self.model, self.every, self.log, self.warn, self.threads = model, every, log, warn, threads
        self.logit_limit, self.low_entropy = logit_limit, low_entropy
        self.step = 0
        self.history: list[HeadStats] = []
        self._running: ExitStack | None = None
        self._watch: Watch | None = None  # of this step, if it is measured
        self._sites: dict[tuple[str, int], SiteTotals] = {}
        self._pending: dict[int, list[tuple[tuple[str, int], SiteTotals]]] = {}
        self._warned: set[tuple[str, int, int]] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> Monitor:
        """Measure this step, if it is its turn."""
        if self._running is not None:
            raise HeadscopeError("this monitor is watching already: one `with` at a time, around one step.")
        self._running, self._watch, self._sites, self._pending = ExitStack(), None, {}, {}
        if self.step % self.every == 0:
            try:
                watching = watch(self.model, self._add, on_end=self._end, threads=self.threads)
                self._watch = self._running.enter_context(watching)
            except BaseException:
                self._running = None
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Store the measurement, and warn; nothing is stored of a step that failed or could not be measured."""
        assert self._running is not None
        running, self._running = self._running, None
        step, self.step = self.step, self.step + 1
        problem: Exception | None = None
        try:
            running.__exit__(kind, error, trace)
        except Exception as raised:
            if self._watch is None or raised is not self._watch.error:
                raise
            problem = raised
        sites, self._sites, self._pending = self._sites, {}, {}
        if error is not None or step % self.every:
            return
        texts = self._once(("unmeasured", 0, 0), problem is not None, f"step {step} was not measured: {problem}")
        if problem is None and (sites or not self.history):  # otherwise a step without a forward
            if not sites:
                raise self._nothing_seen()
            stats = _stats(step, sites)
            self.history.append(stats)
            self._write(stats)
            texts += self._warnings(stats)
        for text in texts:
            if self.warn is None:
                warnings.warn(text, HeadWarning, stacklevel=2)
            else:
                self.warn(text)

    def _nothing_seen(self) -> NothingSeen:
        if self._watch is not None and self._watch.ran_in_other_threads:
            return NothingSeen(f'{OTHER_THREADS} monitor(model, threads="all") measures these, too.')
        return NothingSeen(
            "no attention was seen inside the `with`: put the model's forward there. Modules of headscope, "
            "torch.nn and transformers are seen, and scaled_dot_product_attention."
        )

    def table(self) -> list[dict[str, Any]]:
        """The last measurement as a table, see :meth:`HeadStats.table`; empty before the first."""
        return [] if not self.history else self.history[-1].table()

    def _add(self, call: AttentionCall, forward: Forward) -> None:
        with unwatched():
            totals = (call.name, call.occurrence), totals_of(call)
        with self._lock:
            self._pending.setdefault(id(forward), []).append(totals)

    def _end(self, forward: Forward) -> None:
        """Add the totals of a forward when it has ended; one that failed does not count."""
        with self._lock:
            for site, totals in self._pending.pop(id(forward), []):
                if not forward.failed:
                    before = self._sites.get(site)
                    self._sites[site] = totals if before is None else before.plus(totals)

    def _write(self, stats: HeadStats) -> None:
        if self.log is None:
            return
        for row in _rows(stats):
            for name in ("entropy", "largest_logit", "sink_mass", "dead"):
                self.log(f"heads/{row['layer']}.{row['head']}/{name}", float(row[name]), stats.step)

    def _warnings(self, stats: HeadStats) -> list[str]:
        """The warnings of this measurement."""
        texts: list[str] = []
        before = self.history[-1 - _REMEMBERED : -1]
        for row in _rows(stats):
            layer, head = row["layer"], row["head"]
            where = f"head {layer}.{head} ({row['site']}) at step {stats.step}"
            logit, share = row["largest_logit"], row["entropy_share"]
            texts += self._once(
                ("nonfinite", layer, head),
                not row["finite"],
                f"{where}: its queries, keys or output are NaN or infinite. Go back to a checkpoint; lower the "
                "learning rate, clip gradients.",
            )
            texts += self._once(
                ("logit", layer, head),
                logit > self.logit_limit,
                f"{where}: its largest logit is {logit:.3g}, above {self.logit_limit:g}: logits explode. Lower the "
                "learning rate, decay the query and key weights, or use qk_norm=True.",
            )
            was = max((_at(s.entropy_share, layer, head) for s in before), default=0.0)
            fell = share < self.low_entropy and was > _FELL * share and was > self.low_entropy
            texts += self._once(
                ("entropy", layer, head),
                fell and row["sink_mass"] < _SINK,
                f"{where}: its entropy fell from {100 * was:.1f} % to {100 * share:.1f} % of uniform attention's: it "
                "collapses onto single keys. Lower the learning rate, warm up longer, or use qk_norm=True.",
                recovered=share > self.low_entropy,
            )
        return texts

    def _once(self, key: tuple[str, int, int], now: bool, text: str, recovered: bool | None = None) -> list[str]:
        """The text when a state begins, and again only after it has ended."""
        if now and key not in self._warned:
            self._warned.add(key)
            return [text]
        if (not now) if recovered is None else recovered:
            self._warned.discard(key)
        return []


def monitor(
    model: nn.Module,
    every: int = 50,
    *,
    log: Log | None = None,
    warn: Warn | None = None,
    logit_limit: float = 100.0,
    low_entropy: float = 0.02,
    threads: Threads = "own",
) -> Monitor:
    """Watch what the heads do in a training loop of your own: a ``with`` around the forward.

    Measures every ``every``-th step, the first included, and does nothing in the others. It reads the queries and keys
    of each layer during the forward; outputs, gradients and random numbers stay the same to the bit. Several
    forwards inside one ``with`` count together.

    Args:
        model: any model that :func:`headscope.record` can see.
        every: steps between measurements.
        log: called with (name, value, step) for each head, such as TensorBoard's ``SummaryWriter.add_scalar``.
        warn: called with the text of each warning, instead of Python's ``warnings``.
        logit_limit: a largest score above this is a warning. Numbers of bfloat16 lie 0.5 apart at 100, so
            that a weight is off by a quarter; runs that diverged had thousands (arXiv 2302.05442).
        low_entropy: an entropy share that falls below this, and to a tenth of what it was within the last 5
            measurements, is a warning (entropy collapse, arXiv 2303.06296), unless the first key is the head's sink.
        threads: "own": forwards of the thread that enters the ``with``; "all": those of every thread, added up, for
            data-parallel code.

    Raises:
        ValueError: every below 1. Leaving the ``with`` raises NothingSeen if no attention ran inside. A step whose
            attention cannot be read is not measured, and warned of: nothing of ours ends a training step.

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
        raise ValueError(f"every is {every}: wanted a number of steps from 1.")
    return Monitor(model, every, log, warn, logit_limit, low_entropy, threads)


def _stats(step: int, totals: dict[tuple[str, int], SiteTotals]) -> HeadStats:
    names = tuple(name if not occurrence else f"{name} ({occurrence + 1})" for name, occurrence in totals)
    sites = [part.numbers() for part in totals.values()]
    num_heads = tuple(len(site["entropy"]) for site in sites)
    blank = {"dead": False, "finite": True}

    def table(name: str) -> Tensor:
        width, value = max(num_heads), blank.get(name, torch.nan)
        return torch.stack([nn.functional.pad(site[name], (0, width - len(site[name])), value=value) for site in sites])

    return HeadStats(
        step,
        names,
        table("entropy"),
        table("entropy_share"),
        table("largest_logit"),
        table("sink_mass"),
        table("dead"),
        table("finite"),
        num_heads,
    )


def _rows(stats: HeadStats) -> Iterator[dict[str, Any]]:
    for layer, site in enumerate(stats.sites):
        for head in range(stats.num_heads[layer]):
            names = ("entropy", "entropy_share", "largest_logit", "sink_mass")
            values = {name: float(getattr(stats, name)[layer, head]) for name in names}
            states = {name: bool(getattr(stats, name)[layer, head]) for name in ("dead", "finite")}
            yield {"layer": layer, "head": head, "site": site, **values, **states}


def _at(table: Tensor, layer: int, head: int) -> float:
    """A number of an earlier measurement; 0 where that had fewer layers."""
    inside = layer < table.shape[0] and head < table.shape[1]
    return float(table[layer, head].nan_to_num(0)) if inside else 0.0
