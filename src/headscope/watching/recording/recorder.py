"""record(model): every attention call of what runs inside the block, as a Recording."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headscope.errors import NothingSeen, RecordingError
from headscope.ops.matrix import AttentionMatrix
from headscope.ops.reductions import Reduction, check_reductions
from headscope.ops.sizes import format_bytes, parse_bytes
from headscope.watching.hooks import OTHER_THREADS, AttentionCall, Forward, Threads, unwatched, watch
from headscope.watching.recording.file import Contents, load, save
from headscope.watching.recording.run import Answer, Call, Layers, Run, layers_of
from headscope.watching.recording.site import Site, capture

_KEEP = ("query", "key", "value", "output")
_LIKE_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)


class Recording:
    """What :func:`record` gives. ``recording[i]`` is the matrix of the i-th attention site.

    With several independent forwards in the block, each is one of ``recording.runs``.
    """

    def __init__(self, runs: Iterable[Run] = (), tokens: Any = None) -> None:
        self.runs = list(runs)
        self.tokens = tokens
        self.answers: list[Answer] = []
        self.unseen: tuple[str, ...] = ()

    @property
    def run(self) -> Run:
        """The only run. Raises RecordingError when there are none or several."""
        if len(self.runs) == 1:
            return self.runs[0]
        if not self.runs:
            hint = " Its answers are in recording.answers." if self.answers else " Run the model inside the block."
            raise RecordingError("this recording holds no attention matrices." + hint)
        raise RecordingError(
            f"this recording holds {len(self.runs)} independent forwards: "
            f"say which, recording.runs[0] … recording.runs[{len(self.runs) - 1}]."
        )

    def __len__(self) -> int:
        return len(self.run) if self.runs else 0

    def __getitem__(self, which: int | str) -> AttentionMatrix:
        matrix: AttentionMatrix = self.run[which]
        return matrix

    def __iter__(self) -> Iterator[AttentionMatrix]:
        return iter(self.run)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Names, ways in, shapes and proofs of the attention sites."""
        return tuple(self.run.sites)

    @property
    def valid(self) -> Tensor | None:
        """Which positions are text, [B, S] bool, from the model's attention_mask; None: it got none."""
        return self.run.valid

    @property
    def proof(self) -> float | None:
        """The largest difference of a rebuilt output from the model's own; None: some call is unproved."""
        return _largest([site.proof for run in self.runs for site in run.sites])

    @property
    def rounded_proof(self) -> float | None:
        """The same with scores rounded as eager attention rounds them; None: some call is not in half precision.

        In half precision the smaller of the two says which the model did. The weights here are the exact ones.
        """
        return _largest([site.rounded_proof for run in self.runs for site in run.sites])

    @property
    def calls(self) -> list[Call]:
        """All raw calls, in the order of runs, sites and steps."""
        return [Call(site, rows) for run in self.runs for site in run.sites for rows in site.calls]

    def to_attentions(self, *, limit: int | str = "1 GiB") -> tuple[Tensor, ...]:
        """The maps as transformers' ``output_attentions`` gives them: one [B, H, L, S] a site.

        Those of ``record(dense=True)`` are there already, and only the steps of a generation are joined.

        Raises:
            ValueError: all maps together take more than ``limit`` (bytes, or text such as "4 GiB").
        """
        missing = [s for s in self.sites if len(s.calls) > 1 or s.calls[0].weights is None]
        size = sum(_num_bytes(site.shape, site.last_key.dtype) for site in missing)
        if size > parse_bytes(limit):
            raise ValueError(
                f"the dense maps of {len(missing)} sites would take {format_bytes(size)} together, the limit is "
                f"{limit}. Ask each for a part, recording[i].topk(k), .entropy(), .pool(64, 64); or raise limit=."
            )
        stored = [site.weights() for site in self.sites]
        return tuple(self[i].dense(limit=size) if maps is None else maps for i, maps in enumerate(stored))

    def save(self, path: str | Path, *, dtype: torch.dtype | None = None, force: bool = False) -> None:
        """Write a safetensors file; see docs/recording-format.md.

        ``dtype``: queries, keys, values and outputs are rounded to it; torch.float16 halves the file, and a weight
        is then off by about a thousandth of its score's size. What is rounded is unproved.
        ``force``: a file that is no recording may be overwritten, too.

        Raises:
            RecordingError: nowhere to write, a number too large for ``dtype``, or nothing but answers of ``reduce=``.
            ValueError: no floating dtype.
        """
        if self.answers and not self.runs:
            raise RecordingError(
                "this recording holds answers of reduce= and no queries or keys, and a recording's file keeps these: "
                "save the answers' values (torch.save, a table), or record without reduce=."
            )
        contents = Contents([(run.sites, run.valid) for run in self.runs], self.tokens, self.unseen)
        save(contents, Path(path), dtype, force=force)

    @staticmethod
    def load(path: str | Path) -> Recording:
        """Read such a file; tensors stay on disk until asked. Raises RecordingError."""
        contents = load(Path(path))
        recording = Recording([Run(sites, valid) for sites, valid in contents.runs], contents.tokens)
        recording.unseen = contents.unseen
        return recording

    def __repr__(self) -> str:
        if len(self.runs) != 1:
            return f"Recording({len(self.runs)} runs, {len(self.answers)} answers)"
        sites = self.sites
        proof = "unproved" if self.proof is None else f"rebuilt to {self.proof:.0e}"
        shapes = {tuple(site.shape) for site in sites}
        shape = f"each {shapes.pop()}" if len(shapes) == 1 else f"{len(shapes)} different shapes"
        part = f"; PART of the model: {len(self.unseen)} attention modules were not seen" if self.unseen else ""
        return f"Recording({len(sites)} attention sites, {shape}; {proof}{part})"


