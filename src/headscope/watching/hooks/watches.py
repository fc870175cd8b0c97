"""The watches of running models: module names, forwards, and what happens at an attention call."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from headscope.errors import EditError, UnsupportedAttention
from headscope.ops.scores import Scores
from headscope.watching.hooks.call import AttentionCall, Output
from headscope.watching.hooks.proof import Proved, prove

__all__ = [
    "Forward",
    "Watch",
    "active_watches",
    "report_call",
    "running_module",
    "unwatched",
    "within_call",
    "without_modes",
]


@dataclass(eq=False)
class Forward:
    """One forward of the watched model, from its outermost module in to out."""

    valid: Tensor | None  # [B, S] bool, from the attention_mask that the outermost module got
    ran: set[str] = field(default_factory=set)
    stack: list[str] = field(default_factory=list)
    cross_modules: set[str] = field(default_factory=set)  # modules whose last call got another sequence to attend to
    counts: dict[str, int] = field(default_factory=dict)
    masks: dict[Any, Any] = field(default_factory=dict)  # masks already read in this forward
    number: int = 0  # of the site whose call is reported, in the order of first calls
    failed: bool = False  # it ended with an exception
    handling: BaseException | None = field(default_factory=sys.exception)  # what was being handled when it began


Edit = Callable[[AttentionCall, Forward], AttentionCall]


class Watch:
    """Hooks on one model's modules, and what to do with each attention call inside it."""

    def __init__(
        self,
        model: nn.Module,
        modes: tuple[Callable[[], None], Callable[[], None]],
        on_call: Callable[[AttentionCall, Forward], None] | None = None,
        edit: Edit | None = None,
        on_end: Callable[[Forward], None] | None = None,
    ) -> None:
        self.model, self.on_call, self.edit, self.on_end = model, on_call, edit, on_end
        self.push_modes, self.pop_modes = modes  # for the thread in which a forward runs
        self.names = {id(module): name for name, module in model.named_modules(remove_duplicate=True)}
        self._local = threading.local()
        self._handles: list[Any] = []
        self._numbers: dict[tuple[str, int], int] = {}
        self._lock = threading.Lock()

    @property
    def forward(self) -> Forward | None:
        """The forward that this thread is in, or None."""
        return getattr(self._local, "forward", None)

    def attach(self) -> None:
        """Put hooks on the modules; not inside nn.TransformerEncoderLayer, which would leave its fast path."""
        refuse_compiled(self.model)
        covered: set[int] = set()
        for module in self.model.modules():
            if is_plain_layer(module):
                covered |= {id(m) for m in module.modules()}
        for name, module in self.model.named_modules():
            if id(module) in covered:
                continue
            before, after = self._hooks(name)
            self._handles.append(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
            self._handles.append(module.register_forward_hook(after, always_call=True))

    def detach(self) -> None:
        """Remove the hooks; end a forward whose end they missed (KeyboardInterrupt)."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.forward is not None:
            self._local.forward = None
            self.pop_modes()

    def _hooks(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self.enter(name, module, args, kwargs)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            self.leave(name)

        return before, after

    def enter(self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """A module starts. The outermost one starts a forward."""
        if self.forward is None:
            if torch._C._current_graph_task_id() != -1:
                return  # a backward pass computes a layer again: its calls were reported before
            if self.edit is not None:
                refuse_checkpointing(self.model)
            with without_modes():
                self._local.forward = Forward(read_valid(module, args, kwargs))
            self.push_modes()
        forward = self.forward
        if forward is not None:
            forward.stack.append(name)
            forward.ran.add(name)
            (forward.cross_modules.add if _has_source(kwargs) else forward.cross_modules.discard)(name)

    def leave(self, name: str) -> None:
        """A module ends, also by an exception. The outermost one ends the forward."""
        forward = self.forward
        if forward is None or name not in forward.stack:
            return
        while forward.stack.pop() != name:
            pass
        if not forward.stack:
            self._local.forward = None
            forward.failed = sys.exception() is not forward.handling
            self.pop_modes()
            if self.on_end is not None:
                self.on_end(forward)

    def number_of(self, name: str, occurrence: int) -> int:
        """A site's number in the order of first calls, over all forwards: an encoder's come before its decoder's."""
        with self._lock:
            return self._numbers.setdefault((name, occurrence), len(self._numbers))

    def name_of(self, module: nn.Module | None) -> str:
        """The module's name in the watched model, or that of the innermost module running."""
        name = self.names.get(id(module)) if module is not None else None
        if name is not None:
            return name
        return self.forward.stack[-1] if self.forward is not None and self.forward.stack else ""


_WATCHES: list[Watch] = []
_SOURCES = ("key_value_states", "encoder_hidden_states", "cross_attention_states")
_local = threading.local()


def is_plain_layer(module: nn.Module) -> bool:
    """An nn.TransformerEncoderLayer that runs torch's own forward: it has a fast path, and leaves it for hooks."""
    if not isinstance(module, nn.TransformerEncoderLayer):
        return False
    forward, torchs = (inspect.unwrap(kind.forward) for kind in (type(module), nn.TransformerEncoderLayer))
    called = getattr(getattr(forward, "__code__", None), "co_names", ())
    return forward is torchs or not {"super", "TransformerEncoderLayer"}.isdisjoint(called)


def running_module() -> nn.Module | None:
    """The innermost module of a watched model that runs in this thread."""
    for watch in active_watches():
        if watch.forward is not None and watch.forward.stack:
            return watch.model.get_submodule(watch.forward.stack[-1])
    return None


def watches_of(module: nn.Module) -> list[Watch]:
    """The watches in whose model this module is."""
    return [watch for watch in list(_WATCHES) if id(module) in watch.names]


def active_watches() -> list[Watch]:
    """The watches whose model is running in this thread, in the order in which they began."""
    if getattr(_local, "depth", 0):
        return []
    return [watch for watch in list(_WATCHES) if watch.forward is not None]


@contextmanager
def within_call() -> Iterator[None]:
    """While a watched call runs: attention functions that it calls are part of it, not calls of their own."""
    _local.depth = getattr(_local, "depth", 0) + 1
    try:
        yield
    finally:
        _local.depth -= 1


@contextmanager
def without_modes() -> Iterator[None]:
    """For our own computations on the operands of a call: no mode sees them, the user's or ours."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


@contextmanager
def unwatched() -> Iterator[None]:
    """The same, without gradients and autocast, and not watched."""
    with within_call(), without_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


def cached(forward: Forward, key: Any, keep: Any, make: Callable[[], Any]) -> Any:
    """``make()``, computed once per forward and key; ``keep`` stays alive, so that its id is not used again.

    A tensor that may have been written into since then is read again.
    """
    key = (key, _version(keep))
    if key not in forward.masks or key[1] is None:
        forward.masks[key] = (make(), keep)
    return forward.masks[key][0]


def _version(value: Any) -> int | None:
    if not isinstance(value, Tensor):
        return 0
    return None if value.is_inference() else value._version


def report_call(
    module: nn.Module | None,
    way: str,
    candidates: Callable[[Forward], Iterable[Scores]],
    value: Tensor,
    output: Output,
    dropout_p: float = 0.0,
    suffix: str = "",
    valid: Tensor | None = None,
    logsumexp: Tensor | None = None,
    cross: bool = False,
) -> AttentionCall:
    """An attention call has run: prove it, edit it, pass it to the watches. Returns the call as edited.

    ``logsumexp`` [B, H, L] is what its kernel gave, if it gave any; the proof is made with it. ``cross``: the keys are
    known to be another sequence's.

    Raises:
        ProofError: no candidate reading explains the output; UnsupportedAttention: an edit under dropout.
    """
    pairs = [(watch, watch.forward) for watch in active_watches() if watch.forward is not None]
    names = [(watch.name_of(module) + suffix).removeprefix(".") for watch, _ in pairs]
    first = pairs[0][1]
    with unwatched():
        if dropout_p:
            reading = Proved(next(iter(candidates(first))), None, None)
        else:
            text = valid if valid is not None else first.valid
            reading = prove(names[0] or "the model", candidates(first), value, output, text, logsumexp)
    call = AttentionCall(
        names[0],
        0,
        way,
        reading.scores,
        value,
        output,
        dropout_p,
        reading.difference,
        is_cross=cross or _is_cross(module, first, reading.scores),
        logsumexp=reading.logsumexp,
    )
    with within_call():
        for (watch, forward), name in zip(pairs, names, strict=True):
            occurrence = forward.counts.get(name, 0)
            forward.counts[name] = occurrence + 1
            forward.number = watch.number_of(name, occurrence)
            if watch.edit is not None:
                call = watch.edit(call.at(name, occurrence), forward)
        for (watch, forward), name in zip(pairs, names, strict=True):
            if watch.on_call is not None:
                watch.on_call(call.at(name, forward.counts[name] - 1), forward)
    return call


def _is_cross(module: nn.Module | None, forward: Forward, scores: Scores) -> bool:
    """Whether the module says so or got another sequence, or it is not causal and has another number of keys."""
    if getattr(module, "is_cross", False) or (forward.stack and forward.stack[-1] in forward.cross_modules):
        return True
    return scores.shape[2] != scores.shape[3] and getattr(module, "is_causal", None) is False


def _has_source(kwargs: dict[str, Any]) -> bool:
    """Whether a module got the states of another sequence, under the names that transformers uses."""
    return any(kwargs.get(name) is not None for name in _SOURCES)


def autocast_operands(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The operands as the kernel receives them: autocast converts float32 to its own dtype first."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.dtype == torch.float32 else t for t in tensors)


def read_valid(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """Which positions are text, [B, S], from the attention_mask of the outermost module; None: it got none.

    In a 4-D mask (generate() makes one for a static cache): the keys that some query may see, up to the last of them.
    """
    mask = kwargs.get("attention_mask")
    if mask is None and args:
        names = inspect.signature(module.forward).parameters  # of the wrapped function, if it is wrapped
        mask = dict(zip(names, args, strict=False)).get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.detach().bool()
    if isinstance(mask, Tensor) and mask.dim() == 4 and not (mask.is_floating_point() and bool((mask > 0).any())):
        visible = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask.bool()
        keys = visible.detach().flatten(1, 2).any(1)
        used = keys.any(0).nonzero()
        return keys[:, : int(used[-1]) + 1] if len(used) else None
    return None


def refuse_compiled(model: nn.Module) -> None:
    """Raise UnsupportedAttention for a compiled model: its code has no hooks and no lookups."""
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            where = f"module {name!r} of the model" if name else "the model"
            raise UnsupportedAttention(
                f"{where} is compiled (torch.compile): its attention calls no longer pass where they can be seen. "
                "Watch the uncompiled module, which shares its weights: compiled._orig_mod, or the module before "
                ".compile()."
            )


def refuse_checkpointing(model: nn.Module) -> None:
    """Raise EditError where a checkpoint would compute layers again after the edit has ended."""
    if not torch.is_grad_enabled():
        return
    for name, module in model.named_modules():
        if getattr(module, "gradient_checkpointing", False) and module.training:
            raise EditError(
                f"{name or 'the model'} uses gradient checkpointing and gradients are on: the backward pass would "
                "compute the layers again without the edit. Call model.gradient_checkpointing_disable() or use "
                "torch.no_grad()."
            )


def with_output(call: AttentionCall, heads: Tensor, scores: Scores | None = None) -> AttentionCall:
    """The call with other head outputs [B, H, L, Dv], and other weights if ``scores`` are given."""
    raw = call.output.replace_heads(heads)
    output = replace(call.output, raw=raw, heads=heads)
    if scores is None:
        return replace(call, output=output, edited=True)
    return replace(call, output=output, scores=scores, logsumexp=None, edited=True)
