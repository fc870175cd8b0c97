"""The watches of running models: module names, threads, forwards, and the errors that a watch collects."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from headscope.errors import EditError, UnsupportedAttention
from headscope.watching.hooks.call import AttentionCall
from headscope.watching.hooks.virtual_tokens import VirtualTokens, inputs_of, tuned

Threads = Literal["own", "all"]
"""Whose forwards a watch sees: those of the thread that opened it, or those of every thread."""


@dataclass(eq=False)
class Forward:
    """One forward of the watched model, from its outermost module in to out."""

    valid: Tensor | None  # [B, S] bool, from the attention_mask that the outermost module got
    ran: set[str] = field(default_factory=set)
    stack: list[str] = field(default_factory=list)
    cross_modules: set[str] = field(default_factory=set)  # modules whose last call got another sequence to attend to
    counts: dict[str, int] = field(default_factory=dict)
    masks: dict[Any, Any] = field(default_factory=dict)  # masks already read in this forward
    virtual: VirtualTokens = field(default_factory=VirtualTokens)
    number: int = 0  # of the site whose call is reported, in the order of first calls
    call: AttentionCall | None = None  # reported, and not yet passed to the user's callback
    failed: bool = False  # it ended with an exception, or a call could not be read
    handling: BaseException | None = field(default_factory=sys.exception)  # what was being handled when it began


OnCall = Callable[[AttentionCall, Forward], None]
Edit = Callable[[AttentionCall, Forward], AttentionCall]


class Watch:
    """One model's module names, and what to do with each attention call inside it.

    A watch never ends a forward with an error of its own: it keeps the first, in ``error``, and watches no longer.
    """

    def __init__(
        self,
        model: nn.Module,
        modes: tuple[Callable[[], None], Callable[[], None]],
        on_call: OnCall | None = None,
        edit: Edit | None = None,
        on_end: Callable[[Forward], None] | None = None,
        callback: OnCall | None = None,
        threads: Threads = "own",
    ) -> None:
        if threads not in ("own", "all"):
            raise ValueError(f'threads is {threads!r}: wanted "own" (the thread that opens the watch) or "all".')
        refuse_compiled(model)
        self.model, self.on_call, self.edit, self.on_end, self.callback = model, on_call, edit, on_end, callback
        self.push_modes, self.pop_modes = modes  # for the thread in which a forward runs
        self.thread = threading.current_thread() if threads == "own" else None
        self.error: Exception | None = None
        self.ran_in_other_threads = False
        self._modules = dict(model.named_modules())  # kept, so that no id is used again
        self._names = {id(module): name for name, module in self._modules.items()}
        self._names_of_replicas = {id(module._forward_hooks): name for name, module in self._modules.items()}
        self._tuned = tuned(model)
        self._local = threading.local()
        self._numbers: dict[tuple[str, int], int] = {}
        self._lock = threading.Lock()

    @property
    def forward(self) -> Forward | None:
        """The forward that this thread is in, or None."""
        return getattr(self._local, "forward", None)

    def fail(self, error: Exception) -> None:
        """Keep an error until the watch closes: the model runs on, and is watched no longer."""
        if self.error is None:
            self.error = error
        if self.forward is not None:
            self.forward.failed = True

    def enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> str | None:
        """A module starts; the outermost one starts a forward. Returns its name, or None if it is not watched here."""
        name = self._name(module)
        if name is None or not (self.forward is not None or self._start(name, module, args, kwargs)):
            return None
        forward = self.forward
        assert forward is not None
        if forward.stack and not kwargs.keys().isdisjoint(("input_ids", "inputs_embeds")):
            try:
                with without_modes():
                    forward.valid = forward.virtual.enter(module, inputs_of(module, args, kwargs), forward.valid)
            except Exception as error:
                self.fail(error)
        forward.stack.append(name)
        forward.ran.add(name)
        (forward.cross_modules.add if _has_source(kwargs) else forward.cross_modules.discard)(name)
        return name

    def _start(self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> bool:
        """Start a forward, if it is to be watched."""
        if self.error is not None:
            return False
        if torch._C._current_graph_task_id() != -1:
            return False  # a backward pass computes a layer again: its calls were reported before
        if self.thread is not None and self.thread is not threading.current_thread():
            self.ran_in_other_threads = True
            return False
        forward = Forward(None)
        try:
            refuse_tracing()
            if self.edit is not None:
                refuse_checkpointing(self.model)
            with without_modes():
                inputs = inputs_of(module, args, kwargs)
                virtual = 0 if self._tuned is None or name == self._tuned[0] else self._tuned[1]  # in generate()
                forward.valid = forward.virtual.begin(module, inputs, virtual, read_valid(inputs))
        except Exception as error:
            self.fail(error)
            return False
        self._local.forward = forward
        self.push_modes()
        return True

    def leave(self, name: str) -> None:
        """A module ends, also by an exception. The outermost one ends the forward."""
        forward = self.forward
        if forward is None or name not in forward.stack:
            return
        while forward.stack.pop() != name:
            pass
        if forward.stack:
            return
        self._local.forward = None
        forward.failed = forward.failed or sys.exception() is not forward.handling
        self.pop_modes()
        if self.on_end is not None:
            try:
                self.on_end(forward)
            except Exception as error:
                self.fail(error)

    def number_of(self, name: str, occurrence: int) -> int:
        """A site's number in the order of first calls, over all forwards: an encoder's come before its decoder's."""
        with self._lock:
            return self._numbers.setdefault((name, occurrence), len(self._numbers))

    def _name(self, module: nn.Module) -> str | None:
        """The name of one of the model's own modules, or of a replica that nn.DataParallel runs in its place.

        A copy that somebody makes (copy.deepcopy, an averaged model) is another model.
        """
        if getattr(module, "_is_replica", False):
            return self._names_of_replicas.get(id(module._forward_hooks))
        return self._names.get(id(module))

    def name_of(self, module: nn.Module | None) -> str:
        """The module's name in the watched model, or that of the innermost module running."""
        name = self._name(module) if module is not None else None
        if name is not None:
            return name
        return self.forward.stack[-1] if self.forward is not None and self.forward.stack else ""