class _Recorder:
    """Collects the calls of each forward, and joins forwards into runs."""

    def __init__(
        self,
        recording: Recording,
        layers: Sequence[int | str] | None,
        keep: Sequence[str],
        reduce: Any,
        detach: bool,
        on_call: Callable[[AttentionCall], None] | None,
        dense_limit: int | str | None = None,
    ) -> None:
        self.dense_limit, self._dense_bytes = dense_limit, 0  # a limit of None: no dense maps are kept
        self.recording, self.layers, self.keep = recording, layers, keep
        self.reduce, self.detach, self.on_call = reduce, detach, on_call
        self.ran: set[str] = set()
        self.site_names: dict[str, None] = {}  # in the order of first calls
        self.matched_layers: set[int | str] = set()  # those of ``layers`` that were called
        self.forwards = 0
        self._lock = threading.Lock()
        self._pending: dict[int, list[Site]] = {}
        self._witness: dict[int, Site] = {}
        self._current: dict[int, Run] = {}

    def add(self, call: AttentionCall, forward: Forward) -> None:
        """A call of a forward that is still running."""
        with self._lock:
            self.site_names[call.name] = None
        matches = {layer for layer in self.layers or () if layer in (forward.number, call.name)}
        self.matched_layers |= matches
        if self.layers is None or matches:
            if isinstance(self.reduce, tuple):
                self._answer(call, lambda call: call.matrix().reduce(*self.reduce))
            elif self.reduce is None:
                dense = self._check_limit(call)
                with unwatched() if self.detach else torch.enable_grad():
                    captured = capture(call, self.keep, self.detach, self._last_key(call), dense)
                self._pending.setdefault(id(forward), []).append(captured)
        elif self.reduce is None and not call.is_cross and id(forward) not in self._witness:
            with unwatched():
                self._witness[id(forward)] = capture(call, ("query", "key"), True, self._last_key(call))

    def _check_limit(self, call: AttentionCall) -> bool:
        """Whether dense maps are kept. Raises ValueError if this call's would be too many bytes with those before."""
        if self.dense_limit is None:
            return False
        with self._lock:
            self._dense_bytes += _num_bytes(call.shape, call.scores.dtype)
            if self._dense_bytes > parse_bytes(self.dense_limit):
                raise ValueError(
                    f"record(dense=True): with {call.name}, {tuple(call.shape)} (B, H, L, S), all dense maps take "
                    f"{format_bytes(self._dense_bytes)}, the limit is {self.dense_limit}. Record without dense=, "
                    "and ask for parts, or raise limit=."
                )
        return True

    def call_back(self, call: AttentionCall, forward: Forward) -> None:
        """Call the user's functions, whose exceptions end the forward."""
        if callable(self.reduce) and (self.layers is None or {forward.number, call.name} & set(self.layers)):
            self._answer(call, self.reduce)
        if self.on_call is not None:
            self.on_call(call)

    def _last_key(self, call: AttentionCall) -> Tensor | None:
        current = self._current.get(threading.get_ident())
        return None if current is None else current.last_key(call.name, call.occurrence)

    def _answer(self, call: AttentionCall, reduce: Callable[[AttentionCall], Any]) -> None:
        with unwatched():
            values = reduce(call)
        with self._lock:
            self.recording.answers.append(Answer(call.name, call.occurrence, call.shape, values))

    def end(self, forward: Forward) -> None:
        """A forward ended: it continues this thread's run, or begins another. One that failed is dropped."""
        with self._lock, unwatched():
            calls, witness = self._pending.pop(id(forward), []), self._witness.pop(id(forward), None)
            if forward.failed:
                return
            self.forwards += 1
            self.ran |= forward.ran
            if not calls:
                return
            current = self._current.get(threading.get_ident())
            if not all(call.is_cross for call in calls):
                witness = None
            valid = _valid(forward, calls)
            if current is None or not current.join(calls, valid, witness):
                current = Run(calls, valid)
                current.witness = witness
                self._current[threading.get_ident()] = current
                self.recording.runs.append(current)

    def close(self, model: nn.Module) -> None:
        """List the modules whose attention was not seen. Raises NothingSeen if no call was."""
        modules = dict(model.named_modules())
        like = [n for n in sorted(self.ran) if _LIKE_ATTENTION.search(type(modules[n]).__name__) and n]
        leaves = [n for n in like if not any(other.startswith(n + ".") for other in like)]
        if self.forwards and not self.site_names:
            listed = ", ".join(f"{n} ({type(modules[n]).__name__})" for n in leaves[:5])
            hint = f" These modules look like attention: {listed}." if leaves else " No module looks like attention."
            raise NothingSeen(
                f"{type(model).__name__} ran {self.forwards} times and no attention call passed where it can be "
                "seen: transformers' attention functions, torch's scaled_dot_product_attention, torch.nn's modules."
                + hint
            )
        missing = [layer for layer in self.layers or () if layer not in self.matched_layers]
        if missing and self.site_names:
            count, names = len(self.site_names), list(self.site_names)[:4]
            listed = ", ".join(names) + (" …" if count > 4 else "")
            raise RecordingError(
                f"record(layers=…): no attention site has the number or name {missing[0]!r}. There were "
                f"{count} modules that attend: {listed}. Numbers count from 0 in the order of first calls."
            )
        self.recording.unseen = tuple(n for n in leaves if not any(_related(n, c) for c in self.site_names))


def _num_bytes(shape: torch.Size, dtype: torch.dtype) -> int:
    """Of a dense map of operands of this dtype."""
    return math.prod(shape) * (8 if dtype == torch.float64 else 4)


def _valid(forward: Forward, calls: list[Site]) -> Tensor | None:
    """Which keys are text; None without an attention_mask, unless there are virtual tokens, which are no text."""
    if forward.valid is not None or not forward.virtual.number or forward.virtual.text_shape is None:
        return forward.valid
    valid = torch.ones(forward.virtual.text_shape, dtype=torch.bool, device=calls[0].last_key.device)
    valid[:, : forward.virtual.number] = False
    return valid


def _largest(differences: list[float | None]) -> float | None:
    known = [difference for difference in differences if difference is not None]
    return max(known) if known and len(known) == len(differences) else None


def _related(name: str, called: str) -> bool:
    return name == called or called.startswith(name + ".") or name.startswith(called + ".")


def _checked(keep: Iterable[str], reduce: Any, dense: bool) -> tuple[tuple[str, ...], Any]:
    """The names of what is kept, and the reductions as a tuple or a function. Raises ValueError."""
    names = tuple(keep)
    wrong = [name for name in names if name not in _KEEP]
    if wrong or not {"query", "key"} <= set(names):
        raise ValueError(f"keep got {names}: wanted 'query' and 'key', and optionally 'value', 'output'.")
    reductions: Any = (reduce,) if isinstance(reduce, Reduction | Mapping | str | type) else reduce
    if reductions is not None and not callable(reductions):
        reductions = tuple(reductions)
        check_reductions(reduce.values() if isinstance(reduce, Mapping) else reductions)
    if dense and reductions is not None:
        raise ValueError("record(dense=True, reduce=…): reduce= keeps nothing but its answers; leave one out.")
    return names, reductions