_WATCHES: list[Watch] = []
_SOURCES = ("key_value_states", "encoder_hidden_states", "cross_attention_states")
_ORIGINAL: list[Any] = []
_local = threading.local()


def install() -> None:
    """Wrap the call of every module, for the watches that it belongs to; no hook is put on a module.

    So nothing of ours is copied, pickled or left behind with a model, and torch.nn keeps its fast paths.
    """
    if _ORIGINAL:
        return
    original: Any = nn.Module._call_impl
    _ORIGINAL.append(original)

    @wraps(original)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        entered: list[tuple[Watch, str]] = []
        try:
            for watch in list(_WATCHES):
                name = watch.enter(self, args, kwargs)
                if name is not None:
                    entered.append((watch, name))
            return original(self, *args, **kwargs)
        finally:
            for watch, name in reversed(entered):
                watch.leave(name)

    nn.Module._call_impl = call  # type: ignore[method-assign]


def remove() -> None:
    """Put it back."""
    while _ORIGINAL:
        nn.Module._call_impl = _ORIGINAL.pop()  # type: ignore[method-assign]


def running_module() -> nn.Module | None:
    """The innermost module of a watched model that runs in this thread."""
    for watch in active_watches():
        if watch.forward is not None and watch.forward.stack:
            return watch.model.get_submodule(watch.forward.stack[-1])
    return None


def active_watches() -> list[Watch]:
    """The watches whose model is running in this thread, in the order in which they began."""
    if getattr(_local, "depth", 0):
        return []
    return [watch for watch in list(_WATCHES) if watch.forward is not None and watch.error is None]


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


def _has_source(kwargs: dict[str, Any]) -> bool:
    """Whether a module got the states of another sequence, under the names that transformers uses."""
    return any(kwargs.get(name) is not None for name in _SOURCES)


def read_valid(inputs: Mapping[str, Any]) -> Tensor | None:
    """Which positions are text, [B, S], from the outermost module's attention_mask, also within a mapping.

    None: it got none. In a 4-D mask (generate() makes one for a static cache): the keys that some query may see, up to
    the last of them.
    """
    batches = [value for value in inputs.values() if isinstance(value, Mapping)]  # as sentence-transformers passes
    masks = [mapping.get("attention_mask") for mapping in (inputs, *batches)]
    mask = next((mask for mask in masks if mask is not None), None)
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


def refuse_tracing() -> None:
    """Raise UnsupportedAttention while a graph is made of the model: it would contain what watching computes."""
    if torch._C._get_tracing_state() is not None or torch.compiler.is_exporting():
        raise UnsupportedAttention(
            "the model was traced inside the block (torch.jit.trace, torch.export): do that outside of it."
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