@contextmanager
def record(
    model: nn.Module,
    *,
    tokens: Any = None,
    layers: Layers = None,
    keep: Iterable[str] = ("query", "key"),
    reduce: Reduction | Iterable[Reduction] | Mapping[str, Reduction] | Callable[[AttentionCall], Any] | None = None,
    detach: bool = True,
    on_call: Callable[[AttentionCall], None] | None = None,
    threads: Threads = "own",
    dense: bool = False,
    limit: int | str = "1 GiB",
) -> Iterator[Recording]:
    """Record every attention call of ``model`` inside the block; what the model computes stays the same to the bit.

    Args:
        model: a torch module: transformers, torch.nn, or any code that calls scaled_dot_product_attention.
        tokens: stored with the recording, so that views can name positions by their words.
        layers: only these sites, by number in the order of first calls or by module name; one or several.
        keep: "query" and "key", and if wanted "value" and "output" (P @ V).
        reduce: compute these reductions (or call this function) at each call and keep nothing else; the results
            are in ``recording.answers``, under the names of a mapping such as ``{"entropy": Entropy()}``.
        detach: False keeps the graph: ``P @ value``, ``P.T @ x`` and ``P.entropy()`` can be differentiated, as always.
        on_call: called with each attention call after it ran.
        threads: "own": forwards of the thread that opened the block; "all": those of every thread, each a run of its
            own, for data-parallel code and models that run in a worker.
        dense: every map is also computed while the model runs and kept, [B, H, L, S] each, for ``to_attentions()``.
        limit: the most that these maps may take together, in bytes or as text such as "4 GiB".

    Raises:
        UnsupportedAttention: at once, for a compiled model. All others are raised when the block ends: the model runs
            on, unrecorded. See :mod:`headscope.errors` for NothingSeen, UnsupportedAttention, ProofError.
        RecordingError: ``layers`` names a site that was not called; what was recorded was written into afterwards.
        ValueError: dense maps above the limit.

    The steps of a generation are one run, recognised by their keys. A call that continues only the first keys of a site
    is read as the rejection of the others (drafts). So record each continuation of one text in a block of its own, if
    the text itself is run inside the block.

    Example:
        >>> import torch
        >>> layer = torch.nn.MultiheadAttention(16, 4)
        >>> with record(layer) as recording:
        ...     _ = layer(*[torch.randn(7, 2, 16)] * 3)
        >>> recording[0].entropy().shape
        torch.Size([2, 4, 7])
    """
    names, reductions = _checked(keep, reduce, dense)
    parse_bytes(limit)
    if not isinstance(model, nn.Module):
        raise TypeError(f"record() got {type(model).__name__}: wanted a torch module.")
    recording = Recording(tokens=tokens)
    recorder = _Recorder(recording, layers_of(layers), names, reductions, detach, on_call, limit if dense else None)
    own_functions = recorder.call_back if on_call is not None or callable(reductions) else None
    with watch(model, recorder.add, on_end=recorder.end, callback=own_functions, threads=threads) as watcher:
        yield recording
    if watcher.ran_in_other_threads and not recorder.site_names:
        raise NothingSeen(f'{OTHER_THREADS} record(model, threads="all") records these, too.')
    recorder.close(model)
